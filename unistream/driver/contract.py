"""The driver contract: what an adapter promises to the portable layer, and what it may rely on.

An adapter translates: batches in, one outcome per item out. It never retries, never buffers without bound, never
swallows an error. Retry, batching, windows, lease renewal, timeouts, attempts, dead letters, double settles and drain
live above this line, once. What a broker lacks and needs kept close to its data (a reclaimer, a commit frontier,
key order) is emulated below it.

**One loop.** Every method is called from one event loop, the one that called `Driver.open`. Callbacks given to a
driver (`lost`, `emit`) must be called on that loop's thread.

**Errors.** Only errors of `unistream.errors` leave a driver, with the client's own error as `__cause__`.

**Connections.** A method that finds its connection gone makes one attempt to connect again, bounded by the driver's
`connect_timeout` option, and raises `BrokerUnavailableError` if that fails. The caller waits (jittered backoff) and
calls again; the driver has no reconnect loop of its own unless its client brings one.

**Cancellation.** Any awaitable may be cancelled at any point; each method says what then holds.

**Answers at once.** Methods typed `MaybeAwaitable` may return their result directly instead of an awaitable. A driver
that can (an in-process store) should: it saves a task per call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from unistream.capabilities import Capabilities
from unistream.driver.types import (
    Event,
    GroupSpec,
    Lag,
    MaybeAwaitable,
    Member,
    Option,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Settlement,
    SettleOutcome,
    StartAt,
    Target,
    Token,
    TopicSpec,
    Verb,
)

__all__ = ["API_VERSION", "ConsumerDriver", "Driver", "ProducerDriver"]

API_VERSION = 1


class Driver(ABC):
    """
    One connection, or pool of them, to one broker; a factory of producers and consumers.

    Instances are made by `unistream.connect`; making one does no I/O.

    Attributes:
        api: Version of this contract that the driver was written for; compared with `API_VERSION` at discovery.
        schemes: URL schemes that the driver serves.
        options: Options that it accepts in the URL's query. Every networked driver has `connect_timeout` (seconds).
        lacks: What cannot exist for this driver, with the reason: `socket`, `process` (a second one on the same
            broker), `password`. The conformance suite lists the cases that need it as INAPPLICABLE.
        capabilities: Filled by `open` from the adapter, the server's version and its live configuration.
    """

    api: ClassVar[int] = API_VERSION
    schemes: ClassVar[tuple[str, ...]]
    options: ClassVar[Mapping[str, Option]] = {}
    lacks: ClassVar[Mapping[str, str]] = {}
    capabilities: Capabilities

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        """
        Keep the target; no I/O.

        Args:
            target: The URL, its options parsed by `options`.
            emit: Takes an `Event` (data loss, a connection lost or back). Never raises, never blocks.
        """
        self.target = target
        self.emit = emit

    def dial(self, host: str, port: int) -> tuple[str, int]:
        """
        Map an address before connecting to it.

        Every connection, also to addresses that the broker advertises, goes to `dial(host, port)`, so that a proxy can
        stand between. The default is the address itself; the conformance suite overrides it.
        """
        return host, port

    @abstractmethod
    async def open(self) -> None:
        """
        Connect, probe the server, and fill `capabilities`.

        Raises:
            AccessError: The credentials are refused.
            BrokerUnavailableError: Nobody answers, or not within `connect_timeout`.
            UnsupportedError: The server is too old to keep the contract.

        Cancellation: Leaves nothing open. Concurrency: Called once, before anything else. Retries: None here.
        """

    @abstractmethod
    async def close(self) -> None:
        """
        Close every connection. Producers and consumers are closed by the caller before. Idempotent; raises nothing
        that is not a defect.

        Cancellation: What is left is closed without waiting. Concurrency: No other call is made during or after it.
        Retries: None.
        """

    @abstractmethod
    async def ping(self) -> None:
        """
        Make one cheap round trip, for `Client.health()`.

        Raises:
            BrokerUnavailableError: No answer within `connect_timeout`, or no connection.

        Cancellation: No effect. Concurrency: Any time. Retries: None.
        """

    @property
    @abstractmethod
    def native(self) -> Any:
        """The client library's own object, for what the contract does not cover; not portable."""

    # Topics and groups. Names were checked by the caller: [A-Za-z0-9._-]{1,200}; the driver escapes them injectively.
    # All of these: Cancellation: the operation may or may not have happened; repeating it is safe.
    # Concurrency: any time, any number. Retries: none here. Each may raise BrokerUnavailableError and AccessError.

    @abstractmethod
    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """
        Create the topic if it does not exist, atomically.

        Returns:
            The topic as it now stands. It differs from `spec` if it existed with other settings: the caller compares
            and raises. Fields that the broker can't tell are returned as given in `spec`.
        """

    @abstractmethod
    async def delete_topic(self, name: str) -> None:
        """Delete the topic, its messages and its groups; deleting what does not exist succeeds (GRP-7)."""

    @abstractmethod
    async def topic(self, name: str) -> TopicSpec:
        """
        The topic as it stands.

        A topic made by foreign tools is adopted: fields that the broker can't tell have their defaults.

        Raises:
            TopicMissingError: There is none.
        """

    @abstractmethod
    async def topics(self) -> Sequence[TopicSpec]:
        """All topics, by name."""

    @abstractmethod
    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """
        Create the group if it does not exist, pinned at `spec.start`; of concurrent creators one pins (GRP-3).

        Ephemeral groups are not created here but by `consumer`.

        Returns:
            The group as it now stands, as `create_topic` does.

        Raises:
            TopicMissingError: There is no such topic.
        """

    @abstractmethod
    async def delete_group(self, topic: str, name: str) -> None:
        """Delete the group and its progress; deleting what does not exist succeeds (GRP-7)."""

    @abstractmethod
    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """
        The groups of a topic, by name, ephemeral ones left out.

        Raises:
            TopicMissingError: There is no such topic.
        """

    @abstractmethod
    async def lag(self, topic: str, group: str) -> Lag:
        """
        Messages published and not yet settled by the group; those in flight count.

        Raises:
            TopicMissingError, GroupMissingError: There is none.
        """

    @abstractmethod
    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """
        The members that the broker believes alive.

        Raises:
            TopicMissingError, GroupMissingError: There is none.
        """

    @abstractmethod
    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """
        Move the group: the next delivery is the first message at or after `to`, whatever was settled before.

        Called only where the capability `seek` offers the kind of `to`. Loans that exist end.

        Raises:
            TopicMissingError, GroupMissingError: There is none.
            UnsupportedError: Members are joined and `seek.with_members` is false; nothing was changed.
        """

    @abstractmethod
    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """
        Open the publishing side of a topic.

        Raises:
            TopicMissingError: There is no such topic.

        Cancellation: Leaves nothing open.
        """

    @abstractmethod
    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """
        Join a group as a new member. An ephemeral group is created here, at the end of the topic.

        When this returns, a message published from now on reaches the group, and the member takes part in it.

        Args:
            group: The group as it stands.
            topic: Its topic as it stands.
            max_in_flight: The most loans that this member will hold; for brokers with a prefetch of their own.
            lost: To be called with the tokens of loans that ended without being asked to (a lost membership, a lost
                connection where leases are tied to it), and the reason. Their settlement is refused from then on.

        Raises:
            TopicMissingError, GroupMissingError: There is none.

        Cancellation: Leaves no member behind.
        """


