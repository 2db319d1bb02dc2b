"""Who holds what: members, and the loans they have; records only, the rules are the group's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .errors import BrokerError
from .spec import Entry

if TYPE_CHECKING:
    from .group import Group
    from .topic import Topic

__all__ = ["OFFSETS", "Lease", "Lent", "Session", "Tag"]

Tag = int
"""One loan: the fence of its grant, which no other grant of the broker has, plus the offset of the message."""

OFFSETS = (1 << 48) - 1
"""The bits of a tag that are the offset; those above are the fence."""


class Lease:
    """One grant: the messages of one batch, lent to one session, and the time when that ends.

    Attributes:
        token: The fence, as in every tag of the batch; a multiple of `OFFSETS + 1`.
        session: Who holds it.
        granted: When it was lent, in seconds of the broker's clock.
        deadline: When it ends.
        offsets: What was lent under it; those settled since are not taken out.
        open: How many of them are still out.
    """

    __slots__ = ("deadline", "granted", "offsets", "open", "session", "token")

    def __init__(self, token: int, session: Session, granted: float, deadline: float, offsets: Sequence[int]) -> None:
        self.token = token
        self.session = session
        self.granted = granted
        self.deadline = deadline
        self.offsets = offsets
        self.open = len(offsets)


class Session:
    """One member of one group, from its joining until it leaves or is declared lost.

    Attributes:
        name: Unique in the broker.
        topic: The topic of its group.
        group: The group it joined.
        leases: What it holds.
        ended: Why it can't be lent anything any more, or `None` while it can.
    """

    __slots__ = ("__weakref__", "ended", "group", "leases", "name", "topic")

    def __init__(self, name: str, topic: Topic, group: Group) -> None:
        self.name = name
        self.topic = topic
        self.group = group
        self.leases: set[Lease] = set()
        self.ended: tuple[type[BrokerError], str] | None = None

    @property
    def in_flight(self) -> int:
        """Messages that it holds."""
        return sum([lease.open for lease in self.leases])


class Lent(NamedTuple):
    """What one grant handed over; the sequences run in step.

    Attributes:
        token: The fence of all of them.
        deadline: When the lease ends, in seconds of the broker's clock.
        offsets: Places in the topic.
        entries: The messages, as published.
        times: When the broker took each, in milliseconds since 1970.
        attempts: 1 for the first lending of a message.
        suspect: The loan before this one was lost; there is exactly one message then.
    """

    token: int
    deadline: float
    offsets: Sequence[int]
    entries: Sequence[Entry]
    times: Sequence[int]
    attempts: Sequence[int]
    suspect: bool

    @property
    def tags(self) -> Sequence[Tag]:
        """The loans, in step with the rest."""
        token, offsets = self.token, self.offsets
        if isinstance(offsets, range):
            return range(token + offsets.start, token + offsets.stop)
        return [token + offset for offset in offsets]
