"""What a backend offers, as values with a level, bounds and a note; computed at connect from the live server.

Knows no backend. Each capability is one frozen dataclass; a driver fills one `Capabilities`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from math import inf

from unistream.errors import ConfigError, UnsupportedError

__all__ = [
    "AckConfirm",
    "Attempts",
    "Capabilities",
    "Capability",
    "Dedupe",
    "Durability",
    "Fencing",
    "LagReport",
    "Lease",
    "Level",
    "MaxBacklog",
    "MaxMessageBytes",
    "NackDelay",
    "OrderingByKey",
    "Parallelism",
    "RetentionLimits",
    "Seek",
    "Start",
]


class Level(StrEnum):
    """Who keeps the promise: the broker, the adapter on top of it, or nobody."""

    NATIVE = "native"
    EMULATED = "emulated"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One promise of a backend. Truthy where it is offered at all.

    Attributes:
        level: Who keeps it.
        note: What an operator should know about it; where `level` is `none`, what would give it.
    """

    level: Level = Level.NATIVE
    note: str = ""

    def __bool__(self) -> bool:
        return self.level is not Level.NONE

    def satisfies(self, need: object) -> bool:
        """Whether a need given to `connect(require=…)` is met; `True` asks only that it be offered."""
        return bool(self) and need is True

    def summary(self) -> str:
        """The bounds in a few words."""
        bounds = (
            f"{item.name} {_words(getattr(self, item.name))}"
            for item in fields(self)
            if item.name not in ("level", "note") and getattr(self, item.name) is not None
        )
        return ", ".join([str(self.level), *bounds])


