"""Puts messages back into a group, confirmed, so that the original can be acked after: twice perhaps, lost never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pika import BasicProperties

from unistream.errors import BrokerUnavailableError
from unistream_rabbitmq.confirms import Fate, Publisher
from unistream_rabbitmq.delays import Delays
from unistream_rabbitmq.link import Line

__all__ = ["Hop", "Relay"]


class Hop(NamedTuple):
    """A message on its way to a queue, to arrive `delay` seconds from now."""

    queue: str
    delay: float
    body: bytes
    properties: BasicProperties


class Relay:
    """
    The publishing side of one consumer, on the connection for publishing.

    Args:
        line: That connection.
        delays: Makes delay queues.
        timeout: Seconds for one answer.
    """

    def __init__(self, line: Line, delays: Delays, timeout: float) -> None:
        self._line = line
        self._delays = delays
        self._timeout = timeout
        self._publisher: Publisher | None = None
        self._turn = asyncio.Lock()

    @property
    def blocked(self) -> bool:
        """Whether the server takes no messages just now (memory or disk alarm)."""
        return self._line.blocked is not None

    def ready(self, delay: float) -> bool:
        """Whether `put` can put a message aside for `delay` seconds without making a queue first."""
        return delay <= 0 or self._delays.ready(delay)

    async def remainder(self, delay: float) -> float:
        """See `Delays.remainder`."""
        return await self._delays.remainder(delay)

    async def put(self, hops: Sequence[Hop], still: Callable[[], bool] = lambda: True) -> None:
        """
        Publish, and wait until the server holds all of it.

        Args:
            hops: What to publish.
            still: Asked last of all, before anything is written: False if it must not be published any more.

        Raises:
            BrokerUnavailableError: Any of it may have happened; nothing if it was not to be published any more.
        """
        if not hops:
            return
        async with self._turn:
            exchanges = [await self._delays.exchange(hop.delay) if hop.delay > 0 else "" for hop in hops]
            publisher = self._publisher
            if publisher is None or not publisher.usable:
                publisher = self._publisher = await Publisher.open(await self._line.wire())
            if not still():
                raise BrokerUnavailableError("the channel of what was to be put back has ended", driver="amqp")
            batch = publisher.batch(len(hops))
            for index, (exchange, hop) in enumerate(zip(exchanges, hops, strict=True)):
                publisher.publish(batch, index, exchange, hop.queue, hop.body, hop.properties)
            publisher.flush()
            try:
                async with asyncio.timeout(self._timeout):
                    await batch.done
            except TimeoutError as late:
                raise BrokerUnavailableError(
                    f"RabbitMQ did not confirm within {self._timeout:g} s that it took messages back", driver="amqp"
                ) from late
        for fate in batch.fates:
            if fate is not Fate.STORED:
                self._delays.forget()
                raise BrokerUnavailableError(
                    f"RabbitMQ did not take a message back into its group: {fate}", driver="amqp"
                ) from (fate if isinstance(fate, BaseException) else None)

    async def close(self) -> None:
        """Close the channel."""
        if self._publisher is not None:
            await self._publisher.close()
