"""Stopping with a backlog fetched ahead strands nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

import unistream

RESTARTS = 50
MESSAGES = 1500


@pytest.mark.timeout(900)
def test_restart_under_load_strands_nothing(url: str, name: str) -> None:
    """Fifty stops in the middle of work, under load: the union of what was handled is everything published."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    asyncio.run(_restart(url, name, random.Random(seed)))


async def _restart(url: str, topic: str, chance: random.Random) -> None:
    handled: set[int] = set()
    async with unistream.connect(url) as operator:
        await operator.create_topic(topic)
        await operator.group("workers", topic).create()
        try:
            publishing = asyncio.create_task(_publish(operator, topic))
            for _ in range(RESTARTS):
                enough = len(handled) + chance.randint(1, 20)
                await _work(url, topic, handled, lambda enough=enough: len(handled) >= enough)
            await publishing
            await _work(url, topic, handled, lambda: len(handled) == MESSAGES)
            lag = await operator.group("workers", topic).lag()
        finally:
            await operator.delete_topic(topic)

    assert handled == set(range(MESSAGES))
    assert lag.messages == 0


async def _publish(client: unistream.Client, topic: str) -> None:
    async with client.producer(topic, max_unconfirmed=100) as producer:
        for number in range(MESSAGES):
            await producer.submit(str(number).encode())


async def _work(url: str, topic: str, handled: set[int], enough: Callable[[], bool]) -> None:
    """One life of a worker: it handles until `enough`, and is stopped with what it fetched ahead."""
    done = asyncio.Event()

    async def handle(delivery: unistream.Delivery) -> None:
        await asyncio.sleep(0)
        handled.add(int(delivery.value))
        if enough():
            done.set()

    async with unistream.connect(url) as client:
        running = asyncio.create_task(client.group("workers", topic).run(handle, concurrency=4, max_in_flight=100))
        await asyncio.wait_for(done.wait(), 120)
        running.cancel()
        await asyncio.wait([running])