def _words(value: object) -> str:
    if value == inf:
        return "unbounded"
    if isinstance(value, frozenset):
        return "/".join(sorted(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_DURABILITY_ORDER = ("memory", "process_crash", "fsync", "replicated")


@dataclass(frozen=True, kw_only=True)
class Durability(Capability):
    """What a confirmed message survives.

    Attributes:
        kind: `memory` (nothing), `process_crash` (kill -9 of the broker), `fsync` (power loss), or
            `replicated` (loss of `copies - 1` nodes).
        copies: Nodes that hold a confirmed message.
    """

    kind: str = "memory"
    copies: int = 1

    def satisfies(self, need: object) -> bool:
        """At least the kind asked for, in the order given above; `"replicated(3)"` asks for three copies."""
        if not isinstance(need, str):
            return super().satisfies(need)
        kind, _, count = need.rstrip(")").partition("(")
        if kind not in _DURABILITY_ORDER or (count and not count.isdigit()):
            kinds = ", ".join(_DURABILITY_ORDER)
            raise ConfigError(f"require durability={need!r}: give one of {kinds}, or replicated(n)")
        return _DURABILITY_ORDER.index(self.kind) >= _DURABILITY_ORDER.index(kind) and (
            not count or self.copies >= int(count)
        )


@dataclass(frozen=True, kw_only=True)
class OrderingByKey(Capability):
    """`ordering="key"`.

    Attributes:
        blocks: What one unsettled message holds back: its `key`, or its whole `partition`.
    """

    blocks: str = "key"

    def satisfies(self, need: object) -> bool:
        """`"key"` asks for order by key; `"key-only"` also that the partition's other keys keep flowing."""
        if need == "key":
            return bool(self)
        if need == "key-only":
            return bool(self) and self.blocks == "key"
        return super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class Parallelism(Capability):
    """How many members of a group can hold deliveries at once.

    Attributes:
        bound: `unlimited`, or `partitions`.
        ordered_bound: The same for groups with `ordering="key"`.
    """

    bound: str = "unlimited"
    ordered_bound: str = "unlimited"

    def satisfies(self, need: object) -> bool:
        """`"unlimited"` asks that partitions do not bound it."""
        return self.bound == "unlimited" if need == "unlimited" else super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class Start(Capability):
    """Where a new group can begin.

    Attributes:
        at: Of `latest`, `earliest`, `time`, `position`.
        group_kept_for: Seconds that a group without members keeps its progress.
    """

    at: frozenset[str] = frozenset({"latest"})
    group_kept_for: float = inf

    def satisfies(self, need: object) -> bool:
        """A name, or several, of `latest`, `earliest`, `time`, `position`."""
        if isinstance(need, str):
            return need in self.at
        if isinstance(need, (set, frozenset, list, tuple)):
            return set(need) <= self.at
        return super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class Seek(Capability):
    """Moving an existing group.

    Attributes:
        to: Of `earliest`, `latest`, `time`, `position`.
        with_members: Whether it works while members are joined.
    """

    to: frozenset[str] = frozenset({"earliest", "latest", "time", "position"})
    with_members: bool = False


@dataclass(frozen=True, kw_only=True)
class NackDelay(Capability):
    """Delayed redelivery.

    Attributes:
        max: The longest delay, in seconds.
        twice: A nack of unknown outcome may leave the message twice in its group; each is then lent and settled by
            itself.
        kept_for: Seconds after the first use of a delay for which the member itself keeps what it nacks; if it dies, or
            loses its connection, the message comes early.
    """

    max: float = inf
    twice: bool = False
    kept_for: float = 0.0

    def satisfies(self, need: object) -> bool:
        """A number asks for delays of that many seconds."""
        if isinstance(need, (int, float)) and need is not True:
            return bool(self) and self.max >= need
        return super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class Lease(Capability):
    """How long a delivery is lent, and what ends it early.

    Attributes:
        scope: What a lease is tied to: the `message`, the `member`, or the `connection`.
        least: The shortest lease, in seconds; a shorter one is raised to it.
        recover_within: Seconds beyond the lease until the deliveries of a dead member are lent again.
        dead_peer_after: Seconds until a half-open connection is noticed.
    """

    scope: str = "message"
    least: float = 0.0
    recover_within: float = 0.0
    dead_peer_after: float = 0.0

    def satisfies(self, need: object) -> bool:
        """`"message"` asks for leases of single messages."""
        return self.scope == need if isinstance(need, str) else super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class Fencing(Capability):
    """A settle by a member whose lease ended never settles another member's loan."""


@dataclass(frozen=True, kw_only=True)
class Attempts(Capability):
    """The delivery count.

    Attributes:
        count: `exact`, or `since_member_start`.
        off_by: How far it may be off after a crash.
    """

    count: str = "exact"
    off_by: int = 0

    def satisfies(self, need: object) -> bool:
        """`"exact"` asks that the count never falls."""
        return self.count == need if isinstance(need, str) else super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class AckConfirm(Capability):
    """
    `ack(confirm=True)` waits until the broker holds the ack.

    Attributes:
        survives: What of the broker's an ack that it holds outlives, a nack and an attempt too: `"restart"`, in good
            order, or `"crash"`. A broker that forgets one lends the message again, or lends it twice in a row.
    """

    survives: str = "crash"

    def satisfies(self, need: object) -> bool:
        """`"crash"` asks that a held ack outlives SIGKILL of the broker."""
        if need == "crash":
            return bool(self) and self.survives == "crash"
        return super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class Dedupe(Capability):
    """The same id published twice is stored once.

    Attributes:
        window: Seconds for which an id is remembered.
    """

    window: float = 0.0

    def satisfies(self, need: object) -> bool:
        """A number asks for a window of that many seconds."""
        if isinstance(need, (int, float)) and need is not True:
            return bool(self) and self.window >= need
        return super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class RetentionLimits(Capability):
    """Declared retention.

    Attributes:
        by: Of `max_age`, `max_bytes`, `max_messages`.
    """

    by: frozenset[str] = frozenset({"max_age", "max_bytes", "max_messages"})

    def satisfies(self, need: object) -> bool:
        """A name, or several, of `max_age`, `max_bytes`, `max_messages`."""
        if isinstance(need, str):
            return need in self.by
        if isinstance(need, (set, frozenset, list, tuple)):
            return set(need) <= self.by
        return super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class MaxBacklog(Capability):
    """`max_backlog` of a topic.

    Attributes:
        overflow: Of `reject`, `drop_oldest`.
        decides: Whether a refusal holds for the whole `topic` or only for a `group`.
    """

    overflow: frozenset[str] = frozenset({"reject", "drop_oldest"})
    decides: str = "topic"

    def satisfies(self, need: object) -> bool:
        """A name of `reject`, `drop_oldest`."""
        return need in self.overflow if isinstance(need, str) else super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class MaxMessageBytes(Capability):
    """The largest message.

    Attributes:
        limit: Bytes of value, key and headers together.
    """

    limit: float = inf

    def satisfies(self, need: object) -> bool:
        """A number asks for messages of that many bytes."""
        if isinstance(need, (int, float)) and need is not True:
            return self.limit >= need
        return super().satisfies(need)


@dataclass(frozen=True, kw_only=True)
class LagReport(Capability):
    """`Group.lag()`.

    Attributes:
        exact: Whether the number is exact.
    """

    exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Everything a backend says of itself, at most fifteen values.

    Attributes:
        driver: Scheme of the driver.
        product: Broker and version, as the live server tells it, for example `"Redis 7.0.15"`.
    """

    driver: str
    product: str
    durability: Durability
    ordering: OrderingByKey
    parallelism: Parallelism = field(default_factory=Parallelism)
    start: Start = field(default_factory=Start)
    seek: Seek
    nack_delay: NackDelay
    lease: Lease
    fencing: Fencing
    attempts: Attempts
    ack_confirm: AckConfirm
    dedupe: Dedupe
    retention: RetentionLimits
    max_backlog: MaxBacklog
    max_message_bytes: MaxMessageBytes
    lag: LagReport

    def __iter__(self) -> Iterator[tuple[str, Capability]]:
        """The capabilities with their names."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Capability):
                yield item.name, value

    def require(self, needs: Mapping[str, object]) -> None:
        """
        Check every need of a program.

        Args:
            needs: Capability name to what is needed of it: `True` (offered at all), or what the capability's
                `satisfies` documents, for example `{"durability": "fsync", "ordering": "key", "seek": True}`.

        Raises:
            ConfigError: A name is not a capability, or the need can't be understood.
            UnsupportedError: A need is not met.
        """
        offered = dict(self)
        for name, need in needs.items():
            if name not in offered:
                near = get_close_matches(name, offered, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(offered)}"
                raise ConfigError(f"require: {name!r} is not a capability{hint}")
            if not offered[name].satisfies(need):
                raise self.unsupported(name, f"{name}={need!r} is required")

    def unsupported(self, name: str, wanted: str, *, topic: str | None = None) -> UnsupportedError:
        """The error for `wanted`: which capability it needs, what is offered, and what would help."""
        capability = dict(self)[name]
        note = f" ({capability.note})" if capability.note else ""
        return UnsupportedError(
            f"{wanted}, but {self.product} offers {name}: {capability.summary()}{note}",
            capability=name,
            driver=self.driver,
            topic=topic,
        )
