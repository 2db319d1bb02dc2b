"""Delayed redelivery: queues that hold a message for a fixed time and then hand it to its group's queue.

One quorum queue per delay, shared by all groups, made when first needed. Its messages expire in order, and RabbitMQ
moves them at least once (from 3.10 on) to the exchange `us~return`, which leads to the queue named by the routing key.
What belongs to a group that was deleted meanwhile goes to `us~gone`, which drops it: without that alternate exchange
such messages would stay, and 40 of them stopped a delay queue for good (seen on 3.10.8).

A delay is rounded up to the next of about 170 steps, by no more than 8 % or half a second (DEL-2 allows 10 % or 1 s).
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left

from pika.exceptions import ChannelClosed

from unistream_rabbitmq.errors import NOT_FOUND, code_of
from unistream_rabbitmq.link import Channel, Line
from unistream_rabbitmq.names import GONE, RETURN, delay_name

__all__ = ["MAX_DELAY", "SETTLED_SECONDS", "Delays", "declare_return", "queue_exists", "step_for"]

MAX_DELAY = 30 * 86400.0
"""Seconds."""
SETTLED_SECONDS = 1.5
"""How long after its creation a quorum queue comes back after kill -9 of the server.

Younger ones lose their name: RabbitMQ 3.10.8 killed 0.9 s after creating a queue never again has a leader for
it; killed after 1.5 s all is well.
"""


def _steps() -> list[int]:
    steps = [*range(250, 2000, 250), *range(2000, 10000, 500)]
    at = 10000.0
    while at < MAX_DELAY * 1000:
        steps.append(round(at))
        at *= 1.08
    return [*steps, round(MAX_DELAY * 1000)]


_STEPS = _steps()


def step_for(delay: float) -> int:
    """The milliseconds that a message is held for a delay in seconds: at least as long."""
    return _STEPS[min(bisect_left(_STEPS, delay * 1000), len(_STEPS) - 1)]


class Delays:
    """
    Makes the delay queues of one virtual host.

    Args:
        control: The connection to declare on.
        settles: Seconds for which a new queue is not trusted with a message that is nowhere else.
    """

    def __init__(self, control: Line, settles: float) -> None:
        self._control = control
        self._settles = settles
        self._made: set[int] = set()
        self._making: dict[int, asyncio.Task[None]] = {}

    def ready(self, delay: float) -> bool:
        """Whether a message can be put aside for `delay` seconds without waiting."""
        return step_for(delay) in self._made

    async def exchange(self, delay: float) -> str:
        """The exchange to publish to, with the queue as routing key, so that a message comes back after `delay`."""
        step = step_for(delay)
        if not await self._there(step):
            await self._make(step)
        return delay_name(step)

    async def remainder(self, delay: float) -> float:
        """
        Make what a message needs that its member holds until then.

        Returns:
            The delay to put it aside for afterwards, 0 for none: what has passed meanwhile is taken off, and there is a
            queue for it. Within `delay` seconds, whatever happens; so it comes back in time although the queue is new.
        """
        if await self._there(step_for(delay)):
            return delay
        loop = asyncio.get_running_loop()
        due = loop.time() + delay
        later = max(0.0, delay - self._settles)
        steps = {step_for(delay), step_for(later)} if later else {step_for(delay)}
        try:
            async with asyncio.timeout_at(due):
                await asyncio.gather(*(self._make(step) for step in steps))
        except TimeoutError:
            return 0.0
        # Made sooner than that, since somebody had begun before.
        await asyncio.sleep(due - later - loop.time())
        return later

    async def _there(self, step: int) -> bool:
        if step in self._made:
            return True
        if step in self._making or not await queue_exists(self._control, delay_name(step)):
            return False
        self._made.add(step)
        return True

    async def _make(self, step: int) -> None:
        """Make the queue of a step; attempts are shared, and go on when one who waits gives up."""
        task = self._making.get(step)
        if task is None:
            task = self._making[step] = asyncio.create_task(self._declare(step))
            task.add_done_callback(lambda _: self._making.pop(step))
        await asyncio.shield(task)

    async def _declare(self, step: int) -> None:
        name = delay_name(step)
        wire = await self._control.wire()
        channel = await wire.channel()
        try:
            await declare_return(channel)
            await channel.call(channel.raw.exchange_declare, name, "fanout", durable=True)
            arguments = {
                "x-queue-type": "quorum",
                "x-message-ttl": step,
                "x-dead-letter-exchange": RETURN,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }
            await channel.call(channel.raw.queue_declare, name, durable=True, arguments=arguments)
            await channel.call(channel.raw.queue_bind, name, name)
        finally:
            await channel.close()
        await asyncio.sleep(self._settles)
        self._made.add(step)

    def forget(self) -> None:
        """Somebody deleted one: declare them again."""
        self._made.clear()

    async def close(self) -> None:
        """Stop making queues."""
        making = list(self._making.values())
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)


async def queue_exists(control: Line, name: str) -> bool:
    """Whether a queue is there."""
    channel = await (await control.wire()).channel()
    try:
        await channel.call(channel.raw.queue_declare, name, passive=True)
    except ChannelClosed as error:
        if code_of(error) != NOT_FOUND:
            raise
        return False
    finally:
        await channel.close()
    return True


async def declare_return(channel: Channel) -> None:
    """Make the exchange through which delayed messages come back, and the drain behind it."""
    raw = channel.raw
    await channel.call(raw.exchange_declare, GONE, "fanout", durable=True)
    await channel.call(raw.queue_declare, GONE, durable=True, arguments={"x-max-length": 0})
    await channel.call(raw.queue_bind, GONE, GONE)
    await channel.call(raw.exchange_declare, RETURN, "direct", durable=True, arguments={"alternate-exchange": GONE})
