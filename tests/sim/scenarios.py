"""Named stories, each a thing that happens to real pairs. They are short, and run with any seed."""

import copy
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Final

import trio

from mirrorfs.core import operations as ops
from mirrorfs.errors import RefusedError
from tests.sim.application import found_on
from tests.sim.disk import ROOT
from tests.sim.pair import Pair
from tests.sim.world import World

Story = Callable[[World], Awaitable[None]]


async def the_survivor_crashes_after_the_peer_was_told_that_it_is_in_sync(world: World) -> None:
    """The primary alone, its peer comes back, and in the moment after JOIN was sent the primary is gone."""
    pair = Pair(world)
    await pair.up()
    await pair.write_for(1)
    pair.b.crash()
    await pair.solo(pair.a)
    await pair.write_for(1)
    pair.a.traps["sent:JOIN"] = world.dice.choice(("crash", "power"))
    await pair.b.start()
    await pair.down(pair.a)
    await pair.make_whole()
    await pair.quiet()


async def a_standby_that_lost_power_is_promoted(world: World) -> None:
    """It is refused, and by force it has all that was fsynced; the other comes back, and that is a split brain."""
    pair = Pair(world)
    await pair.up()
    await pair.write_for(1)
    pair.a.crash()
    pair.b.lose_power()
    await pair.b.start()
    await _expect_refusal(pair)
    await pair.promote(pair.b, force=True)
    await pair.write_for(1)
    await pair.a.start()
    await pair.until(lambda: bool(pair.b.node and pair.b.node.split_brain), "the split brain to be found")
    await pair.make_whole()
    await pair.quiet()


async def both_lose_power_just_after_the_resync(world: World) -> None:
    """What was fsynced alone is on both disks as soon as both are in sync."""
    pair = Pair(world)
    await pair.up()
    await pair.write_for(0.5)
    pair.b.crash()
    await pair.solo(pair.a)
    await pair.write_for(2)
    await pair.b.start()
    await pair.mirrored()
    for machine in (pair.a, pair.b):
        machine.lose_power()
    survivor = world.dice.choice((pair.a, pair.b))
    await survivor.start()
    try:
        await pair.promote(survivor)
    except RefusedError:
        await pair.promote(survivor, force=True)
    await pair.make_whole()
    await pair.quiet()