class ProducerDriver(ABC):
    """
    The publishing side of one topic.

    Attributes:
        pipeline: How many `publish` calls may be outstanding at once.
        batch_messages: The most messages that one call takes.
        batch_bytes: The most bytes of values that one call takes, one message of any size excepted.
    """

    pipeline: int = 1
    batch_messages: int = 256
    batch_bytes: int = 1024 * 1024

    @abstractmethod
    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """
        Hand a batch to the broker and wait until each message of it is confirmed or not.

        Messages are stored in the order of the batch, and batches in the order of the calls, whatever their outcomes.

        Args:
            batch: 1 to `batch_messages` messages; not kept after the answer.
            timeout: Seconds until an answer must be given; what is unconfirmed then is a `PublishUnknownError`.

        Returns:
            One outcome per message, in order: its `Receipt`; an error with `stored="no"` if the message surely is not
            stored; `PublishUnknownError` if it may be (connection lost after sending, no answer in time).

        Raises:
            BrokerUnavailableError: Nothing of this batch was handed over. Every outstanding later call raises too, so
                that the caller can repeat all of them in order.

        Cancellation: Nothing can be said of the batch (PUB-2). It is never sent again, and later batches get their own
            receipts.

        Concurrency: Up to `pipeline` calls at once; with `settle` of any consumer too: a full producer never stops
            a consumer (PUB-7).

        Retries: None here. A retry above repeats the same ids.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release what it holds. No call is outstanding. Idempotent."""


