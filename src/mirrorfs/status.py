"""What `mirrorfs status` says: the node as it is, in plain values."""

import time
from typing import Any

from mirrorfs import pausing
from mirrorfs.core.epochs import Standing
from mirrorfs.core.modes import Mode
from mirrorfs.node import Node
from mirrorfs.resync.progress import Progress
from mirrorfs.standby import Standby


def describe(node: Node) -> dict[str, Any]:
    """The node as it is now. `epoch` is 0 before the volume is made; sizes are bytes; `since` is local time with its offset."""
    record = node.keeper.record
    status: dict[str, Any] = {
        "volume": node.config.volume,
        "node": node.config.node.name,
        "state": node.state,
        "epoch": record.epoch.number if record.epoch else 0,
        "in_sync": _in_sync(node),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(node.since)),
        "reason": node.split_brain or node.reason,
        "frozen": node.primary is not None and node.primary.mode in (Mode.FROZEN, Mode.LOST),
        "dirty_bytes": node.activity.dirty.dirty_bytes,
        "dirty_names": node.activity.dirty.dirty_names,
        "peer": _peer(node),
        "open_files": len(node.operations.handles),
        "verify": node.verifier.describe(),
        "arbiter": node.arbitration.describe(),
        "differences": node.differences,
    }
    if node.warning:
        status["warning"] = node.warning
    if node.split_brain:
        status["split_brain"] = node.split_brain
        status["sides"] = node.split.sides()
    if (pause := node.pausing.pause) is not None:
        status["paused"] = pausing.describe(pause)
    if record.epoch is not None:
        status["epoch_tag"], status["primary"] = record.epoch.tag, record.epoch.primary
        status["epochs"] = [[epoch.number, epoch.primary, epoch.began] for epoch in record.epochs[-5:]]
    if node.primary is not None:
        status["settled"] = node.primary.settled
        copier = node.primary.copier
        if copier is not None:
            progress = copier.progress
            status["dirty_bytes"] = max(status["dirty_bytes"], progress.bytes_total - progress.bytes_done)
            status["resync"] = progress.describe()
    elif node.standby is not None and not node.standby.in_sync:
        status["resync"] = _as_the_source_says(node, node.standby)
    return status


def _as_the_source_says(node: Node, standby: Standby) -> dict[str, Any]:
    """The resync of this node: the source knows how much is to be done, and says so every second."""
    progress = node.peer_progress or Progress.of(
        standby.kind,
        bytes_done=standby.bytes_copied,
        bytes_found=0,
        files_done=0,
        files_found=0,
        totals_are_known=False,
        rate=None,
    )
    return {**progress.describe(), "bytes_received": standby.bytes_copied}


def _in_sync(node: Node) -> list[str]:
    """The in-sync set as this node knows it; a node that knows itself behind is not in it."""
    record = node.keeper.record
    if record.epoch is None:
        return []
    names = {member.node for member in record.epoch.in_sync}
    if record.standing is not Standing.IN_SYNC:
        names.discard(node.config.node.name)
    return sorted(names)


def _peer(node: Node) -> dict[str, Any]:
    if node.config.peer is None:
        return {"name": None, "state": "none"}
    state = "disconnected"
    if node.link is not None:
        state = "connected"
        if node.primary is not None:
            state = "standby" if node.peer_joined else "resyncing" if node.primary.copier is not None else "connected"
        elif node.standby is not None:
            state = "primary"
    peer: dict[str, Any] = {"name": node.config.peer.name, "state": state}
    if node.link is not None:
        peer["bytes_sent"] = node.link.bytes_sent
        peer["protocol"] = node.link.version
        if node.peer_version:
            peer["version"] = node.peer_version
    return peer
