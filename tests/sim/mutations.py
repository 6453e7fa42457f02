"""What the simulator must find: each mutation takes one step of safety away (`python -m tests.sim --mutate`)."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

import trio

from mirrorfs import arbitration as arbitration_room
from mirrorfs.activity import Activity
from mirrorfs.arbitration import Arbitration, Grant
from mirrorfs.core.epochs import Epoch, Member, Record
from mirrorfs.core.modes import Mode
from mirrorfs.errors import NoAnswerError
from mirrorfs.keeper import Keeper
from mirrorfs.notes import Notes
from mirrorfs.replication import Primary
from mirrorfs.resync.quick import CatchUp
from mirrorfs.standby import Standby
from mirrorfs.stream import Stream
from tests.sim.kernel import Kernel
from tests.sim.machine import Machine

Replacements = Callable[[], Iterable[tuple[Any, str, Any]]]


def _acknowledging_before_the_peer() -> Iterator[tuple[Any, str, Any]]:
    wait = Primary._acknowledged

    async def acknowledged(primary: Primary, sequence: int) -> None:
        if primary.mode is not Mode.MIRRORED:
            await wait(primary, sequence)

    yield Primary, "_acknowledged", acknowledged


def _dropping_the_dirty_generation_before_both_syncs() -> Iterator[tuple[Any, str, Any]]:
    flush = Standby._flush

    async def hasty(
        standby: Standby,
        sequence: int,
        read_at: float,
        sync: Callable[[], None],
        done: Callable[[], None] | None,
        checkpoint: int = 0,
    ) -> None:
        await flush(standby, sequence, read_at, (lambda: None) if checkpoint else sync, done, checkpoint)
        if checkpoint:
            await trio.to_thread.run_sync(sync)

    yield Standby, "_flush", hasty


def _making_no_durable_mark() -> Iterator[tuple[Any, str, Any]]:
    yield Activity, "_write", lambda activity, batch: None


def _not_recording_that_a_node_is_alone() -> Iterator[tuple[Any, str, Any]]:
    begin = Keeper.begin

    async def forgetful(keeper: Keeper, *arguments: Any, wrote: bool = False, **options: Any) -> Epoch:
        return await begin(keeper, *arguments, **options)

    async def note_written_alone(keeper: Keeper) -> None:
        epoch = keeper.record.epoch
        assert epoch is not None
        keeper.record = replace(keeper.record, wrote=keeper.record.wrote | {epoch.tag})

    yield Keeper, "begin", forgetful
    yield Keeper, "note_written_alone", note_written_alone


def _trusting_a_rebooted_member() -> Iterator[tuple[Any, str, Any]]:
    yield Machine, "boot", property(lambda machine: f"boot-{machine.name}")


def _placing_without_gathering() -> Iterator[tuple[Any, str, Any]]:
    async def put_gather(catch_up: CatchUp, *_: Any, **__: Any) -> None:
        pass

    yield CatchUp, "_put_gather", put_gather


def _joining_without_a_checkpoint() -> Iterator[tuple[Any, str, Any]]:
    join = Primary.join

    async def hasty(primary: Primary, peer: Member) -> bool:
        async def no_checkpoint(*_: Any, **__: Any) -> bool:
            return True

        with mock.patch.object(Primary, "checkpoint", no_checkpoint):
            return await join(primary, peer)

    yield Primary, "join", hasty


def _taking_housekeeping_for_a_change() -> Iterator[tuple[Any, str, Any]]:
    yield Stream, "awaited", property(lambda stream: stream.sent > stream.acknowledged)


def _not_counting_the_marks_of_the_peer() -> Iterator[tuple[Any, str, Any]]:
    yield Notes, "peer_marked", property(lambda notes: 0, lambda notes, count: None)


def _going_on_without_asking_the_arbiter() -> Iterator[tuple[Any, str, Any]]:
    yield Arbitration, "is_asked", property(lambda arbitration: False)


def _promoting_without_asking_the_arbiter() -> Iterator[tuple[Any, str, Any]]:
    claim = Arbitration.claim

    async def unasked(arbitration: Arbitration, *, force: bool = False, **options: Any) -> Grant | None:
        return await claim(arbitration, force=force, **options) if arbitration._node.primary is not None else None

    yield Arbitration, "claim", unasked


def _believing_the_record_to_say_so_already() -> Iterator[tuple[Any, str, Any]]:
    claim = Arbitration._claim

    async def believing(arbitration: Arbitration, arbiter: Any, **options: Any) -> Grant:
        found = await arbitration._read(arbiter)
        if found.epoch is not None and {member.node for member in found.epoch.in_sync} == {arbitration._node.name}:
            return Grant(found.epoch.number + 1, os.urandom(8).hex(), found.seen)
        return await claim(arbitration, arbiter, **options)

    yield Arbitration, "_claim", believing


def _overwriting_the_record_while_mirrored() -> Iterator[tuple[Any, str, Any]]:
    async def follows(primary: Primary) -> bool:
        return True

    yield arbitration_room, "_peer_follows", follows


def _asking_anew_with_a_tag_that_was_given_up() -> Iterator[tuple[Any, str, Any]]:
    yield Arbitration, "begin_anew", lambda arbitration: None


def _beginning_an_epoch_that_is_not_durable() -> Iterator[tuple[Any, str, Any]]:
    write = Keeper._write

    def unsynced(keeper: Keeper, fresh: Record) -> None:
        with mock.patch.object(Kernel, "fsync", return_value=None):
            write(keeper, fresh)

    yield Keeper, "_write", unsynced


def _going_on_although_nobody_answers() -> Iterator[tuple[Any, str, Any]]:
    claim = Arbitration.claim

    async def impatient(arbitration: Arbitration, **options: Any) -> Grant | None:
        try:
            return await claim(arbitration, **options)
        except NoAnswerError:
            return None

    yield Arbitration, "claim", impatient


@dataclass(frozen=True, slots=True)
class Mutation:
    """A step that is taken away, and the story that must notice."""

    replacements: Replacements
    story: str = "random"

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Run without that step."""
        with contextlib.ExitStack() as stack:
            for target, name, value in list(self.replacements()):
                stack.enter_context(mock.patch.object(target, name, value))
            yield


