"""Room on a file system, for `statfs`."""

import os
from dataclasses import astuple, dataclass
from typing import Self

from mirrorfs.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Space:
    """Room in bytes and files; `available` is what ordinary users may use of what is free."""

    block_size: int
    total: int
    free: int
    available: int
    files: int
    files_free: int

    @classmethod
    def of(cls, status: os.statvfs_result) -> Self:
        """What statvfs(2) says."""
        size = status.f_frsize
        return cls(
            size,
            status.f_blocks * size,
            status.f_bfree * size,
            status.f_bavail * size,
            status.f_files,
            status.f_ffree,
        )

    def smaller(self, other: "Space") -> "Space":
        """What there is on both."""
        return Space(
            self.block_size,
            min(self.total, other.total),
            min(self.free, other.free),
            min(self.available, other.available),
            min(self.files, other.files),
            min(self.files_free, other.files_free),
        )

    def pack(self) -> list[int]:
        """As plain values, for msgpack."""
        return list(astuple(self))

    @classmethod
    def unpack(cls, content: object) -> Self:
        """What `pack` packed; ProtocolError if it is not that."""
        if not isinstance(content, list) or len(content) != 6 or not all(type(n) is int and n >= 0 for n in content):
            raise ProtocolError("a malformed SPACE")
        return cls(*content)
