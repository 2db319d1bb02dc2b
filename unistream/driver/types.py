"""The plain values that cross the driver line; knows neither clients nor the portable layer.

Values made once per message are named tuples: cheap to make, immutable, readable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Literal, NamedTuple, TypeVar, Union

from unistream.errors import AccessError, PublishError, SettleError, TopicMissingError
from unistream.message import HeaderPairs, Receipt

__all__ = [
    "Connected",
    "DataLoss",
    "Disconnected",
    "Event",
    "GroupSpec",
    "HealthChanged",
    "Lag",
    "MaybeAwaitable",
    "Member",
    "Option",
    "Ordering",
    "Overflow",
    "PublishOutcome",
    "RawDelivery",
    "RawMessage",
    "Receipt",
    "Retention",
    "SettleOutcome",
    "Settlement",
    "StartAt",
    "Target",
    "Token",
    "TopicSpec",
    "Verb",
]

T = TypeVar("T")
MaybeAwaitable = Union[T, Awaitable[T]]  # noqa: UP007 - a generic alias needs Union
"""A result at once, or an awaitable of it. `async def` satisfies it; an in-process store answers at once."""

Ordering = Literal["none", "key"]
Overflow = Literal["reject", "drop_oldest"]
Token = Any
"""Identity of one loan, made by the driver: hashable, never reused by the same consumer, the fence of a settle."""

StartAt = str | datetime
"""`"latest"`, `"earliest"`, an aware datetime, or a position as found in a `Receipt` or `Delivery`."""


class RawMessage(NamedTuple):
    """A message on its way through the driver line.

    Attributes:
        id: Identity; `""` on a delivery whose publisher gave none (a foreign message).
        value: The body.
        key: `None` differs from `b""`.
        headers: Application headers, and reserved ones that the portable layer set.
        partition: Computed from the key by the library; on a delivery what the broker says.
        dedupe: What the broker's deduplication compares; `""` means the id.
    """

    id: str
    value: bytes
    key: bytes | None
    headers: HeaderPairs
    partition: int
    dedupe: str = ""


PublishOutcome = Receipt | PublishError | TopicMissingError | AccessError


class RawDelivery(NamedTuple):
    """One lending of a message.

    Attributes:
        message: The message.
        token: Identity of this loan.
        position: Place of the message, as in the receipt; `None` where the broker tells none.
        published_at: Seconds since the epoch, by the broker's clock where it has one; `None` if unknown.
        attempt: 1 first.
        suspect: The loan before this one ended without a word from its member, who may have died of the
            message. A driver returns a suspect alone; the portable layer fetches nothing beside it.
        native: The client library's own object, for `Delivery.native`.
    """

    message: RawMessage
    token: Token
    position: str | None
    published_at: float | None
    attempt: int
    suspect: bool = False
    native: Any = None


class Verb(Enum):
    """How a loan ends."""

    ACK = "ack"
    """Done: never again for this group."""
    NACK = "nack"
    """Not done: lend again, not before `delay` seconds from now; counts as an attempt."""
    RELEASE = "release"
    """Given back untouched: lend again at once, without spending the attempt where the broker allows."""
    EXPIRE = "expire"
    """The lease ended. A broker that ends leases by itself ignores it; others lend the message again."""


class Settlement(NamedTuple):
    """One settle on its way to the broker; `delay` in seconds, for `NACK` only."""

    token: Token
    verb: Verb
    delay: float = 0.0


SettleOutcome = SettleError | None
"""`None`: done, as firmly as the capability `ack_confirm` says. Else why this one was refused."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What a topic may lose although it is not settled. All `None`: nothing unsettled is ever removed.

    Attributes:
        max_age: Seconds.
        max_bytes: Bytes of the whole topic.
        max_messages: Messages of the whole topic.
    """

    max_age: float | None = None
    max_bytes: int | None = None
    max_messages: int | None = None

    def __bool__(self) -> bool:
        return (self.max_age, self.max_bytes, self.max_messages) != (None, None, None)


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as declared. `max_backlog`: messages not settled by the slowest group."""

    name: str
    partitions: int = 1
    ordering: Ordering = "none"
    retention: Retention = field(default_factory=Retention)
    max_backlog: int | None = None
    overflow: Overflow = "reject"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group as declared.

    Attributes:
        topic: Its topic.
        name: Its name, scoped by the topic. Of an ephemeral group: a random one.
        ordering: `"key"` only on a topic with the same.
        start: Where it begins when it is created.
        lease: Seconds that a delivery is lent, renewals apart.
        max_lease: Seconds after lending beyond which nothing is renewed.
        ephemeral: Lives as long as its one consumer and leaves nothing behind.
    """

    topic: str
    name: str
    ordering: Ordering = "none"
    start: StartAt = "latest"
    lease: float = 30.0
    max_lease: float = 3600.0
    ephemeral: bool = False


class Lag(NamedTuple):
    """Messages published and not yet settled by a group, and whether the number is exact."""

    messages: int
    exact: bool


class Member(NamedTuple):
    """A member of a group: its name at the broker, and its deliveries in flight (`None`: unknown)."""

    name: str
    in_flight: int | None = None


@dataclass(frozen=True, slots=True)
class DataLoss:
    """Data was removed before a group read it: by a retention that was declared, or by someone else.

    Attributes:
        count: Messages lost to the group; `None` where the broker can't tell.
    """

    topic: str
    group: str
    count: int | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection was lost; the library is reconnecting."""

    what: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection stands again."""

    what: str


@dataclass(frozen=True, slots=True)
class HealthChanged:
    """`Client.health()` changed its answer for one check."""

    what: str
    ok: bool
    detail: str = ""


Event = DataLoss | Disconnected | Connected | HealthChanged


@dataclass(frozen=True, slots=True)
class Option:
    """One option that a driver accepts in the query of its URL.

    Attributes:
        parse: Turns the text into the value; raises `ValueError` on nonsense.
        default: Used when the option is absent.
        doc: One sentence.
    """

    parse: Callable[[str], Any]
    default: Any
    doc: str


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart, its options parsed. Its repr shows no password.

    Attributes:
        scheme: Lower case.
        hosts: `(host, port)` pairs; port `None` where the URL gives none.
        path: Without the leading slash, percent-decoded.
        options: Every option of the driver, given or default.
    """

    scheme: str
    hosts: Sequence[tuple[str, int | None]] = ()
    path: str = ""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """The URL without password and options: what logs and errors show."""
        user = f"{self.username}@" if self.username else ""
        hosts = ",".join(host if port is None else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{user}{hosts}" + (f"/{self.path}" if self.path else "")