class ConsumerDriver(ABC):
    """
    One member of one group.

    Membership does not depend on `receive` being called: a consumer that pauses for an hour is still a member (BPC-3).
    """

    @abstractmethod
    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        """
        Lend up to `limit` messages to this member, waiting for the first.

        Returns as soon as one is there; an empty result means that `timeout` passed, never "end". A suspect comes
        alone.

        Args:
            limit: At least 1. The caller has room for exactly this many; more is a defect (BPC-1).
            timeout: Seconds, 0 allowed: then what is there now. Leases count from this call, so the caller keeps it
                well below the lease.

        Raises:
            BrokerUnavailableError: No connection. Loans of lease scope `message` stand.
            TopicMissingError, GroupMissingError: It was deleted, or this member's place in it; noticed within the
                capability's `dead_peer_after`.
            ClosedError: `close` was called, also while waiting.

        Cancellation: Nothing may be lost. What the broker already handed over is returned by the next call, or given
            back on close.

        Concurrency: One call at a time; `settle` and `extend` may run beside it.

        Retries: None here.
        """

    @abstractmethod
    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """
        End loans.

        Returns:
            One outcome per settlement, in order: `None`, or `LeaseLostError` where the loan had ended. A settle never
            touches another loan of the same message where the capability `fencing` says so.

        Raises:
            BrokerUnavailableError: No connection, or it was lost before the answer: any of the batch may have
                happened. The caller repeats it while the leases last; a repetition is harmless.

        Cancellation: Any of the batch may have happened.

        Concurrency: One call at a time, beside `receive` and `extend`.

        Retries: None here.
        """

    def ack(self, tokens: Sequence[Token]) -> MaybeAwaitable[list[SettleOutcome]]:
        """
        End loans by an ack: what nearly every batch of settles is.

        Everything else as `settle`, which this calls; for drivers that can do it with less.
        """
        return self.settle([Settlement(token, Verb.ACK) for token in tokens])

    @abstractmethod
    def extend(self, tokens: Sequence[Token], seconds: float) -> MaybeAwaitable[list[SettleOutcome]]:
        """
        Let loans last `seconds` from now on.

        Brokers whose leases are tied to the member or the connection have nothing to do and answer `None` for those
        that stand.

        Returns:
            One outcome per token, in order: `None`, or `LeaseLostError`.

        Raises:
            BrokerUnavailableError: As `settle`.

        Cancellation, Concurrency, Retries: As `settle`.
        """

    @abstractmethod
    async def close(self) -> None:
        """
        Leave the group; what was fetched and not returned by `receive` is given back. Idempotent.

        The caller has settled or released every loan that it could; what is left is lent again by lease end. The group
        hands this member's work over within 5 s (GRP-4). Works as far as it can when the connection is gone.

        Cancellation: The member leaves by itself when its lease ends.

        Concurrency: A waiting `receive` raises ClosedError. Retries: None.
        """
