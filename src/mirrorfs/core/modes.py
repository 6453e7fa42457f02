"""What an acknowledgement of the primary needs."""

from enum import Enum, auto


class Mode(Enum):
    """What an acknowledgement needs.

    MIRRORED  the peer's acknowledgement
    ALONE     that this epoch's record says so durably (and that it says that something was acknowledged in it)
    LOST      nothing is acknowledged: the peer is gone and the record does not say so yet
    FROZEN    nothing is acknowledged and nothing begins: a handover, or `on_peer_loss = "freeze"`
    ENDED     this node is not the primary any more
    """

    MIRRORED = auto()
    ALONE = auto()
    LOST = auto()
    FROZEN = auto()
    ENDED = auto()
