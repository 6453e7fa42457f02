"""The public network of a lab: a third host, the desk, on whose bridge both nodes have a second interface.

What is on a real site outside the two servers is on the desk: the clients of the application, and the arbiter.

    one eth1 10.79.0.1 --- port-one \\
                                      bridge 10.79.0.9 (desk)
    two eth1 10.79.0.2 --- port-two /
"""

from functools import partial

from mirrorfs.lab.network import ADDRESSES, DESK, Network, configure, inside, run

INTERFACE = "eth1"
PUBLIC = {"one": "10.79.0.1", "two": "10.79.0.2", DESK: "10.79.0.9"}
PREFIX_LENGTH = 24
_BRIDGE = "bridge"


def create(network: Network) -> None:
    """Make the desk and connect both hosts of a network that exists to it."""
    desk = network.namespace(DESK)
    run("ip", "netns", "add", desk)
    run("ip", "-n", desk, "link", "add", _BRIDGE, "type", "bridge")
    for host in ADDRESSES:
        port = _port(host)
        far = ("peer", "name", INTERFACE, "netns", network.namespace(host))
        run("ip", "-n", desk, "link", "add", port, "type", "veth", *far)
        run("ip", "-n", desk, "link", "set", port, "master", _BRIDGE, "up")
        inside(network.namespace(host), partial(configure, INTERFACE, PUBLIC[host], PREFIX_LENGTH))
    inside(desk, partial(configure, _BRIDGE, PUBLIC[DESK], PREFIX_LENGTH))


def unplug(network: Network, host: str) -> None:
    """Pull the host's cable to the public network, until `heal`."""
    run("ip", "-n", network.namespace(DESK), "link", "set", _port(host), "down")


def part(network: Network) -> None:
    """Let neither host reach the other over the public network, until `heal`; both reach the desk."""
    for host in ADDRESSES:
        run("ip", "-n", network.namespace(DESK), "link", "set", _port(host), "type", "bridge_slave", "isolated", "on")


def heal(network: Network) -> None:
    """Undo both."""
    for host in ADDRESSES:
        port = ("ip", "-n", network.namespace(DESK), "link", "set", _port(host))
        run(*port, "up")
        run(*port, "type", "bridge_slave", "isolated", "off")


def _port(host: str) -> str:
    return f"port-{host}"