async def a_file_made_in_a_marked_directory_is_moved_out_and_power_is_lost(world: World) -> None:
    """The new file needs no mark of its own, wherever it is when the power goes."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.file(b"x", b"first")
    await application.file(b"x", b"moved")
    await application.rename(application.find(b"x", b"moved"), application.find(b"y"), b"moved", None)
    await application.sync(application.find(b"y", b"moved"))
    victim = world.dice.choice((pair.a, pair.b))
    victim.lose_power()
    if victim is pair.a:
        await pair.fail_over(pair.b)
    await pair.make_whole()
    await pair.quiet()


async def power_is_lost_in_the_middle_of_a_checkpoint(world: World) -> None:
    """What came before it stays dirty until both disks have it."""
    pair = Pair(world)
    await pair.up()
    await pair.write_for(1)
    await pair.checkpoint()
    victim = world.dice.choice((pair.a, pair.b))
    victim.traps["call:syncfs"] = "power"
    await pair.write_for(1)
    await pair.down(victim)
    if victim is pair.a:
        await pair.fail_over(pair.b)
    await pair.make_whole()
    await pair.quiet()


async def files_move_between_directories_in_the_other_order_than_the_resync_visits_them(world: World) -> None:
    """Each needs what the other still holds."""
    pair = Pair(world)
    application = await pair.furnished()
    for directory in (b"x", b"y", b"z"):
        await application.file(directory, b"one")
        await application.file(directory, b"two")
    await pair.checkpoint()
    pair.b.crash()
    await pair.solo(pair.a)
    for name in (b"one", b"two"):
        ring = [b"x", b"y", b"z"] if name == b"one" else [b"z", b"y", b"x"]
        await application.rename(application.find(ring[0], name), application.find(), name, None)
        for into, source in pairwise(ring):
            await application.rename(application.find(source, name), application.find(into), name, None)
        await application.rename(application.find(name), application.find(ring[-1]), name, None)
    await application.rename(application.find(b"x"), application.find(b"z"), b"x", None)
    await application.rename(application.find(b"y"), application.find(b"z", b"x"), b"y", None)
    await pair.b.start()
    await pair.make_whole()
    await pair.quiet()


async def two_forks_have_the_same_epoch_number(world: World) -> None:
    """Each side went on alone, from the same epoch to the same number. Both are kept, until a person chooses."""
    pair = Pair(world)
    await pair.up()
    await pair.write_for(0.5)
    world.network.cut("a", "b")
    world.network.cut("b", "a")
    await pair.solo(pair.a)
    await pair.until(lambda: pair.b.node is not None and not pair.b.node.connected, "the standby to notice")
    world.was_reckless = True
    await pair.promote(pair.b)
    for application in pair.applications:
        await application.quiet()  # or what it is about to do on one machine would be ended on the other
    for machine in (pair.a, pair.b):
        application = pair.applications[0] if machine is pair.a else pair.applications[1]
        application.use(machine)
        await application.make_directory(None, b"only on " + machine.name.encode())
    numbers = {machine.node.keeper.record.epochs[-1].number for machine in (pair.a, pair.b) if machine.node}
    assert len(numbers) == 1, numbers
    before = [machine.copy_of_data() for machine in (pair.a, pair.b)]
    world.network.heal()
    await pair.until(lambda: bool(pair.a.node and pair.a.node.split_brain), "the split brain to be found")
    for machine, image in zip((pair.a, pair.b), before, strict=True):
        assert machine.data.now.inodes[ROOT].entries == image.inodes[ROOT].entries
        assert b"only on " + machine.name.encode() in {path[1:] for path in found_on(machine).paths}
    await pair.make_whole()
    await pair.quiet()


async def a_file_is_copied_underneath_with_its_id(world: World) -> None:
    """`rsync -X` copies `trusted.mirrorfs` too: the copy must not be taken for the file."""
    pair = Pair(world)
    application = await pair.furnished()
    original = await application.file(b"x", b"original")
    await pair.checkpoint()
    await pair.b.stop()
    await pair.a.stop()
    disk = pair.a.data
    serial = disk.make(application.find(b"x").inode.serial, b"copy", original.inode.mode, original.inode.mtime_ns)
    source = disk.now.inodes[original.inode.serial]
    for block, data in source.blocks.items():
        disk.write(serial, block * 4096, data, source.mtime_ns)
    for name, value in source.xattrs.items():
        disk.step("xattr", serial, name, value, touches=(serial,))
    world.ledger_of(world.record_of(pair.a)).take_over(found_on(pair.a))
    await pair.a.start()
    await pair.promote(pair.a)
    application.use(pair.a)
    number = await application.look(b"x", b"copy")
    assert number != original.id
    world.ledger_of(pair.a.node.keeper.record).take_over(found_on(pair.a))  # type: ignore[union-attr]
    await application.write(application.find(b"x", b"copy"), 0, 3)
    await pair.b.start()
    await pair.make_whole()
    await pair.quiet()
    tree = found_on(pair.b)
    path = b"/" + application.name + b"/x/"
    assert tree.paths[path + b"copy"].blocks != tree.paths[path + b"original"].blocks


async def a_node_is_restored_from_a_snapshot(world: World) -> None:
    """It does not know what it has forgotten; its number, or that of its tree, says that it has."""
    pair = Pair(world)
    await pair.up()
    await pair.write_for(1)
    await pair.checkpoint()
    snapshot = pair.b.snapshot()
    await pair.write_for(1)
    await pair.checkpoint()
    pair.b.crash()
    pair.b.restore(snapshot, state=world.dice.random() < 0.5)
    if world.dice.random() < 0.5:
        await pair.solo(pair.a)
        await pair.write_for(0.5)
    await pair.b.start()
    await pair.make_whole()
    await pair.quiet()


async def a_primary_is_restored_from_a_snapshot_of_after_its_last_checkpoint(world: World) -> None:
    """What it did since as a primary is marked in no journal any more; the other node knows that there were more marks."""
    pair = Pair(world)
    application = await pair.furnished()
    snapshot = pair.a.snapshot()
    await application.file(b"y", b"f")
    pair.a.crash()
    pair.a.restore(snapshot, state=True)
    await pair.fail_over(pair.b)
    application.use(pair.b)
    if world.dice.random() < 0.5:
        await application.file(b"z", b"g")
    if world.dice.random() < 0.5:
        pair.b.crash()
        await pair.b.start()
        await pair.promote(pair.b)
    await pair.a.start()
    await pair.make_whole()
    await pair.quiet()


async def a_promotion_is_forced_past_a_node_that_comes_back(world: World) -> None:
    """What it acknowledged meanwhile is not overwritten: a split brain, and a person chooses."""
    pair = Pair(world)
    await pair.up()
    await pair.write_for(0.5)
    pair.b.crash()
    await pair.solo(pair.a)
    await pair.write_for(0.5)
    pair.a.crash()
    await pair.b.start()
    world.was_reckless = True
    try:
        await pair.promote(pair.b, yes=False, force=True)
    except RefusedError:
        await pair.promote(pair.b, force=True)
    await pair.write_for(0.5)
    kept = copy.deepcopy(found_on(pair.a).paths)
    await pair.a.start()
    await pair.until(lambda: bool(pair.b.node and pair.b.node.split_brain), "the split brain to be found")
    assert found_on(pair.a).paths.keys() == kept.keys()
    await pair.make_whole()
    await pair.quiet()


async def a_directory_is_set_aside_when_a_resync_breaks_off(world: World) -> None:
    """What the target tells of its marks next time leads to nothing that is in no tree."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.make_directory(application.find(b"x"), b"d")
    await pair.checkpoint()
    await application.create(application.find(b"x", b"d"), b"f")
    pair.a.crash()
    await pair.fail_over(pair.b)
    application.use(pair.b)
    await application.rename(application.find(b"x", b"d"), application.find(b"y"), b"d", None)
    await application.create(application.find(), b"new")
    await application.write(application.find(b"new"), 0, 8)
    pair.a.data.capacity_blocks = pair.a.data.used_blocks
    await pair.a.start()
    await pair.until(lambda: pair.a.node is not None and pair.a.node.setbacks > 0, "the resync to break off")
    pair.a.data.capacity_blocks = None
    await pair.mirrored()
    await pair.quiet()


