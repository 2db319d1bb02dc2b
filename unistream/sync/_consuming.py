"""The blocking group, consumer and delivery."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from unistream import _consumer, _delivery, _group
from unistream._client import MIB
from unistream._group import Drop
from unistream._portal import Portal, soon
from unistream._stats import ConsumerStats, DrainReport
from unistream.core.backoff import Retry
from unistream.core.lifecycle import State
from unistream.driver.types import Lag, Member, StartAt
from unistream.errors import SettleError
from unistream.message import Headers, Message, Origin

if TYPE_CHECKING:
    from unistream.sync._client import Client

__all__ = ["Consumer", "Delivery", "Group", "Handler"]

Handler = Callable[["Delivery"], object]


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

    def ack_many(self, deliveries: Iterable[Delivery], *, confirm: bool = False) -> list[SettleError | None]:
        """See `unistream.Consumer.ack_many`."""
        inner = [delivery._delivery for delivery in deliveries]
        return self._client._open().call(self._consumer.ack_many(inner, confirm=confirm))

    def pause(self) -> None:
        """See `unistream.Consumer.pause`."""
        self._client._open().call(soon(self._consumer.pause))

    def resume(self) -> None:
        """See `unistream.Consumer.resume`."""
        self._client._open().call(soon(self._consumer.resume))

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


def _received(portal: Portal, delivery: _delivery.Delivery) -> Delivery:
    """What the application gets; the place where it got it is in its own thread, not on the loop (DEL-8)."""
    frame = sys._getframe(2)
    delivery._code, delivery._line = frame.f_code, frame.f_lineno
    return Delivery(portal, delivery)
