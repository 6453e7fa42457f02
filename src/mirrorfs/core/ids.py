"""The layout of a file's id, which is also the inode number that applications see.

    bit 63   0 (a set bit marks a provisional number that only one node's kernel knows)
    62..39   epoch in which the file was made (24 bits)
    38       node that made it: 0 for the first name in the configuration's order, 1 for the second
    37..0    counter, reserved durably in blocks and never used twice (274 thousand million files an epoch)

Ids grow over the life of a volume, since a later primary has a later epoch; the root of every volume is 1, as FUSE wants it.
"""

from typing import Final

ROOT: Final = 1
EPOCH_BITS: Final = 24
COUNTER_BITS: Final = 38
PROVISIONAL: Final = 1 << 63
#: How many ids one durable write of the journal reserves.
BLOCK: Final = 1 << 16


def make(epoch: int, node_bit: int, counter: int) -> int:
    """The id of the `counter`-th file made by node `node_bit` (0 or 1) in `epoch`."""
    assert node_bit in (0, 1), node_bit
    assert 0 <= counter < 1 << COUNTER_BITS, counter
    return (epoch % (1 << EPOCH_BITS)) << (COUNTER_BITS + 1) | node_bit << COUNTER_BITS | counter


def epoch_of(number: int) -> int:
    """The epoch in which a file with this id was made, as far as an id tells (24 bits)."""
    return number >> (COUNTER_BITS + 1)


def is_provisional(number: int) -> bool:
    """Whether `number` stands for a file that has no id of this volume (seen on a node that may not give ids)."""
    return bool(number & PROVISIONAL)
