"""What a moment looks like to Prometheus, in its text format. docs/MONITORING.md lists the metrics."""

import datetime
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mirrorfs import __version__
from mirrorfs.console.picture import Seen, protection
from mirrorfs.core.controller import Posture

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
STATES: Final = ("primary", "solo", "standby", "resyncing", "waiting", "stopped", "hung")


def text(seen: Seen) -> bytes:
    """All metrics of this moment."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Moment(seen))
    return generate_latest(registry)


class _Moment(Collector):
    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def collect(self) -> Iterator[Metric]:
        seen = self._seen
        info = {"version": __version__, "volume": str((seen.status or {}).get("volume", "")), "node": seen.node}
        yield InfoMetricFamily("mirrorfs_node", "Which node this is.", value=info)
        yield _states("mirrorfs_state", "What the mount of this node is.", STATES, seen.state)
        postures = tuple(str(posture) for posture in Posture)
        yield _states("mirrorfs_posture", "What the controller of this node does.", postures, str(seen.controller["posture"]))
        level, _ = protection(seen)
        yield _gauge("mirrorfs_protected", "1 if every write is on both nodes before it returns.", level == "good")
        yield _gauge("mirrorfs_mount_up", "1 if the mount of this node answers.", seen.status is not None)
        yield from _of_controller(seen.controller)
        if seen.status is not None:
            yield from _of_status(seen.status)
        if seen.measures is not None:
            yield from _of_measures(seen.measures)


def _of_controller(controller: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("mirrorfs_peer_heard", "1 if the other controller is heard.", controller["peer"]["heard"])
    yield _gauge("mirrorfs_maintenance", "1 if nothing is done automatically.", controller["maintenance"])
    yield _gauge("mirrorfs_services_up", "1 if the services run here.", controller["services"] == "up")
    yield _gauge("mirrorfs_addresses_up", "1 if the virtual addresses are here.", controller["addresses"] == "up")
    yield _gauge(
        "mirrorfs_failovers_left", "So many automatic failovers before the controller holds.", controller["failovers_left"]
    )
    networks = GaugeMetricFamily("mirrorfs_network_up", "1 if heartbeats come over this network.", labels=["network"])
    for network, up in controller["networks"].items():
        networks.add_metric([network], float(up))
    yield networks


def _of_status(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("mirrorfs_epoch", "The number of the epoch.", status["epoch"])
    yield _gauge("mirrorfs_link_up", "1 if the other node is connected.", status["peer"]["state"] != "disconnected")
    yield _gauge("mirrorfs_frozen", "1 if writes wait.", status["frozen"])
    yield _gauge("mirrorfs_split_brain", "1 in split brain.", bool(status.get("split_brain")))
    yield _gauge("mirrorfs_paused", "1 if the replication is paused.", bool(status.get("paused")))
    yield _gauge("mirrorfs_warning", "1 if `mirrorfs status` has a warning.", bool(status.get("warning")))
    yield _gauge("mirrorfs_open_files", "What applications have open here.", status["open_files"])
    if status["dirty_bytes"] is not None:
        yield _gauge("mirrorfs_dirty_bytes", "What the other node may not durably have.", status["dirty_bytes"])
    resync = status.get("resync")
    yield _gauge("mirrorfs_resync_running", "1 while a node is brought up to date.", bool(resync))
    if resync:
        yield _gauge("mirrorfs_resync_done_bytes", "How far the resync is.", resync["bytes_done"])
        yield _gauge("mirrorfs_resync_size_bytes", "How much the resync has to bring over or compare.", resync["bytes_total"])
    verify = status.get("verify") or {}
    yield _gauge("mirrorfs_verify_running", "1 while both trees are compared.", bool(verify.get("running")))
    if last := verify.get("last"):
        yield _gauge("mirrorfs_verify_differences", "What the last verify found.", last["found"])
        ended = datetime.datetime.fromisoformat(last["ended"]).timestamp()
        yield _gauge("mirrorfs_verify_last_ended_timestamp_seconds", "When the last verify ended.", ended)
    arbiter = status.get("arbiter") or {"kind": "none"}
    if arbiter["kind"] != "none":
        yield _gauge("mirrorfs_arbiter_up", "1 if the arbiter answers.", arbiter["answers"])


def _of_measures(measures: Mapping[str, Any]) -> Iterator[Metric]:
    for name, what in (
        ("written_bytes", "Bytes that applications have written."),
        ("changes", "Changes of the file system."),
        ("syncs", "Syncs that applications have asked for."),
    ):
        key = "bytes_written" if name == "written_bytes" else name
        yield CounterMetricFamily(f"mirrorfs_{name}", what, value=measures[key])
    latency = HistogramMetricFamily(
        "mirrorfs_latency_seconds",
        "What an application waits for (total), and what of it: this node (local), the way (wire), the other node (peer). "
        "One of seven changes is measured, and every sync.",
        labels=["operation", "part"],
    )
    bounds = [*(f"{bound:g}" for bound in measures["bounds_s"]), "+Inf"]
    for operation, parts in measures["latency"].items():
        for part, histogram in parts.items():
            buckets = list(zip(bounds, map(float, accumulate(histogram["counts"])), strict=True))
            latency.add_metric([operation, part], buckets, histogram["sum_s"])
    yield latency


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, value=float(value))


def _states(name: str, what: str, states: tuple[str, ...], now: str) -> StateSetMetricFamily:
    return StateSetMetricFamily(name, what, value={state: state == now for state in states})