async def a_file_loses_the_name_by_which_its_last_writer_knows_it(world: World) -> None:
    """It has another one: what its writer alone did to it is found by that."""
    pair = Pair(world)
    application = await pair.furnished()
    file = await application.file(b"x", b"f")
    await application.link(file, application.find(b"y"), b"g")
    for _ in range(3):  # the directories cool, and the file stays hot
        await pair.checkpoint()
        await application.write(application.find(b"x", b"f"), 0, 1)
    world.network.cut("a", "b")
    world.nursery.start_soon(application.write, application.find(b"x", b"f"), 1, 2)
    await trio.sleep(0.05)
    pair.a.crash()
    await pair.fail_over(pair.b)
    application.use(pair.b)
    await application.unlink(application.find(b"y", b"g"))
    pair.b.crash()
    world.network.heal()
    await pair.b.start()
    await pair.until(lambda: pair.b.node is not None, "b to be up")
    await pair.promote(pair.b)
    await pair.a.start()
    await pair.mirrored()
    await pair.quiet()


async def power_is_lost_just_after_the_volume_was_made(world: World) -> None:
    """The record says which volume it is; the tree must say so too."""
    pair = Pair(world)
    for machine in (pair.a, pair.b):
        await machine.start()
    await pair.until(lambda: pair.a.node is not None and pair.a.node.connected, "the first meeting")
    await pair.promote(pair.a)
    pair.a.lose_power()
    await pair.a.start()
    await pair.make_whole()
    await pair.quiet()


async def the_link_breaks_when_only_housekeeping_is_under_way(world: World) -> None:
    """Nobody waits for the peer: what the primary does not acknowledge alone is no side of a split brain."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.file(b"x", b"f")
    world.network.cut("a", "b")  # the modification times are told after this, and arrive nowhere
    world.network.cut("b", "a")
    await pair.solo(pair.a)
    await pair.fail_over(pair.b)
    application.use(pair.b)
    await application.write(application.find(b"x", b"f"), 0, 2)
    world.network.heal()
    await pair.until(lambda: pair.a.node is not None and pair.a.node.connected, "the nodes to meet")
    await pair.mirrored()
    await pair.quiet()
    if pair.primary is not pair.b:
        world.blame("the node that acknowledged nothing alone was followed")


async def a_standby_leads_before_it_hears_that_a_checkpoint_is_complete(world: World) -> None:
    """To its own log the files made since the one before are new; it has to mark what it does to them all the same."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.file(b"x", b"f")
    await application.make_directory(application.find(b"x"), b"d")
    assert pair.b.node is not None
    activity = pair.b.node.activity
    number = activity.dirty.head.number
    await pair.until(lambda: activity.dirty.head.number > number, "b's side of a checkpoint", look_s=0.0005)
    world.network.cut("a", "b")
    await pair.solo(pair.a)
    await pair.fail_over(pair.b)
    application.use(pair.b)
    await application.write(application.find(b"x", b"f"), 2, 3)
    await application.create(application.find(b"x", b"d"), b"g")
    world.network.heal()
    await pair.mirrored()
    await pair.quiet()


async def a_hole_is_made_by_half_when_the_disk_fails(world: World) -> None:
    """Nobody knows which half: the other node is brought to what stands there, whatever it is."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.file(b"x", b"one", sectors=32)
    await pair.checkpoint()
    pair.a.data.fails_to_punch = True
    mode = world.dice.choice((ops.PUNCH_HOLE | ops.KEEP_SIZE, ops.ZERO_RANGE, ops.ZERO_RANGE | ops.KEEP_SIZE))
    if await application.allocate(application.find(b"x", b"one"), mode, 4, 24):
        world.blame("a hole that was made by half was acknowledged")
    await pair.make_whole()
    await pair.quiet()


async def room_runs_out_in_the_middle_of_a_fallocate(world: World) -> None:
    """The file may have grown: by as much on both nodes, at once."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.file(b"x", b"one", sectors=5)
    pair.a.data.capacity_blocks = pair.a.data.used_blocks
    if await application.allocate(application.find(b"x", b"one"), 0, 0, 64):
        world.blame("room that is not there was given")
    if not pair.is_mirrored:
        world.blame("a full disk has cost the mirror")
    await pair.quiet()


