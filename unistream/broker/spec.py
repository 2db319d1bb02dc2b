"""What topics and groups are made of, and the bounds that the broker sets itself; values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .errors import InvalidRequest

__all__ = ["AtOffset", "AtTime", "Entry", "GroupSpec", "Limits", "Ordering", "Start", "TopicSpec"]

Entry = tuple[Any, ...]
"""A published message: `(id: str, value: bytes, key: bytes or None, headers: ((str, bytes), …), …)`.

It is carried by reference and handed back by reference, with whatever the driver adds behind the headers. The broker
looks at the key for order and at the sizes; ids it takes apart from the entry."""

Ordering = Literal["none", "key"]


class AtTime(NamedTuple):
    """The first message taken at or after this wall time, in microseconds since 1970."""

    microseconds: int


class AtOffset(NamedTuple):
    """The message at this offset, or the first one kept after it."""

    offset: int


Start = Literal["latest", "earliest"] | AtTime | AtOffset


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """Settings of a topic, fixed when it is created.

    Attributes:
        partitions: How many labels its messages bear; the broker itself orders by key.
        ordering: `"key"` lets groups ask for key order.
        max_age: Seconds that a message stays, settled or not; `None` for no bound.
        max_bytes: Bytes that stay (values, keys and headers); the oldest messages go first.
        max_messages: Messages that stay; the oldest go first.
        max_backlog: Messages that the slowest group may leave unsettled.
        overflow: What happens beyond it: the publish is refused, or each slow group loses its oldest, counted.
    """

    partitions: int = 1
    ordering: Ordering = "none"
    max_age: float | None = None
    max_bytes: int | None = None
    max_messages: int | None = None
    max_backlog: int | None = None
    overflow: Literal["reject", "drop_oldest"] = "reject"

    def __post_init__(self) -> None:
        _one_of("ordering", self.ordering, "none", "key")
        _one_of("overflow", self.overflow, "reject", "drop_oldest")
        for name in ("partitions", "max_age", "max_bytes", "max_messages", "max_backlog"):
            bound = getattr(self, name)
            if bound is not None and bound <= 0:
                raise InvalidRequest(f"{name} is {bound!r}; it must be positive")

    @property
    def has_retention(self) -> bool:
        """Whether a retention was declared; it alone decides then what stays."""
        return (self.max_age, self.max_bytes, self.max_messages) != (None, None, None)


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Settings of a group, fixed when it is created.

    Attributes:
        ordering: `"key"`: one unsettled message per key, in publish order, through every redelivery.
        start: Where the group begins; pinned at creation.
        lease: Seconds for which a message is lent.
        max_lease: Seconds since the lending beyond which a lease can't be extended.
        ephemeral: The group lives as long as its one session.
    """

    ordering: Ordering = "none"
    start: Start = "latest"
    lease: float = 30.0
    max_lease: float = 3600.0
    ephemeral: bool = False

    def __post_init__(self) -> None:
        _one_of("ordering", self.ordering, "none", "key")
        if not 0 < self.lease <= self.max_lease:
            raise InvalidRequest(f"lease {self.lease!r} must be positive and at most max_lease {self.max_lease!r}")
        if not isinstance(self.start, AtTime | AtOffset):
            _one_of("start", self.start, "latest", "earliest")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that hold for every topic of one broker.

    Attributes:
        history_messages: A topic without a declared retention forgets messages that every group has settled once it
            holds more than this; unsettled ones stay for ever.
        history_bytes: The same, in bytes.
        dedupe_seconds: How long an id is remembered, unless `dedupe_ids` newer ones came.
        dedupe_ids: How many ids of a topic are remembered at least; twice as many at most.
        message_bytes: Largest message taken: value, key and headers together.
        parked_messages: Messages of busy keys that an ordered group sets aside before its cursor stops.
    """

    history_messages: int = 100_000
    history_bytes: int = 64 * 1024 * 1024
    dedupe_seconds: float = 120.0
    dedupe_ids: int = 100_000
    message_bytes: int = 16 * 1024 * 1024
    parked_messages: int = 100_000


def _one_of(what: str, value: object, *allowed: str) -> None:
    if value not in allowed:
        raise InvalidRequest(f"{what} is {value!r}; it can be {' or '.join(map(repr, allowed))}")
