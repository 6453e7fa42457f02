"""What a quick resync has brought over so far: should it end early, the next one need not begin again.

The marks of a file leave the source's dirty set when it is being brought over, and come back unless a checkpoint has made what
was sent durable on the target. What is changed meanwhile is marked as ever.
"""

from pyroaring import BitMap64

from mirrorfs.core.dirty import BLOCK, END, EXTENT, DirtySet, FileMarks, Generation


class Brought:
    """The marks that were taken out of `dirty`."""

    def __init__(self, dirty: DirtySet) -> None:
        self._dirty = dirty
        self._ended = False
        self._under_way: dict[int, FileMarks] = {}
        self._sent = Generation()
        self._at_checkpoint = Generation()

    def begin(self, number: int) -> None:
        """A file is being brought over, with all that its marks say until now."""
        self._under_way[number] = FileMarks() if self._ended else self._dirty.take(number)

    def sent(self, number: int, end: int, *, compared: bool) -> None:
        """Its dirty blocks, or its extents that had to be compared, have been sent up to this offset in bytes."""
        marks, done = self._under_way[number], BitMap64()
        if compared:
            done.add_range(0, end // EXTENT)
            self._sent.file(number).extents |= marks.extents & done
            marks.extents -= done
            if marks.tail < min(END, end // EXTENT):
                self._sent.file(number).tail = min(self._sent.file(number).tail, marks.tail)
                marks.tail = end // EXTENT
        else:
            done.add_range(0, end // BLOCK)
            self._sent.file(number).blocks |= marks.blocks & done
            marks.blocks -= done

    def end(self, number: int) -> None:
        """All of the file has been sent."""
        self._sent.file(number).add(self._under_way.pop(number))

    def begin_checkpoint(self) -> bool:
        """A checkpoint begins; False if nothing was sent that it would be for."""
        self._at_checkpoint.add(self._sent)
        self._sent = Generation()
        return bool(self._at_checkpoint)

    def end_checkpoint(self) -> None:
        """It is durable on the target."""
        self._at_checkpoint = Generation()

    def give_back(self) -> None:
        """The resync has ended early: what no checkpoint has made durable is dirty still, and what it takes up yet stays so."""
        self._ended = True
        for number, marks in self._under_way.items():
            self._dirty.now.file(number).add(marks)
        for generation in (self._sent, self._at_checkpoint):
            self._dirty.now.add(generation)
        self._under_way = {number: FileMarks() for number in self._under_way}  # `sent` and `end` may come still
        self._sent, self._at_checkpoint = Generation(), Generation()
