"""What somebody may do on the console."""

from enum import StrEnum


class Role(StrEnum):
    """VIEW sees everything; OPERATE may also press the buttons."""

    VIEW = "view"
    OPERATE = "operate"

    def includes(self, other: "Role") -> bool:
        """Whether who has this role may do what the other may."""
        return self is Role.OPERATE or other is Role.VIEW
