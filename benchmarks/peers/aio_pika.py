"""aio-pika: a quorum queue, confirms awaited in windows, prefetch 256 and an ack each."""

from __future__ import annotations

import asyncio
import secrets

from aio_pika import DeliveryMode, Message, connect

from benchmarks.measure import WINDOW, Result, body

BACKENDS = ("rabbitmq",)


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    async with await connect(url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        await channel.set_qos(prefetch_count=WINDOW)
        queue = await channel.declare_queue(
            f"peer-{secrets.token_hex(4)}", durable=True, arguments={"x-queue-type": "quorum"}
        )
        message = Message(body(size), delivery_mode=DeliveryMode.PERSISTENT)

        async def publish(count: int) -> None:
            await asyncio.gather(
                *(channel.default_exchange.publish(message, queue.name, mandatory=True) for _ in range(count))
            )

        async def windows(count: int) -> None:
            for first in range(0, count, WINDOW):
                await publish(min(WINDOW, count - first))

        try:
            if workload == "publish-sequential":
                await publish(1)
                with result.timed():
                    for _ in range(messages):
                        await publish(1)
            elif workload == "publish-window":
                await publish(1)
                with result.timed():
                    await windows(messages)
            else:
                await windows(messages)
                with result.timed():
                    await consume(queue, messages)
        finally:
            await queue.delete(if_unused=False, if_empty=False)
    return result


async def consume(queue, left):
    async with queue.iterator() as incoming:
        async for message in incoming:
            await message.ack()
            left -= 1
            if not left:
                return