async def a_write_fails_here_that_the_other_node_was_told_of(world: World) -> None:
    """The disk fills up between two looks at its room: the other node has the write, and gives it up again."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.file(b"x", b"one", sectors=4)
    if not await application.write(application.find(b"x", b"one"), 0, 1):
        world.blame("a write failed without need")
    pair.a.data.capacity_blocks = pair.a.data.used_blocks
    if await application.write(application.find(b"x", b"one"), 4, 64):
        world.blame("a write was acknowledged for which there was no room")
    if pair.is_mirrored:
        world.blame("the other node had not been told, or counts although it has more")
    pair.a.data.capacity_blocks = None
    await pair.make_whole()
    await pair.quiet()


async def the_disk_of_the_primary_fails_in_a_write(world: World) -> None:
    """The other node, which was told of the write, has everything: it takes over by itself."""
    pair = Pair(world)
    application = await pair.furnished()
    await application.file(b"x", b"one", sectors=4)
    pair.a.data.fails_to_write = True
    if await application.write(application.find(b"x", b"one"), 0, 1):
        world.blame("a write was acknowledged that failed here")
    await pair.until(lambda: pair.b.node is not None and pair.b.node.primary is not None, "the other node to take over")
    await pair.make_whole()
    await pair.quiet()


async def a_copy_is_made_only_of_what_the_other_node_has(world: World) -> None:
    """Not while it is brought over, and not from a file that has lost its name: there the kernel reads and writes. One sector
    at a time, which is copied in one piece."""
    pair = Pair(world)
    application = await pair.furnished()
    one, two = await application.file(b"x", b"one"), await application.file(b"x", b"two")
    if not await application.copy(one, 0, two, 4, 1):
        world.blame("a copy was refused without need")
    await application.unlink(one)
    two = application.find(b"x", b"two")
    if await application.copy(one, 0, two, 0, 1, looked_up=True):
        world.blame("what only one node has was copied")
    three = await application.file(b"y", b"three")
    pair.b.crash()
    await pair.solo(pair.a)
    if not await application.copy(three, 0, two, 0, 1) or not await application.copy(one, 0, two, 4, 1, looked_up=True):
        world.blame("a node that is alone refused a copy")
    for number in range(20):
        await application.file(b"z", b"more %d" % number, sectors=64)
    await pair.b.start()
    primary = pair.a.node.primary if pair.a.node is not None else None
    assert primary is not None
    await pair.until(lambda: primary.copier is not None, "the resync", look_s=0.001)
    if await application.copy(three, 2, two, 2, 1) and primary.copier is not None:
        world.blame("a copy was made while the other node was brought over")
    await pair.quiet()


async def _expect_refusal(pair: Pair) -> None:
    try:
        await pair.promote(pair.b)
    except RefusedError:
        return
    pair.world.blame("a node that lost its memory was promoted without force")


SCENARIOS: Final[dict[str, Story]] = {
    story.__name__: story
    for story in (
        the_survivor_crashes_after_the_peer_was_told_that_it_is_in_sync,
        a_standby_that_lost_power_is_promoted,
        both_lose_power_just_after_the_resync,
        a_file_made_in_a_marked_directory_is_moved_out_and_power_is_lost,
        power_is_lost_in_the_middle_of_a_checkpoint,
        files_move_between_directories_in_the_other_order_than_the_resync_visits_them,
        two_forks_have_the_same_epoch_number,
        a_file_is_copied_underneath_with_its_id,
        a_node_is_restored_from_a_snapshot,
        a_primary_is_restored_from_a_snapshot_of_after_its_last_checkpoint,
        a_promotion_is_forced_past_a_node_that_comes_back,
        a_directory_is_set_aside_when_a_resync_breaks_off,
        a_file_loses_the_name_by_which_its_last_writer_knows_it,
        power_is_lost_just_after_the_volume_was_made,
        the_link_breaks_when_only_housekeeping_is_under_way,
        a_standby_leads_before_it_hears_that_a_checkpoint_is_complete,
        a_hole_is_made_by_half_when_the_disk_fails,
        room_runs_out_in_the_middle_of_a_fallocate,
        a_write_fails_here_that_the_other_node_was_told_of,
        the_disk_of_the_primary_fails_in_a_write,
        a_copy_is_made_only_of_what_the_other_node_has,
    )
}
