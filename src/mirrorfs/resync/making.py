"""What both kinds of resync do at the target: make files as the source has them, and set aside what is in their way."""

import errno
import logging
import os
import shutil
import stat
from contextlib import suppress

import trio

from mirrorfs import backing
from mirrorfs.core import operations as ops
from mirrorfs.core.dirty import BLOCK
from mirrorfs.table import Known
from mirrorfs.tree import Tree

log = logging.getLogger(__name__)


class Maker:
    """Makes files, and moves others into `orphans`, a directory descriptor, under numbers from `count` on."""

    def __init__(self, tree: Tree, orphans: int) -> None:
        self.tree = tree
        self.orphans = orphans
        self.count = 0

    def make(self, entry: ops.Entry) -> Known:
        """Make a file that is not here."""
        self.tree.table.unbind(entry.file)
        if stat.S_ISLNK(entry.mode):
            known: Known = self.tree.apply(
                ops.Symlink(entry.parent, entry.name, entry.file, entry.target, entry.uid, entry.gid)
            )
        else:
            known = self.tree.apply(
                ops.MakeNode(entry.parent, entry.name, entry.file, entry.mode, entry.uid, entry.gid, entry.rdev)
            )
            if entry.size:
                self.resize(known, entry.size)
        self.attributes(known, entry)
        return known

    def attributes(self, known: Known, wanted: ops.Entry | ops.Refresh) -> None:
        """Give a file the owner, mode and extended attributes that it has at the source."""
        xattrs = dict(wanted.xattrs)
        for name in self.tree.xattrs(known):
            if name not in xattrs:
                self.tree.apply(ops.RemoveXattr(known.id, name))
        status = self.tree.stat(known)
        if (status.st_uid, status.st_gid) != (wanted.uid, wanted.gid):
            self.tree.apply(ops.SetAttributes(known.id, uid=wanted.uid, gid=wanted.gid))
            status = self.tree.stat(known)  # chown(2) clears special bits
        if not stat.S_ISLNK(wanted.mode) and stat.S_IMODE(status.st_mode) != stat.S_IMODE(wanted.mode):
            self.tree.apply(ops.SetAttributes(known.id, mode=wanted.mode))
        for name, value in xattrs.items():
            self.tree.apply(ops.SetXattr(known.id, name, value))

    def resize(self, known: Known, size: int) -> None:
        """Give a file its size."""
        self.tree.apply(ops.SetAttributes(known.id, size=size))
        self._leave_to_checkpoint(known)

    def copy_data(self, change: ops.CopyData) -> None:
        """Put a piece of the copy into its file."""
        written = self.tree.apply(ops.Write(change.file, change.offset, change.data))
        if written < len(change.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._leave_to_checkpoint(self.tree.table.get(change.file))

    @staticmethod
    def _leave_to_checkpoint(known: Known) -> None:
        """The checkpoint at the end makes it durable and learns of every error: its descriptor need not be kept for that."""
        known.synced = known.version

    def copy_hole(self, hole: ops.CopyHole) -> None:
        """Make a hole in a file."""
        known = self.tree.table.get(hole.file)
        known.version += 1
        end = hole.offset + hole.size
        if end >= self.tree.stat(known).st_size:
            end += -end % BLOCK  # or the last block would stay, with zeros in it
        backing.allocate(self.tree.table.data(known), ops.PUNCH_HOLE | ops.KEEP_SIZE, hole.offset, end - hole.offset)
        self._leave_to_checkpoint(known)

    def set_aside(self, directory: Known, name: bytes) -> bytes:
        """Move what stands under a name into `orphans`; returns its name there."""
        self.count += 1
        fresh = b"%d" % self.count
        os.rename(name, fresh, src_dir_fd=self.tree.table.descriptor(directory), dst_dir_fd=self.orphans)
        return fresh

    async def clean_up(self) -> None:
        """The resync is complete and a new era has begun: what waits in `orphans` goes, and what nobody needs in the table."""
        for count, known in enumerate(self.tree.table.all()):
            self.tree.table.drop_unused(known)
            if count % 1000 == 999:
                await trio.lowlevel.checkpoint()
        try:
            await trio.to_thread.run_sync(empty_orphans, self.orphans)
        except OSError as error:
            log.warning("cannot delete what the resync has set aside: %s", error)


def empty_orphans(orphans: int) -> None:
    """Delete what a resync has set aside. Blocks: call it from a worker thread."""
    for name in os.listdir(orphans):
        try:
            os.unlink(name, dir_fd=orphans)
        except IsADirectoryError:
            with suppress(FileNotFoundError):
                shutil.rmtree(name, dir_fd=orphans)
