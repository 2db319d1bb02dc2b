"""Stopping with a backlog fetched ahead strands nothing."""

from __future__ import annotations

import asyncio
import random

import pytest

import unistream

RESTARTS = 50
MOST_PER_LIFE = 20
CONCURRENCY = 4
MESSAGES = 1500
LIFE_SECONDS = 120.0
"""Generous, for slow machines: one life takes well under a second."""


@pytest.mark.timeout(900)
def test_restart_under_load_strands_nothing(url: str, name: str) -> None:
    """Fifty stops in the middle of work, under load: the union of what was handled is everything published."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    if not url.startswith("memory:"):
        # A hundred connections are made beside the work of other tests.
        url += f"{'&' if '?' in url else '?'}connect_timeout={LIFE_SECONDS:g}"
    asyncio.run(_restart(url, name, random.Random(seed)))


async def _restart(url: str, topic: str, chance: random.Random) -> None:
    # However the lives end, there is work left for each of them.
    assert RESTARTS * (MOST_PER_LIFE + CONCURRENCY) < MESSAGES
    handled: set[int] = set()
    interrupted = 0
    async with unistream.connect(url) as operator:
        await operator.create_topic(topic)
        await operator.group("workers", topic).create()
        publishing = asyncio.create_task(_publish(operator, topic))
        try:
            for _ in range(RESTARTS):
                enough = len(handled) + chance.randint(1, MOST_PER_LIFE)
                drain = chance.choice([0.0, 30.0])
                interrupted += await _work(url, topic, handled, enough, publishing, drain)
            await publishing
            await _work(url, topic, handled, MESSAGES, publishing, 30.0)
            lag = await operator.group("workers", topic).lag()
        finally:
            publishing.cancel()
            await asyncio.wait([publishing])
            await operator.delete_topic(topic)

    assert interrupted > 0, "no life was stopped in the middle of work"
    assert handled == set(range(MESSAGES))
    assert lag.messages == 0


async def _publish(client: unistream.Client, topic: str) -> None:
    async with client.producer(topic, max_unconfirmed=100) as producer:
        for number in range(MESSAGES):
            await producer.submit(str(number).encode())


async def _work(
    url: str,
    topic: str,
    handled: set[int],
    enough: int,
    publishing: asyncio.Task[None],
    drain: float,
) -> int:
    """
    One life of a worker: it is stopped, with what it fetched ahead, once `enough` messages were handled in all.

    Returns:
        How many handlers were in the middle of work when it was stopped.
    """
    done = asyncio.Event()
    stopped = asyncio.Event()
    interrupted = 0

    async def handle(delivery: unistream.Delivery) -> None:
        nonlocal interrupted
        await asyncio.sleep(0)
        if done.is_set():
            # Work that goes on while it is stopped; without a drain it is cut off here, and its message comes again.
            interrupted += 1
            await stopped.wait()
        handled.add(int(delivery.value))
        if len(handled) >= enough:
            done.set()

    async with unistream.connect(url) as client:
        group = client.group("workers", topic)
        running = asyncio.create_task(group.run(handle, concurrency=CONCURRENCY, max_in_flight=100, drain=drain))
        waiting = asyncio.create_task(done.wait())
        # The worker and the publisher end by themselves only with an error: that is raised here, at once.
        watched = {waiting, running} if publishing.done() else {waiting, running, publishing}
        until = asyncio.get_running_loop().time() + LIFE_SECONDS
        while not done.is_set():
            left = until - asyncio.get_running_loop().time()
            ended, _ = await asyncio.wait(watched, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            assert ended, f"a life handled not enough in {LIFE_SECONDS:g} s; {len(handled)} of {MESSAGES} so far"
            for task in ended:
                task.result()
            assert running not in ended, "the worker ended by itself"
            watched.discard(publishing)
        running.cancel()
        if drain > 0:
            stopped.set()
        await asyncio.wait([running])
        assert running.cancelled(), running.exception()
    return interrupted
