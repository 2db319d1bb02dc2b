"""What a killed member and a server that restarts, crashes or freezes do to messages; real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import unistream
from tests.adapters.nats.support import LIMIT, run, url
from tests.brokers import Server, local
from unistream.driver.checked import checked
from unistream_nats import NatsDriver

pytestmark = pytest.mark.nats

_MEMBER = """
import asyncio, sys, unistream
from unistream_nats import NatsDriver

async def main(url, topic, ordering):
    async with unistream.connect(url, driver=NatsDriver) as client:
        group = client.group("g", topic, ordering=ordering, lease=1.0)
        async with group.consumer(max_in_flight=8) as consumer:
            held = [await consumer.receive(10) for _ in range(3)]
            print("holding", *(delivery.id for delivery in held), flush=True)
            await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def client(address: str) -> AsyncIterator[unistream.Client]:
    """A client whose driver is checked."""
    async with unistream.connect(address + "?dead_peer_after=2&connect_timeout=2", driver=checked(NatsDriver)) as it:
        yield it


@pytest.mark.parametrize("ordering", ["none", "key"])
def test_what_a_killed_member_held_comes_again(ordering: str) -> None:
    """A member is SIGKILLed with messages in hand: others get them within the lease and the declared time."""

    async def test() -> None:
        topic = f"t.{os.urandom(6).hex()}"
        async with client(url()) as here:
            await here.create_topic(topic, partitions=4, ordering="key")
            group = here.group("g", topic, ordering=ordering, lease=1.0)  # type: ignore[arg-type]
            await group.create()
            async with here.producer(topic) as producer:
                for number in range(40):
                    await producer.publish(b"", key=b"%d" % (number % 8), id=str(number))
            member = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _MEMBER,
                url(),
                topic,
                ordering,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert member.stdout is not None
            line = (await asyncio.wait_for(member.stdout.readline(), LIMIT)).split()
            assert line[0] == b"holding"
            member.send_signal(signal.SIGKILL)
            await member.wait()
            seen: list[str] = []
            async with group.consumer() as consumer, asyncio.timeout(LIMIT):
                while len(seen) < 40:
                    delivery = await consumer.receive()
                    assert delivery is not None
                    seen.append(delivery.id)
                    await delivery.ack(confirm=True)
            by_key = [[int(one) for one in seen if int(one) % 8 == key] for key in range(8)]
            await here.delete_topic(topic)

            assert sorted(seen, key=int) == [str(number) for number in range(40)]
            if ordering == "key":
                assert all(numbers == sorted(numbers) for numbers in by_key)

    run(test)


@pytest.mark.parametrize("fault", ["restart", "kill9", "pause"])
def test_nothing_confirmed_is_lost_when_the_server_fails(fault: str, tmp_path: Path) -> None:
    """While messages flow the server restarts, is killed, or freezes: every confirmed message is handled afterwards."""

    async def test() -> None:
        with local("nats", tmp_path) as server:
            async with client(server.url) as here:
                await here.create_topic("t")
                group = here.group("g", "t", lease=2.0)
                await group.create()
                confirmed: set[str] = set()
                handled: set[str] = set()
                done = asyncio.Event()

                async def produce() -> None:
                    async with here.producer("t", max_unconfirmed=50) as producer:
                        while not done.is_set():
                            with contextlib.suppress(unistream.PublishError):
                                confirmed.add((await producer.publish(b"x")).id)

                async def handle(delivery: unistream.Delivery) -> None:
                    handled.add(delivery.id)
                    for waiter in [one for one in waiters if len(handled) >= one[0]]:
                        waiters.remove(waiter)
                        waiter[1].set()

                async with asyncio.TaskGroup() as tasks:
                    producers = [tasks.create_task(produce()) for _ in range(4)]
                    runner = tasks.create_task(group.run(handle, concurrency=8))
                    await flows(handled)
                    await fail(server, fault)
                    await flows(handled)
                    done.set()
                    await asyncio.wait(producers)
                    async with asyncio.timeout(LIMIT):
                        # Whose leases ended meanwhile come again, so all is handled when nothing is left.
                        while (await group.lag()).messages:  # noqa: ASYNC110 - NATS has no event for it
                            await asyncio.sleep(0.1)
                    assert (await here.health()).ok
                    runner.cancel()
                    await asyncio.wait([runner])

                assert len(confirmed) > 200
                assert confirmed <= handled

    waiters: list[tuple[int, asyncio.Event]] = []

    async def flows(handled: set[str]) -> None:
        enough = asyncio.Event()
        waiters.append((len(handled) + 500, enough))
        async with asyncio.timeout(LIMIT):
            await enough.wait()

    async def fail(server: Server, fault: str) -> None:
        if fault == "pause":
            await asyncio.to_thread(server.pause)
            # Longer than dead_peer_after, so that the connections are given up.
            await asyncio.sleep(4.0)
            await asyncio.to_thread(server.resume)
            return
        await asyncio.to_thread(server.kill9 if fault == "kill9" else server.stop)
        await asyncio.to_thread(server.start)

    run(test)


def test_no_delay_is_cut_short_by_a_server_that_was_killed(tmp_path: Path) -> None:
    """The server writes whole seconds down; over a kill -9 a nacked message comes no earlier than it was to."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        with local("nats", tmp_path) as server:
            async with client(server.url) as here:
                await here.create_topic("t")
                group = here.group("g", "t", lease=2.0)
                async with group.consumer() as consumer, here.producer("t") as producer:
                    nacked: dict[str, float] = {}
                    # Spread over a second, so that the clock cuts off all parts of one.
                    for _ in range(6):
                        await producer.publish(b"x")
                        delivery = await consumer.receive(LIMIT)
                        assert delivery is not None
                        nacked[delivery.id] = loop.time()
                        await delivery.nack(3.0)
                        await asyncio.sleep(0.17)
                    await asyncio.to_thread(server.kill9)
                    await asyncio.to_thread(server.start)
                    waited: dict[str, float] = {}
                    for _ in range(6):
                        delivery = await consumer.receive(LIMIT)
                        assert delivery is not None
                        waited[delivery.id] = loop.time() - nacked[delivery.id]
                        assert delivery.attempt == 2
                        await delivery.ack(confirm=True)

            assert waited.keys() == nacked.keys()
            assert min(waited.values()) >= 2.99

    run(test)
