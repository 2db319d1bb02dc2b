"""The blocking face: the names and signatures of `unistream`, without `await`.

Each Client has an event loop of its own in one thread, closed with it. Objects may be used from any thread.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, cast

from unistream import _client, _confirmation, _consumer, _delivery, _group, _producer
from unistream._client import MIB
from unistream._confirmation import ProducerStats, WhenFull
from unistream._group import Drop
from unistream._health import Health
from unistream._loans import ConsumerStats, DrainReport
from unistream._portal import Portal
from unistream._producer import DEFAULT_TIMEOUT
from unistream.capabilities import Capabilities
from unistream.config import Config
from unistream.core.backoff import Retry
from unistream.core.lifecycle import State
from unistream.driver.contract import Driver
from unistream.driver.types import Event, GroupSpec, Lag, Member, Ordering, Overflow, Retention, StartAt, TopicSpec
from unistream.errors import UnistreamError
from unistream.message import Headers, HeadersLike, Message, Origin, Receipt

__all__ = ["Client", "Confirmation", "Consumer", "Delivery", "Group", "Handler", "Producer", "connect"]

MESSAGES_PER_CALL = 1000
"""How many messages of `publish_many` cross to the loop's thread at a time."""

Handler = Callable[["Delivery"], object]


def connect(
    target: str | Config | None = None,
    *,
    profile: str | None = None,
    require: Mapping[str, object] | None = None,
    driver: type[Driver] | None = None,
) -> Client:
    """See `unistream.connect`."""
    return Client(_client.connect(target, profile=profile, require=require, driver=driver))


class Client:
    """See `unistream.Client`."""

    def __init__(self, client: _client.Client) -> None:
        self._client = client
        self._portal: Portal | None = None

    def __enter__(self) -> Client:
        portal = Portal(f"unistream {self._client._target.scheme}")
        try:
            portal.call(self._client.__aenter__())
        except BaseException:
            portal.close()
            raise
        self._portal = portal
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Portal:
        if self._portal is None:
            # Raises the error that says what is wrong: not entered, or closed.
            self._client._use()
        return cast(Portal, self._portal)

    @property
    def capabilities(self) -> Capabilities:
        """See `unistream.Client.capabilities`."""
        return self._client.capabilities

    @property
    def native(self) -> Any:
        """See `unistream.Client.native`; it belongs to the client's own thread."""
        return self._client._driver.native

    def create_topic(
        self,
        name: str,
        *,
        partitions: int = 1,
        ordering: Ordering = "none",
        retention: Retention | None = None,
        max_backlog: int | None = None,
        overflow: Overflow = "reject",
    ) -> None:
        """See `unistream.Client.create_topic`."""
        self._open().call(
            self._client.create_topic(
                name,
                partitions=partitions,
                ordering=ordering,
                retention=retention,
                max_backlog=max_backlog,
                overflow=overflow,
            )
        )

    def delete_topic(self, name: str) -> None:
        """See `unistream.Client.delete_topic`."""
        self._open().call(self._client.delete_topic(name))

    def topics(self) -> Sequence[TopicSpec]:
        """See `unistream.Client.topics`."""
        return self._open().call(self._client.topics())

    def producer(
        self,
        topic: str,
        *,
        max_unconfirmed: int = 1000,
        max_unconfirmed_bytes: int = 16 * MIB,
        when_full: WhenFull = "block",
    ) -> Producer:
        """See `unistream.Client.producer`."""
        producer = self._client.producer(
            topic, max_unconfirmed=max_unconfirmed, max_unconfirmed_bytes=max_unconfirmed_bytes, when_full=when_full
        )
        return Producer(self, producer)

    def group(
        self,
        name: str | None,
        topic: str,
        *,
        ordering: Ordering = "none",
        start: StartAt = "latest",
        lease: float = 30.0,
        max_lease: float = 3600.0,
        retry: Retry | None = None,
        dead_letter: str | Drop | None = None,
    ) -> Group:
        """See `unistream.Client.group`."""
        group = self._client.group(
            name,
            topic,
            ordering=ordering,
            start=start,
            lease=lease,
            max_lease=max_lease,
            retry=retry,
            dead_letter=dead_letter,
        )
        return Group(self, group)

    def groups(self, topic: str | None = None) -> Sequence[GroupSpec]:
        """See `unistream.Client.groups`."""
        return self._open().call(self._client.groups(topic))

    def health(self) -> Health:
        """See `unistream.Client.health`."""
        return self._open().call(self._client.health())

    def events(self) -> Iterator[Event]:
        """See `unistream.Client.events`."""
        portal = self._open()
        return _told(portal, portal.call(_soon(self._client.events)))

    def close(self) -> None:
        """See `unistream.Client.close`."""
        portal, self._portal = self._portal, None
        if portal is not None:
            try:
                portal.call(self._client.close())
            finally:
                portal.close()

    def __repr__(self) -> str:
        return f"<sync {self._client!r}>"


