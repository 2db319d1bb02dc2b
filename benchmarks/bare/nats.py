"""nats-py: `js.publish` under a window, pull fetches of 256, an ack each, and a flush."""

from __future__ import annotations

import asyncio
import secrets

import nats
from nats.js.api import ConsumerConfig, StorageType, StreamConfig

from benchmarks.measure import LATENCY_RATE, WINDOW, Result, age, body


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    name = f"bare-{secrets.token_hex(4)}"
    connection = await nats.connect(url)
    stream = connection.jetstream()
    await stream.add_stream(StreamConfig(name=name, subjects=[name], storage=StorageType.FILE))
    config = ConsumerConfig(durable_name="bench", ack_policy="explicit", max_ack_pending=WINDOW * 2)
    await stream.add_consumer(name, config)
    try:
        await WORK[workload](stream, name, result, size)
        await connection.flush()
    finally:
        await stream.delete_stream(name)
        await connection.close()
    return result


async def add(stream, name, value, messages):
    """Confirmed publishes, a window of them at a time."""
    room = asyncio.Semaphore(WINDOW)

    async def one():
        try:
            await stream.publish(name, value)
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(messages):
            await room.acquire()
            tasks.create_task(one())


async def publish_sequential(stream, name, result, size):
    value = body(size)
    await stream.publish(name, value)
    with result.timed():
        for _ in range(result.messages):
            await stream.publish(name, value)


async def publish_window(stream, name, result, size):
    value = body(size)
    await stream.publish(name, value)
    with result.timed():
        await add(stream, name, value, result.messages)


async def consume(stream, name, result, size):
    await add(stream, name, body(size), result.messages)
    subscription = await stream.pull_subscribe_bind("bench", name)
    left = result.messages
    with result.timed():
        while left:
            batch = await subscription.fetch(min(WINDOW, left), timeout=5)
            for message in batch:
                await message.ack()
            left -= len(batch)
        await stream._nc.flush()


async def latency(stream, name, result, size):
    subscription = await stream.pull_subscribe_bind("bench", name)

    async def receive():
        while len(result.latencies) < result.messages:
            for message in await subscription.fetch(WINDOW, timeout=5):
                result.latencies.append(age(message.data))
                await message.ack()

    receiving = asyncio.create_task(receive())
    with result.timed():
        for _ in range(result.messages):
            await stream.publish(name, body(size))
            await asyncio.sleep(1 / LATENCY_RATE)
        await receiving


WORK = {
    "publish-sequential": publish_sequential,
    "publish-window": publish_window,
    "consume-batch": consume,
    "consume-iterate": consume,
    "latency": latency,
}
