"""The failover controller of one node, as a table: what it does next, given what it sees.

A controller has a *posture*: what it is doing about the application on its node. Whenever it looks, the first rule of its
posture whose condition holds is taken, until none does. It decides when to ask for a change of roles and never whether that
is safe: the mount does (DESIGN, section 3), so that a controller that is wrong costs availability and no data.

The table is the documentation: docs/FAILOVER.md is made from it (`python -m tests.unit.controller_table --write`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Final


class Posture(StrEnum):
    """What a controller is doing about the application on its node."""

    IDLE = "idle"
    ASKING = "asking"
    TAKING = "taking"
    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
    YIELDING = "yielding"
    GIVING = "giving"
    HELD = "held"


class Mount(StrEnum):
    """What the mount of a node is, as its controller sees it."""

    STOPPED = "stopped"
    HUNG = "hung"
    WAITING = "waiting"
    FROZEN = "frozen"
    BEHIND = "resyncing"
    FOLLOWS = "standby"
    LEADS = "leading"


class Services(StrEnum):
    """What the services of a node are, all together."""

    DOWN = "down"
    STARTING = "starting"
    UP = "up"
    FAILED = "failed"
    STOPPING = "stopping"


class Do(Enum):
    """What a rule has done. The application's two are begun and end by themselves, as `View.services` tells."""

    START = auto()  # the services in their order, the addresses once they answer
    STOP = auto()  # the addresses first, then the services in the reverse order
    PROMOTE = auto()  # ask the mount for the role of a primary that is lost
    TAKE_OVER = auto()  # ask the mount for the role of a primary that is there
    HAND_OVER = auto()  # ask the mount to give the role to the other node
    COUNT = auto()  # one more failover
    FORGET = auto()  # what a person had asked for


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds.

    `detection_s`: a silence after which the other node is lost. `freeze_s`: how long a frozen mount may keep its addresses.
    `orphan_s`: how long a primary may be without its controller. `ask_s`: how long the other node may take to give the role.
    `retry_s`: between two promotions that are refused. `settle_s`: within which a node that has given the role follows.
    """

    detection_s: float = 3.0
    freeze_s: float = 1.0
    orphan_s: float = 15.0
    ask_s: float = 120.0
    retry_s: float = 1.0
    settle_s: float = 15.0


@dataclass(frozen=True, slots=True)
class View:
    """What a controller sees. Times are seconds since something began, 0 while it is not so.

    `linked`: this node's mount and the other's are connected. `silent_s`: since anything was heard of the other controller.
    `peer_*` are what that last said. `told_to_*`: a person's word, here or there. `refused`: what the mount answered to the
    request of this posture was no; `answered_s`: since it answered at all. `unwell`: a service was restarted as often as it
    may be.
    """

    mount: Mount = Mount.STOPPED
    services: Services = Services.DOWN
    unlinked_s: float = 0.0
    frozen_s: float = 0.0
    silent_s: float = 0.0
    peer_mount: Mount = Mount.STOPPED
    peer_posture: Posture = Posture.IDLE
    told_to_take: bool = False
    told_to_give: bool = False
    peer_refuses: bool = False
    released: bool = False
    maintenance: bool = False
    may_fail_over: bool = True
    prefers: bool = False
    unwell: bool = False
    refused: bool = False
    in_posture_s: float = 0.0
    answered_s: float = 0.0
    limits: Limits = Limits()

    @property
    def linked(self) -> bool:
        """Whether both mounts are connected."""
        return self.unlinked_s == 0

    @property
    def hears(self) -> bool:
        """Whether the other controller is there."""
        return self.silent_s < self.limits.detection_s

    @property
    def peer_is_lost(self) -> bool:
        """Whether the other node does not serve any more: its mount is gone, or all of it is."""
        if self.linked:
            return False
        if not self.hears:
            return True
        if self.peer_mount in (Mount.STOPPED, Mount.HUNG):
            return True  # its own controller says so: at once
        return self.peer_mount in (Mount.WAITING, Mount.FROZEN) and self.unlinked_s >= self.limits.detection_s

    @property
    def peer_can_take(self) -> bool:
        """Whether the other node could have the role now."""
        return self.linked and self.hears and self.peer_mount is Mount.FOLLOWS and self.peer_posture is not Posture.HELD

    @property
    def peer_can_soon(self) -> bool:
        """Whether the other node may be on its way to where it could have the role, as one that has just given it is.

        Its last word may be from before that: that it leads, or follows with the mounts not connected again.
        """
        is_there = self.hears and self.peer_mount not in (Mount.STOPPED, Mount.HUNG) and self.peer_posture is not Posture.HELD
        return is_there and self.in_posture_s < self.limits.settle_s

    @property
    def is_orphaned(self) -> bool:
        """Whether the primary's controller has been gone for long while this node had nothing to do.

        Where only the heartbeats are lost, both ways, the nodes would else take the role from each other at once.
        """
        silent_s = min(self.silent_s, self.in_posture_s)
        return self.mount is Mount.FOLLOWS and self.linked and silent_s >= self.limits.orphan_s

    @property
    def may_ask_again(self) -> bool:
        """Whether the last refusal is long enough ago."""
        return self.in_posture_s >= self.limits.retry_s or not self.refused

    @property
    def came_to_nothing(self) -> bool:
        """Whether the request of this posture was answered, and what it was for is still not so."""
        return self.answered_s >= self.limits.retry_s

    @property
    def must_stop(self) -> bool:
        """Whether nothing may be served here: the mount does not lead, or has been frozen for too long."""
        if self.mount is Mount.FROZEN:
            return self.frozen_s >= self.limits.freeze_s
        return self.mount is not Mount.LEADS


@dataclass(frozen=True, slots=True)
class Rule:
    """In a posture, `when` something holds: what is done, and the posture that follows. `name` is unique within a posture."""

    posture: Posture
    name: str
    when: Callable[[View], bool]
    then: Posture
    do: tuple[Do, ...] = ()


def _automatic(condition: Callable[[View], bool]) -> Callable[[View], bool]:
    """What is not done in maintenance."""
    return lambda view: condition(view) and not view.maintenance


P = Posture
RULES: Final = (
    Rule(
        P.IDLE,
        "the mount leads",
        # In maintenance only if the other controller has just given the role by a person's word.
        lambda v: v.mount is Mount.LEADS and (not v.maintenance or v.peer_posture is P.GIVING),
        P.STARTING,
        (Do.START,),
    ),
    Rule(
        P.IDLE,
        "services are here, and the mount does not serve",  # an earlier controller has left them
        lambda v: v.services is not Services.DOWN and v.must_stop,
        P.STOPPING,
        (Do.STOP,),
    ),
    Rule(
        P.IDLE,
        "the other node or its controller is lost, once too often",
        _automatic(lambda v: (v.is_orphaned or (v.peer_is_lost and v.mount is Mount.WAITING)) and not v.may_fail_over),
        P.HELD,
    ),
    Rule(
        P.IDLE,
        "the other node is lost",
        _automatic(lambda v: v.peer_is_lost and v.mount is Mount.WAITING and v.may_ask_again),
        P.TAKING,
        (Do.PROMOTE,),
    ),
    Rule(
        P.IDLE,
        "the controller of the primary is gone",
        _automatic(lambda v: v.is_orphaned),
        P.TAKING,
        (Do.TAKE_OVER,),
    ),
    Rule(P.IDLE, "a person wants it here", lambda v: v.told_to_take and v.mount is Mount.FOLLOWS and v.hears, P.ASKING),
    Rule(
        P.IDLE,
        "this node is preferred",
        # Only if it could give it back.
        _automatic(
            lambda v: v.prefers and v.mount is Mount.FOLLOWS and v.hears and v.peer_posture is P.SERVING and v.may_fail_over
        ),
        P.ASKING,
    ),
    Rule(
        P.IDLE,
        "a person wants it there",  # a controller that has started in maintenance has not taken the application up
        lambda v: v.mount is Mount.LEADS and v.told_to_give and v.peer_can_take,
        P.YIELDING,
        (Do.STOP,),
    ),
    Rule(P.ASKING, "it is given", lambda v: v.mount is Mount.LEADS, P.STARTING, (Do.START, Do.FORGET)),
    Rule(P.ASKING, "it is refused", lambda v: v.peer_refuses, P.IDLE, (Do.FORGET,)),
    Rule(P.ASKING, "this node does not follow any more", lambda v: v.mount is not Mount.FOLLOWS, P.IDLE, (Do.FORGET,)),
    Rule(
        P.ASKING,
        "nobody answers",
        lambda v: v.in_posture_s >= v.limits.ask_s or not v.hears,
        P.IDLE,
        (Do.FORGET,),
    ),
    Rule(P.TAKING, "it is the primary", lambda v: v.mount is Mount.LEADS, P.STARTING, (Do.START, Do.COUNT)),
    Rule(P.TAKING, "it is refused", lambda v: v.refused, P.IDLE),
    Rule(P.TAKING, "it was given away at once", lambda v: v.came_to_nothing, P.IDLE),
    Rule(P.TAKING, "its mount is gone", lambda v: v.mount in (Mount.STOPPED, Mount.HUNG), P.IDLE),
    Rule(P.STARTING, "the mount does not serve", lambda v: v.must_stop, P.STOPPING, (Do.STOP,)),
    Rule(P.STARTING, "all are up", lambda v: v.services is Services.UP, P.SERVING),
    Rule(
        P.STARTING,
        "one does not start, the other node can have it",
        _automatic(lambda v: v.services is Services.FAILED and v.peer_can_take and v.may_fail_over),
        P.YIELDING,
        (Do.STOP, Do.COUNT),
    ),
    Rule(
        P.STARTING,
        "one does not start",
        lambda v: v.services is Services.FAILED and (v.maintenance or not v.may_fail_over or not v.peer_can_soon),
        P.HELD,
        (Do.STOP,),
    ),
    Rule(
        P.STARTING,
        "a person wants it there",
        lambda v: v.told_to_give and v.peer_can_take,
        P.YIELDING,
        (Do.STOP,),
    ),
    Rule(P.SERVING, "the mount does not serve", lambda v: v.must_stop, P.STOPPING, (Do.STOP,)),
    Rule(P.SERVING, "a person wants it there", lambda v: v.told_to_give and v.peer_can_take, P.YIELDING, (Do.STOP,)),
    Rule(
        P.SERVING,
        "a service stays unwell",
        _automatic(lambda v: v.unwell and v.peer_can_take and v.may_fail_over),
        P.YIELDING,
        (Do.STOP, Do.COUNT),
    ),
    Rule(P.STOPPING, "all are down", lambda v: v.services is Services.DOWN, P.IDLE),
    Rule(
        P.YIELDING,
        "all are down",
        lambda v: v.services is Services.DOWN and v.mount is Mount.LEADS,
        P.GIVING,
        (Do.HAND_OVER,),
    ),
    Rule(P.YIELDING, "all are down, and so is the mount", lambda v: v.services is Services.DOWN, P.IDLE, (Do.FORGET,)),
    Rule(
        P.GIVING,
        "it is given",
        # Held: a start there that failed at once may be over before it is heard of.
        lambda v: v.mount is not Mount.LEADS and v.peer_posture in (P.STARTING, P.SERVING, P.HELD),
        P.IDLE,
        (Do.FORGET,),
    ),
    Rule(
        P.GIVING,
        "nobody begins there",
        # In maintenance the other one begins only if it hears that this one gives, however late.
        lambda v: (
            v.mount not in (Mount.LEADS, Mount.FOLLOWS) or v.in_posture_s >= v.limits.ask_s or not (v.hears or v.maintenance)
        ),
        P.IDLE,
        (Do.FORGET,),
    ),
    Rule(
        P.GIVING,
        "it is refused, or came back at once",
        lambda v: v.mount is Mount.LEADS and (v.refused or v.came_to_nothing),
        P.STARTING,
        (Do.START, Do.FORGET),
    ),
    Rule(
        P.HELD,
        "a person wants it there",
        lambda v: v.mount is Mount.LEADS and v.told_to_give and v.peer_can_take,
        P.YIELDING,
        (Do.STOP,),
    ),
    Rule(P.HELD, "a person has looked", lambda v: v.released, P.IDLE, (Do.FORGET,)),
)


def next_rule(posture: Posture, view: View) -> Rule | None:
    """The rule that is to be taken now, None if everything stays as it is."""
    return next((rule for rule in RULES if rule.posture is posture and rule.when(view)), None)


@dataclass(frozen=True, slots=True)
class Budget:
    """So many times within a while, and no more. `spent` are the times of it, in seconds of any clock that does not jump."""

    limit: int
    window_s: float
    spent: tuple[float, ...] = ()

    def left(self, now: float) -> int:
        """How many times it may happen now."""
        return self.limit - sum(now - self.window_s < moment <= now for moment in self.spent)

    def spend(self, now: float) -> "Budget":
        """The budget after it has happened once more; times that count no longer are forgotten."""
        kept = tuple(moment for moment in self.spent if now - self.window_s < moment <= now)
        return Budget(self.limit, self.window_s, (*kept, now))
