"""asyncio.Queue: no groups, no acks, no confirms; the floor of what handing a message over in one process costs."""

from __future__ import annotations

import asyncio

from benchmarks.measure import LATENCY_RATE, Result, age, body


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    queue: asyncio.Queue[bytes] = asyncio.Queue(1000)
    value = body(size)

    async def put() -> None:
        for _ in range(messages):
            await queue.put(value)

    async def get() -> None:
        for _ in range(messages):
            await queue.get()

    if workload == "latency":

        async def receive() -> None:
            while len(result.latencies) < messages:
                result.latencies.append(age(await queue.get()))

        receiving = asyncio.create_task(receive())
        with result.timed():
            for _ in range(messages):
                await queue.put(body(size))
                await asyncio.sleep(1 / LATENCY_RATE)
            await receiving
        return result
    with result.timed():
        await asyncio.gather(put(), get())
    return result
