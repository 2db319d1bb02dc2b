"""redis.asyncio: pipelines of XADD on one connection, XREADGROUP COUNT 256 and one XACK per batch."""

from __future__ import annotations

import asyncio
import secrets

from redis.asyncio import Redis

from benchmarks.measure import LATENCY_RATE, WINDOW, Result, age, body


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    stream = f"bare-{secrets.token_hex(4)}"
    redis = Redis.from_url(url, single_connection_client=True)
    reader = Redis.from_url(url, single_connection_client=True)
    try:
        await redis.xgroup_create(stream, "bench", "$", mkstream=True)
        await WORK[workload](redis, reader, stream, result, size)
    finally:
        await redis.delete(stream)
        await redis.aclose()
        await reader.aclose()
    return result


async def add(redis, stream, value, messages):
    """Confirmed publishes: one pipeline per window."""
    for first in range(0, messages, WINDOW):
        pipeline = redis.pipeline(transaction=False)
        for _ in range(min(WINDOW, messages - first)):
            pipeline.xadd(stream, {"value": value})
        await pipeline.execute()


async def read(redis, stream):
    """One batch of entries."""
    [[_, entries]] = await redis.xreadgroup("bench", "me", {stream: ">"}, count=WINDOW, block=5000)
    return entries


async def publish_sequential(redis, reader, stream, result, size):
    value = body(size)
    await redis.xadd(stream, {"value": value})
    with result.timed():
        for _ in range(result.messages):
            await redis.xadd(stream, {"value": value})


async def publish_window(redis, reader, stream, result, size):
    value = body(size)
    await redis.xadd(stream, {"value": value})
    with result.timed():
        await add(redis, stream, value, result.messages)


async def consume(redis, reader, stream, result, size):
    await add(redis, stream, body(size), result.messages)
    left = result.messages
    with result.timed():
        while left:
            entries = await read(reader, stream)
            await reader.xack(stream, "bench", *[identity for identity, _ in entries])
            left -= len(entries)


async def latency(redis, reader, stream, result, size):
    async def receive():
        while len(result.latencies) < result.messages:
            for identity, fields in await read(reader, stream):
                result.latencies.append(age(fields[b"value"]))
                await reader.xack(stream, "bench", identity)

    receiving = asyncio.create_task(receive())
    with result.timed():
        for _ in range(result.messages):
            await redis.xadd(stream, {"value": body(size)})
            await asyncio.sleep(1 / LATENCY_RATE)
        await receiving


WORK = {
    "publish-sequential": publish_sequential,
    "publish-window": publish_window,
    "consume-batch": consume,
    "consume-iterate": consume,
    "latency": latency,
}