class Confirmation:
    """See `unistream.Confirmation`; `result` blocks."""

    def __init__(self, portal: Portal, confirmation: _confirmation.Confirmation) -> None:
        self._portal = portal
        self._confirmation = confirmation

    @property
    def id(self) -> str:
        """See `unistream.Confirmation.id`."""
        return self._confirmation.id

    @property
    def failed(self) -> bool:
        """See `unistream.Confirmation.failed`."""
        return self._confirmation.failed

    def done(self) -> bool:
        """See `unistream.Confirmation.done`."""
        return self._confirmation.done()

    def failure(self) -> UnistreamError | None:
        """See `unistream.Confirmation.failure`."""
        return self._confirmation.failure()

    def result(self, timeout: float | None = None) -> Receipt:
        """See `unistream.Confirmation.result`."""
        return self._portal.call(self._confirmation.result(timeout))


class Producer:
    """See `unistream.Producer`."""

    def __init__(self, client: Client, producer: _producer.Producer) -> None:
        self._client = client
        self._producer = producer

    def __enter__(self) -> Producer:
        self._client._open().call(self._producer.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client._portal is not None:
            self._client._portal.call(self._producer.__aexit__(kind, error, trace))

    @property
    def topic(self) -> str:
        """See `unistream.Producer.topic`."""
        return self._producer.topic

    @property
    def stats(self) -> ProducerStats:
        """See `unistream.Producer.stats`."""
        return self._producer.stats

    def publish(
        self,
        value: bytes,
        *,
        key: bytes | str | None = None,
        headers: HeadersLike | None = None,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Receipt:
        """See `unistream.Producer.publish`."""
        return self._client._open().call(
            self._producer.publish(value, key=key, headers=headers, id=id, timeout=timeout)
        )

    def submit(
        self,
        value: bytes,
        *,
        key: bytes | str | None = None,
        headers: HeadersLike | None = None,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Confirmation:
        """See `unistream.Producer.submit`."""
        portal = self._client._open()
        submitted = self._producer.submit(value, key=key, headers=headers, id=id, timeout=timeout)
        return Confirmation(portal, portal.call(submitted))

    def publish_many(
        self, messages: Iterable[Message | bytes], *, timeout: float = DEFAULT_TIMEOUT
    ) -> list[Receipt | UnistreamError]:
        """See `unistream.Producer.publish_many`."""
        portal = self._client._open()
        outcomes: list[Receipt | UnistreamError] = []
        # Read here, in the caller's thread: an iterable may block, and may call unistream itself.
        rest = iter(messages)
        while batch := list(islice(rest, MESSAGES_PER_CALL)):
            outcomes += portal.call(self._producer.publish_many(batch, timeout=timeout))
        return outcomes

    def flush(self, timeout: float | None = None) -> None:
        """See `unistream.Producer.flush`."""
        self._client._open().call(self._producer.flush(timeout))

    def close(self) -> None:
        """See `unistream.Producer.close`."""
        self._client._open().call(self._producer.close())


class Group:
    """See `unistream.Group`."""

    def __init__(self, client: Client, group: _group.Group) -> None:
        self._client = client
        self._group = group

    @property
    def name(self) -> str | None:
        """See `unistream.Group.name`."""
        return self._group.name

    @property
    def topic(self) -> str:
        """See `unistream.Group.topic`."""
        return self._group.topic

    @property
    def retry(self) -> Retry:
        """See `unistream.Group.retry`."""
        return self._group.retry

    @property
    def dead_letter(self) -> str | Drop | None:
        """See `unistream.Group.dead_letter`."""
        return self._group.dead_letter

    def create(self) -> None:
        """See `unistream.Group.create`."""
        self._client._open().call(self._group.create())

    def delete(self) -> None:
        """See `unistream.Group.delete`."""
        self._client._open().call(self._group.delete())

    def lag(self) -> Lag:
        """See `unistream.Group.lag`."""
        return self._client._open().call(self._group.lag())

    def members(self) -> Sequence[Member]:
        """See `unistream.Group.members`."""
        return self._client._open().call(self._group.members())

    def seek(self, to: StartAt) -> None:
        """See `unistream.Group.seek`."""
        self._client._open().call(self._group.seek(to))

    def consumer(self, *, max_in_flight: int = 100, max_in_flight_bytes: int = 16 * MIB) -> Consumer:
        """See `unistream.Group.consumer`."""
        consumer = self._group.consumer(max_in_flight=max_in_flight, max_in_flight_bytes=max_in_flight_bytes)
        return Consumer(self._client, consumer)

    def run(
        self, handler: Handler, *, concurrency: int = 1, max_in_flight: int | None = None, drain: float = 30.0
    ) -> DrainReport:
        """See `unistream.Group.run`; handlers run in threads, `concurrency` of them."""
        portal = self._client._open()
        with ThreadPoolExecutor(max(concurrency, 1), thread_name_prefix="unistream handler") as threads:

            async def in_thread(delivery: _delivery.Delivery) -> None:
                await asyncio.get_running_loop().run_in_executor(threads, handler, Delivery(portal, delivery))

            return portal.call(
                self._group.run(in_thread, concurrency=concurrency, max_in_flight=max_in_flight, drain=drain)
            )


class Consumer:
    """See `unistream.Consumer`."""

    def __init__(self, client: Client, consumer: _consumer.Consumer) -> None:
        self._client = client
        self._consumer = consumer

    def __enter__(self) -> Consumer:
        self._client._open().call(self._consumer.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client._portal is not None:
            self._client._portal.call(self._consumer.__aexit__(kind, error, trace))

    @property
    def topic(self) -> str:
        """See `unistream.Consumer.topic`."""
        return self._consumer.topic

    @property
    def group_name(self) -> str:
        """See `unistream.Consumer.group_name`."""
        return self._consumer.group_name

    @property
    def stats(self) -> ConsumerStats:
        """See `unistream.Consumer.stats`."""
        return self._consumer.stats

    def __iter__(self) -> Iterator[Delivery]:
        return self

    def __next__(self) -> Delivery:
        portal = self._client._open()
        try:
            return _received(portal, portal.call(self._consumer.__anext__()))
        except StopAsyncIteration:
            raise StopIteration from None

    def receive(self, timeout: float | None = None) -> Delivery | None:
        """See `unistream.Consumer.receive`."""
        portal = self._client._open()
        delivery = portal.call(self._consumer.receive(timeout))
        return None if delivery is None else _received(portal, delivery)

    def receive_many(self, max: int, timeout: float | None = None) -> list[Delivery]:
        """See `unistream.Consumer.receive_many`."""
        portal = self._client._open()
        deliveries = portal.call(self._consumer.receive_many(max, timeout))
        # By `map`, which has no frame of its own.
        return list(map(partial(_received, portal), deliveries))

    def pause(self) -> None:
        """See `unistream.Consumer.pause`."""
        self._client._open().call(_soon(self._consumer.pause))

    def resume(self) -> None:
        """See `unistream.Consumer.resume`."""
        self._client._open().call(_soon(self._consumer.resume))

    def close(self, drain: float = 0.0) -> DrainReport:
        """See `unistream.Consumer.close`."""
        return self._client._open().call(self._consumer.close(drain))


class Delivery:
    """See `unistream.Delivery`; a context manager that acks, or nacks on an exception."""

    def __init__(self, portal: Portal, delivery: _delivery.Delivery) -> None:
        self._portal = portal
        self._delivery = delivery

    @property
    def value(self) -> bytes:
        """See `unistream.Delivery.value`."""
        return self._delivery.value

    @property
    def key(self) -> bytes | None:
        """See `unistream.Delivery.key`."""
        return self._delivery.key

    @property
    def headers(self) -> Headers:
        """See `unistream.Delivery.headers`."""
        return self._delivery.headers

    @property
    def id(self) -> str:
        """See `unistream.Delivery.id`."""
        return self._delivery.id

    @property
    def topic(self) -> str:
        """See `unistream.Delivery.topic`."""
        return self._delivery.topic

    @property
    def partition(self) -> int:
        """See `unistream.Delivery.partition`."""
        return self._delivery.partition

    @property
    def position(self) -> str | None:
        """See `unistream.Delivery.position`."""
        return self._delivery.position

    @property
    def published_at(self) -> datetime | None:
        """See `unistream.Delivery.published_at`."""
        return self._delivery.published_at

    @property
    def message(self) -> Message:
        """See `unistream.Delivery.message`."""
        return self._delivery.message

    @property
    def origin(self) -> Origin | None:
        """See `unistream.Delivery.origin`."""
        return self._delivery.origin

    @property
    def attempt(self) -> int:
        """See `unistream.Delivery.attempt`."""
        return self._delivery.attempt

    @property
    def state(self) -> State:
        """See `unistream.Delivery.state`."""
        return self._delivery.state

    @property
    def lease_expires_at(self) -> datetime:
        """See `unistream.Delivery.lease_expires_at`."""
        return self._delivery.lease_expires_at

    @property
    def native(self) -> Any:
        """See `unistream.Delivery.native`."""
        return self._delivery.native

    def ack(self, confirm: bool = False) -> None:
        """See `unistream.Delivery.ack`."""
        self._portal.call(self._delivery.ack(confirm))

    def nack(self, delay: float | None = None, reason: str | None = None) -> None:
        """See `unistream.Delivery.nack`."""
        self._portal.call(self._delivery.nack(delay, reason))

    def reject(self, reason: str) -> None:
        """See `unistream.Delivery.reject`."""
        self._portal.call(self._delivery.reject(reason))

    def extend(self, seconds: float) -> None:
        """See `unistream.Delivery.extend`."""
        self._portal.call(self._delivery.extend(seconds))

    def __enter__(self) -> Delivery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(self._delivery.__aexit__(kind, error, trace))

    def __repr__(self) -> str:
        return f"<sync {self._delivery!r}>"


async def _soon(call: Callable[[], Any]) -> Any:
    return call()


def _received(portal: Portal, delivery: _delivery.Delivery) -> Delivery:
    """What the application gets; the place where it got it is in its own thread, not on the loop (DEL-8)."""
    frame = sys._getframe(2)
    delivery._code, delivery._line = frame.f_code, frame.f_lineno
    return Delivery(portal, delivery)


def _told(portal: Portal, events: Any) -> Iterator[Event]:
    while True:
        try:
            yield portal.call(_first(events))
        except StopAsyncIteration:
            return


async def _first(events: Any) -> Event:
    return cast(Event, await anext(events))
