"""How messages of a shared group come back: published anew with their count, confirmed, and only then acked.

Which queue, what counts, and what is done where the broker does not take them back just now. Ends no loans.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from unistream.driver.types import Settlement, Verb
from unistream_rabbitmq.consumer import Setting
from unistream_rabbitmq.fetched import Arrival, Fetched
from unistream_rabbitmq.relay import Hop

__all__ = ["Returns"]

_log = logging.getLogger("unistream.driver.amqp")


class Returns:
    """The way back for one member; see `Setting`."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._loop = asyncio.get_running_loop()
        self._keeping: set[asyncio.Task[None]] = set()

    def hop(self, settlement: Settlement, arrival: Arrival) -> Hop:
        """Where a message goes by a settle of its loan."""
        queues = self._setting.queues
        if settlement.verb is Verb.NACK:
            return arrival.hop(queues.again, settlement.delay, arrival.spent + 1)
        return self._untouched(arrival)

    def _untouched(self, arrival: Arrival) -> Hop:
        queues = self._setting.queues
        return arrival.hop(queues.suspects if arrival.suspect else queues.again, 0.0, arrival.spent)

    async def put(self, fetched: Fetched, hops: Sequence[Hop]) -> None:
        """
        Put back what came over this channel, so that it can be acked there.

        Raises:
            What happened: The channel has ended, or any of it may be there now.
        """
        if hops:
            # A channel that is dead and does not know it yet has given the messages back already: they would be there
            # twice.
            await fetched.channel.catch_up()
            await self._setting.relay.put(hops, lambda: not fetched.over)

    async def unlent(self, fetched: Fetched, left: Sequence[Arrival]) -> None:
        """Put back what was not lent, with the lendings it had; when that fails it is all among the fetched again."""
        try:
            await self.put(fetched, [self._untouched(arrival) for arrival in left])
        except BaseException:
            if not fetched.over:
                fetched.put_first(left)
            raise
        fetched.ack([arrival.tag for arrival in left])

    def hold(self, fetched: Fetched, tag: int, delay: float) -> None:
        """The broker takes no messages: keep this one until its time, then requeue it, which costs an attempt."""
        if delay > 0:
            self._loop.call_later(delay, fetched.requeue, tag)
        else:
            fetched.requeue(tag)

    def keep(self, fetched: Fetched, delay: float, arrival: Arrival) -> None:
        """There is no queue for this delay yet: keep the message while one is made, so that nothing waits for that."""
        keeping = self._loop.create_task(self._put_aside(fetched, delay, arrival))
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)

    async def _put_aside(self, fetched: Fetched, delay: float, arrival: Arrival) -> None:
        relay = self._setting.relay
        due = self._loop.time() + delay
        try:
            rest = await relay.remainder(delay)
            if not fetched.over:
                await self.put(fetched, [arrival.hop(self._setting.queues.again, rest, arrival.spent + 1)])
                fetched.ack([arrival.tag])
        except Exception as error:
            _log.info("%s: keeps a nacked message itself: %s", self._setting.what, error)
            self.hold(fetched, arrival.tag, due - self._loop.time())

    async def kept(self) -> None:
        """Wait until nothing is kept any more."""
        if self._keeping:
            await asyncio.wait(self._keeping)

    def cancel(self) -> None:
        """Keep nothing any more: the channel's end gives it back."""
        for keeping in self._keeping:
            keeping.cancel()
