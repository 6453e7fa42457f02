"""Two nodes come to know each other: `mirrorfs init` on the first, `mirrorfs join CODE` on the second.

The code says where the first node waits, which identity it has, and a secret that is good once and for a short time. So each
is sure of the other before anything is said: the second compares the certificate that it meets with the code, the first the
secret. Then they exchange their identities and the configuration; nothing is copied by hand.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
import secrets
import socket
import ssl
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack
import trio
from pyroute2 import IPRoute

from mirrorfs import config as configuration
from mirrorfs import config_file
from mirrorfs.config import Config
from mirrorfs.errors import ConfigError, MirrorfsError, UsageError
from mirrorfs.trust import Trust, fingerprint

log = logging.getLogger(__name__)

_SECRET_BYTES: Final = 16
_FINGERPRINT_BYTES: Final = 16
_CHECK_BYTES: Final = 3
_MAX_WRONG: Final = 5
_MAX_GUESTS: Final = 8
_MAX_LINE: Final = 1 << 20
_ANSWER_S: Final = 10.0
_PREFIX: Final = "mfs1"
_GLOBAL_SCOPE: Final = 0
_NODE_KEY: Final = re.compile(r"^node\s*=.*\n", re.MULTILINE)


class Code(NamedTuple):
    """What the second node is told, by a person."""

    volume: str
    address: str
    port: int
    fingerprint: bytes
    secret: bytes

    def __str__(self) -> str:
        body = msgpack.packb(list(self))
        return _PREFIX + base64.b32encode(body + _check(body)).decode().rstrip("=").lower()


def parse_code(text: str) -> Code:
    """The code that a person has given; UsageError if it is none, or not all of it."""
    text = text.strip()
    try:
        if not text.startswith(_PREFIX):
            raise ValueError("no prefix")
        letters = text[len(_PREFIX) :].upper()
        decoded = base64.b32decode(letters + "=" * (-len(letters) % 8))
        body, check = decoded[:-_CHECK_BYTES], decoded[-_CHECK_BYTES:]
        if check != _check(body):
            raise ValueError("damaged")
        volume, address, port, digest, secret = msgpack.unpackb(body)
        return Code(str(volume), str(address), int(port), bytes(digest), bytes(secret))
    except (ValueError, TypeError, binascii.Error, msgpack.UnpackException):
        raise UsageError("this is no code of `mirrorfs init`, or not all of it: copy the whole of what it printed") from None


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]


# ---- the first node


def prepare(volume: str, file: Path | None, node: str | None, address: str | None, port: int, mount: Path | None) -> Config:
    """The configuration of the first node, made if there is none; its keys are made too.

    Raises ConfigError for a file that is there and wrong, UsageError if the address is not known, MirrorfsError.
    """
    path = file or configuration.DIRECTORY / f"{volume}.toml"
    if not path.exists():
        name = node or _host_name()
        lines = [
            "# Made by `mirrorfs init`; the same on both nodes, but for `node`. All keys: docs/CONFIGURATION.md",
            f"volume = {_toml(volume)}",
            f"node = {_toml(name)}",
            *([f"mount = {_toml(str(mount))}"] if mount else []),
            "",
            f"[nodes.{_toml(name)}]",
            f"address = {_toml(address or _only_address())}",
        ]
        if port != configuration.DEFAULT_PORT:
            lines.append(f"port = {port}")
        loaded = _write_and_load(path, "\n".join(lines) + "\n", name)
    else:
        loaded = configuration.load(path, node)
        for option, given, has in (
            ("--mount", mount, loaded.mount),
            ("--address", address, loaded.node.address),
            ("--port", port if port != configuration.DEFAULT_PORT else None, loaded.node.port),
        ):
            if given is not None and given != has:
                raise UsageError(f"{option} {given}: {path} is there already and says {has or 'nothing'}: change it there")
    if loaded.volume != volume:
        raise ConfigError(f"{path}: is of the volume {loaded.volume!r}, not of {volume!r}")
    Trust(loaded.node.keys).make(loaded.node.name)
    return loaded


@dataclass(slots=True)
class Invitation:
    """The first node, while it waits for the second one. `joined` is the name of that, once it is here.

    `sections` is TOML that the configuration has from then on, too: what only a pair can have.
    """

    config: Config
    sections: str = ""
    secret: bytes = field(default_factory=partial(secrets.token_bytes, _SECRET_BYTES))
    joined: str = ""
    _wrong: int = 0
    _guests: int = 0
    _done: trio.Event = field(default_factory=trio.Event)

    def check(self) -> None:
        """ConfigError if the file could not have another node beside what it says and the sections, whichever that is."""
        try:
            self._text("other" if self.config.node.name != "other" else "another", "other.invalid")
        except ConfigError as error:
            raise ConfigError(
                f"{error}; so it would be with the other node in it: name both there before `mirrorfs init`"
            ) from None

    async def wait(self, seconds: float, *, task_status: trio.TaskStatus[Code]) -> None:
        """Wait for the second node; MirrorfsError if it did not come, or somebody guessed at the secret."""
        trust = Trust(self.config.node.keys)
        listener = await self._listen()
        address, port, *_ = listener.socket.getsockname()
        digest = bytes.fromhex(fingerprint(trust.identity.read_bytes()))[:_FINGERPRINT_BYTES]
        context = trust.introducing()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                serve = partial(self._serve, context)
                nursery.start_soon(partial(trio.serve_listeners, serve, [listener]))
                task_status.started(Code(self.config.volume, str(address), int(port), digest, self.secret))
                await self._done.wait()
                nursery.cancel_scope.cancel()
        if not self.joined:
            why = "somebody has tried wrong codes" if self._wrong else f"no node has joined within {seconds / 60:g} minutes"
            raise MirrorfsError(f"{why}: the code is good no more, `mirrorfs init {self.config.volume}` makes another one")

    async def _listen(self) -> trio.SocketListener:
        own = self.config.node
        for port in (own.port, 0):  # the mount has its port while it runs
            try:
                (listener,) = await trio.open_tcp_listeners(port, host=own.address)
            except OSError as error:
                trouble = error
            else:
                return listener
        raise MirrorfsError(f"cannot listen on {own.address} ({trouble.strerror}): is it an address of this machine?")

    async def _serve(self, context: ssl.SSLContext, plain: trio.SocketStream) -> None:
        if self._guests >= _MAX_GUESTS:
            await plain.aclose()
            return
        self._guests += 1
        stream, host = trio.SSLStream(plain, context, server_side=True), "somebody"
        try:
            host = str(plain.socket.getpeername()[0])
            with trio.fail_after(_ANSWER_S):
                answer = self._answer(json.loads(await _line(stream)), host)
                await stream.send_all(json.dumps(answer).encode() + b"\n")
                await stream.aclose()
        except (
            *(trio.TooSlowError, trio.BrokenResourceError, OSError),
            *(ValueError, TypeError, KeyError, AttributeError, RecursionError),
        ) as error:
            log.warning("%s: wanted to join, and made no sense: %r", host, error)
        finally:
            self._guests -= 1
            if self.joined or self._wrong >= _MAX_WRONG:
                self._done.set()  # also if the answer did not arrive: the code was used
            await trio.aclose_forcefully(stream)

    def _answer(self, asked: dict[str, Any], host: str) -> dict[str, Any]:
        if self.joined or not hmac.compare_digest(bytes.fromhex(asked["secret"]), self.secret):
            self._wrong += not self.joined
            return {"error": "the code is wrong, or was used already"}
        name, identity = str(asked["node"]), str(asked["identity"]).encode()
        peer = self.config.peer
        if name == self.config.node.name:
            return {"error": f"this node is named {name!r} too: give the other one with --node NAME"}
        if peer is not None and name != peer.name:
            return {"error": f"the other node of {self.config.file} is {peer.name!r}: join as that one, with --node"}
        address = str(asked["address"] or host)
        try:
            text = self._text(name, address)
            Trust(self.config.node.keys).pin(identity)
            if peer is None:
                config_file.write(self.config.file, text)
        except MirrorfsError as error:
            return {"error": str(error)}
        self.joined = name
        return {
            "volume": self.config.volume,
            "node": self.config.node.name,
            "config": text,
            "identity": Trust(self.config.node.keys).identity.read_text(),
        }

    def _text(self, name: str, address: str) -> str:
        """The file with both nodes; ConfigError if it would not be one."""
        text = self.config.file.read_text()
        if self.config.peer is not None:
            return text
        port = self.config.node.port
        text += f"\n[nodes.{_toml(name)}]\naddress = {_toml(address)}\n"
        text += f"port = {port}\n" if port != configuration.DEFAULT_PORT else ""
        text += f"\n{self.sections}" if self.sections else ""
        config_file.check(self.config.file, text, self.config.node.name)
        return text


# ---- the second node


def _without_node(text: str) -> str:
    """The file without the line that says which node it is read as; a table may have a key of that name."""
    table = re.search(r"^\s*\[", text, re.MULTILINE)
    end = table.start() if table else len(text)
    return _NODE_KEY.sub("", text[:end], count=1) + text[end:]


async def join(code: Code, file: Path | None, node: str | None, address: str | None) -> Config:
    """Join the node that gave the code: afterwards this node has its configuration and keys.

    Raises MirrorfsError if that node cannot be reached, is another one, or refuses; ConfigError for a file that is there and
    says something else.
    """
    name = node or _host_name()
    path = file or configuration.DIRECTORY / f"{code.volume}.toml"
    keys = configuration.default_keys(code.volume, name)
    if path.exists():
        there = configuration.load(path, node)
        if there.volume != code.volume:
            raise ConfigError(f"{path}: is of the volume {there.volume!r}, the code of {code.volume!r}")
        name, keys = there.node.name, there.node.keys
    try:
        with trio.fail_after(_ANSWER_S):
            plain = await trio.open_tcp_stream(code.address, code.port)
    except (OSError, trio.TooSlowError) as error:
        why = str(error) or "no answer"
        raise MirrorfsError(
            f"{code.address} port {code.port}: cannot be reached ({why}): does `mirrorfs init` wait there, is the port open?"
        ) from None
    own = address or str(plain.socket.getsockname()[0])
    stream = trio.SSLStream(plain, _unverified(), server_hostname=None)
    try:
        with trio.fail_after(_ANSWER_S):
            await stream.do_handshake()
            met = ssl.DER_cert_to_PEM_cert(stream.getpeercert(binary_form=True)).encode()
            if not hmac.compare_digest(bytes.fromhex(fingerprint(met))[:_FINGERPRINT_BYTES], code.fingerprint):
                raise MirrorfsError(f"{code.address}: is not the node that gave the code, nothing was told to it")
            # Nothing of this machine is changed before the other node has said yes; its keys alone are made.
            trust = Trust(keys)
            trust.make(name)
            request = {"secret": code.secret.hex(), "node": name, "address": own, "identity": trust.identity.read_text()}
            await stream.send_all(json.dumps(request).encode() + b"\n")
            answer = json.loads(await _line(stream))
    except (trio.TooSlowError, trio.BrokenResourceError, OSError, ValueError) as error:
        raise MirrorfsError(f"{code.address}: did not answer as a mirrorfs node does ({error!r})") from None
    finally:
        await trio.aclose_forcefully(stream)
    if "error" in answer:
        raise MirrorfsError(f"{code.address}: {answer['error']}")
    if not path.exists():
        loaded = _write_and_load(path, f"node = {_toml(name)}\n" + _without_node(str(answer["config"])), name)
    else:
        loaded = configuration.load(path, name)
    if loaded.peer is None or loaded.peer.name != answer["node"]:
        raise ConfigError(f"{path}: the other node is named {answer['node']!r}, add it as [nodes.{_toml(str(answer['node']))}]")
    Trust(loaded.node.keys).pin(str(answer["identity"]).encode())
    return loaded


async def _line(stream: trio.SSLStream[trio.SocketStream]) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = await stream.receive_some(1 << 16)
        if not more or len(data) > _MAX_LINE:
            raise ValueError("it hung up" if not more else "it said too much")
        data += more
    return data


def _unverified() -> ssl.SSLContext:
    """For whom the code is the proof: what is met is compared with it by the caller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# ---- what both need


def _host_name() -> str:
    return socket.gethostname().partition(".")[0]


def _only_address() -> str:
    """The address of this machine; UsageError if it has several."""
    with IPRoute() as route:
        found = [dict(message["attrs"])["IFA_ADDRESS"] for message in route.get_addr() if message["scope"] == _GLOBAL_SCOPE]
    if len(found) == 1:
        return str(found[0])
    listed = ", ".join(map(str, found)) or "there is none yet"
    raise UsageError(f"which address shall the other node connect to? Give it with --address: {listed}")


def _toml(text: str) -> str:
    # A JSON string is a TOML string, as long as no surrogate pairs are written.
    return json.dumps(text, ensure_ascii=False)


def _write_and_load(path: Path, text: str, node: str) -> Config:
    """A file that is new."""
    config_file.check(path, text, node)
    config_file.write(path, text)
    return configuration.load(path, node)