MUTATIONS: Final = {
    "acknowledging before the peer": Mutation(_acknowledging_before_the_peer),
    "dropping the dirty generation before both syncs": Mutation(
        _dropping_the_dirty_generation_before_both_syncs, "power_is_lost_in_the_middle_of_a_checkpoint"
    ),
    "making no durable mark": Mutation(_making_no_durable_mark),
    "not recording that a node is alone": Mutation(_not_recording_that_a_node_is_alone),
    "trusting a rebooted member": Mutation(_trusting_a_rebooted_member),
    "placing without gathering": Mutation(_placing_without_gathering),
    "joining without a checkpoint": Mutation(_joining_without_a_checkpoint),
    "not counting the marks of the peer": Mutation(
        _not_counting_the_marks_of_the_peer, "a_primary_is_restored_from_a_snapshot_of_after_its_last_checkpoint"
    ),
    "going on alone without asking the arbiter": Mutation(_going_on_without_asking_the_arbiter, "failover"),
    "promoting without asking the arbiter": Mutation(_promoting_without_asking_the_arbiter, "failover"),
    "believing the record to say so already": Mutation(_believing_the_record_to_say_so_already, "failover"),
    "asking anew with a tag that was given up": Mutation(_asking_anew_with_a_tag_that_was_given_up, "failover"),
    "overwriting the record while mirrored": Mutation(_overwriting_the_record_while_mirrored, "failover"),
    "going on although nobody answers": Mutation(_going_on_although_nobody_answers, "failover"),
    "beginning an epoch that is not durable": Mutation(_beginning_an_epoch_that_is_not_durable, "failover"),
    "taking housekeeping for a change": Mutation(
        _taking_housekeeping_for_a_change, "the_link_breaks_when_only_housekeeping_is_under_way"
    ),
}
