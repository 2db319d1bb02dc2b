"""Faults on a real RabbitMQ: members that die or freeze, servers that restart, freeze, or take no messages."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import unistream
from tests.adapters.rabbitmq.support import LATE, LIMIT, end, ids, message, opened, receive, run, settle, take, url
from tests.brokers.fleet import local
from tests.brokers.processes import Process
from tests.brokers.server import Server
from tests.unit.portable.scripted import spin
from unistream.core.partitions import partition_for
from unistream.driver.contract import ConsumerDriver, ProducerDriver
from unistream.driver.types import RawDelivery, Receipt, Verb
from unistream.errors import BrokerUnavailableError, PublishUnknownError

pytestmark = [pytest.mark.rabbitmq, pytest.mark.timeout(180)]

QUICK = "?heartbeat=1&connect_timeout=2"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A RabbitMQ of this module's own, to be stopped and frozen."""
    with local("rabbitmq", tmp_path_factory.mktemp("rabbitmq")) as broker:
        yield broker


class Worker:
    """A member in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> dict[str, Any]:
        """The next thing that it says."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            text = await self.process.stdout.readline()
        assert text, "the worker has ended"
        told: dict[str, Any] = json.loads(text)
        return told


@asynccontextmanager
async def worker(topic: str, *, ordering: str = "none", settle_every: int = 0) -> AsyncIterator[Worker]:
    """A worker that has joined; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.adapters.rabbitmq.worker",
        url() + QUICK,
        topic,
        ordering,
        str(settle_every),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        made = Worker(process)
        assert "joined" in await made.line()
        yield made
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def patient(consumer: ConsumerDriver, count: int) -> list[RawDelivery]:
    """Receive until `count` came, through times in which the server is out of reach."""
    found: list[RawDelivery] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            try:
                found += await receive(consumer, count - len(found), 1.0)
            except BrokerUnavailableError:
                await asyncio.sleep(0.1)  # as the portable layer backs off
    return found


async def insist(producer: ProducerDriver, number: int) -> Receipt:
    """Publish a message until it is confirmed, as an application would."""
    async with asyncio.timeout(60):
        while True:
            try:
                (outcome,) = await producer.publish([message(number)], LIMIT)
            except BrokerUnavailableError:
                await asyncio.sleep(0.1)  # as the portable layer backs off
                continue
            if isinstance(outcome, Receipt):
                return outcome


def test_a_killed_member_loses_nothing_and_what_it_settled_stays_settled() -> None:
    """After SIGKILL only what was unsettled comes, each alone, with its next attempt, at once."""

    async def test() -> None:
        async with opened(url() + QUICK) as here:
            await here.topic()
            group = await here.group()
            async with worker(here.name, settle_every=2) as victim:
                await here.publish(20)
                told = [await victim.line() for _ in range(20)]
                heir = await here.join(group)
                victim.process.send_signal(signal.SIGKILL)
                started = time.monotonic()
                kept = [one["id"] for one in told if not one["acked"]]
                assert len(kept) == 10
                rest = []
                for _ in kept:
                    deliveries = await take(heir, 1, 100)
                    rest += deliveries
                    await end(heir, deliveries)

                assert time.monotonic() - started < here.driver.capabilities.lease.recover_within + LATE
                assert sorted(ids(rest), key=int) == kept
                assert {(delivery.attempt, delivery.suspect) for delivery in rest} == {(2, True)}
                assert (await here.driver.lag(here.name, "g")).messages == 0
                await heir.close()

    run(test)


@pytest.mark.parametrize("ordering", ["none", "key"])
def test_a_message_that_kills_its_members_is_counted_every_time_and_its_neighbours_once(ordering: str) -> None:
    """The attempt rises with every member that dies of it; messages prefetched beside it get one attempt more, once."""

    async def test() -> None:
        async with opened(url() + QUICK) as here:
            await here.topic(ordering=ordering)
            group = await here.group(ordering=ordering)
            for attempt in (1, 2, 3):
                async with worker(here.name, ordering=ordering) as victim:
                    if attempt == 1:
                        await here.publish(3)
                    told = await victim.line()
                    while told["id"] != "0":
                        told = await victim.line()
                    assert told == {"id": "0", "attempt": attempt, "acked": False}
                    victim.process.send_signal(signal.SIGKILL)
                    await victim.process.wait()
            heir = await here.join(group)
            deliveries = []
            for _ in range(3):
                one = await take(heir, 1, 100)
                deliveries += one
                await end(heir, one)
            attempts = {delivery.message.id: delivery.attempt for delivery in deliveries}

            assert all(delivery.suspect for delivery in deliveries)
            assert attempts.pop("0") == 4
            assert set(attempts) == {"1", "2"}
            assert max(attempts.values()) <= 2
            await heir.close()

    run(test)


def test_order_by_key_survives_a_killed_member() -> None:
    """The heir of a killed member goes on with the first unsettled message of each key."""

    async def test() -> None:
        async with opened(url() + QUICK) as here:
            await here.topic(partitions=2, ordering="key")
            group = await here.group(ordering="key")
            async with worker(here.name, ordering="key", settle_every=1) as victim:
                heir = await here.join(group)
                for number in range(200):
                    key = b"k%d" % (number % 4)
                    await here.publish(1, first=number, key=key, partition=partition_for(key, 2))
                    if number == 100:
                        victim.process.send_signal(signal.SIGKILL)
                told = []
                assert victim.process.stdout is not None
                while text := await victim.process.stdout.readline():
                    told.append(json.loads(text))
                acked = [int(one["id"]) for one in told if one["acked"]]
                rest: list[RawDelivery] = []
                async with asyncio.timeout(60):
                    while (await here.driver.lag(here.name, "g")).messages:
                        deliveries = await receive(heir, 10, 0.5)
                        rest += deliveries
                        await end(heir, deliveries)

                got = [int(one.message.id) for one in rest]
                # The last ack of the killed member may not have reached the broker.
                assert set(acked) | set(got) == set(range(200))
                for key in range(4):
                    mine = [number for number in got if number % 4 == key]
                    assert mine == sorted(mine)
                await heir.close()

    run(test)


def test_a_frozen_member_is_put_out_and_fenced() -> None:
    """A member stopped beyond three heartbeats loses its loans; woken up it knows."""

    async def test() -> None:
        async with opened(url() + QUICK) as here:
            await here.topic()
            group = await here.group()
            async with worker(here.name) as zombie:
                await here.publish(2)
                told = [await zombie.line() for _ in range(2)]
                zombie.process.send_signal(signal.SIGSTOP)
                started = time.monotonic()
                heir = await here.join(group)
                first = await take(heir, 1)
                took = time.monotonic() - started
                await end(heir, first)
                second = await take(heir, 1)
                zombie.process.send_signal(signal.SIGCONT)
                lost = await zombie.line()

                assert took < here.driver.capabilities.lease.recover_within + LATE
                assert [one["attempt"] for one in told] == [1, 1]
                assert lost == {"lost": 2}
                assert {delivery.attempt for delivery in first + second} == {2}
                await end(heir, second)
                assert (await here.driver.lag(here.name, "g")).messages == 0
                await heir.close()

    run(test)


def test_everything_works_again_after_the_server_was_killed(server: Server) -> None:
    """Confirmed messages, acks, delays and registry survive kill -9; producer and member are back without help."""

    async def test() -> None:
        async with opened(server.url + QUICK + "&creation_settles=1.5") as here:
            await here.topic()
            group = await here.group()
            consumer = await here.join(group)
            producer = await here.driver.producer(await here.driver.topic(here.name))
            await producer.publish([message(number) for number in range(6)], LIMIT)
            held = await take(consumer, 6)
            await end(consumer, held[:2])
            await end(consumer, held[2:3], Verb.NACK, 3.0)
            while (await here.driver.lag(here.name, "g")).messages > 3:
                pass  # until the nacked message is put aside; each look is a round trip
            await asyncio.to_thread(server.kill9)
            with pytest.raises(BrokerUnavailableError):
                await receive(consumer, 10, LIMIT)
            with pytest.raises(BrokerUnavailableError):
                await here.driver.ping()
            with pytest.raises(BrokerUnavailableError):
                await producer.publish([message(6)], LIMIT)
            await asyncio.to_thread(server.start)
            await insist(producer, 6)
            await here.driver.ping()
            seen: dict[str, int] = {}
            while len(seen) < 5:
                for delivery in await patient(consumer, 1):
                    assert await settle(consumer, [delivery]) == [None]
                    seen[delivery.message.id] = delivery.attempt

            assert seen == {"2": 2, "3": 2, "4": 2, "5": 2, "6": 1}
            assert sorted(here.ended) == sorted(delivery.token for delivery in held[3:])
            assert await here.driver.groups(here.name) == [group]
            await producer.close()
            await consumer.close()

    run(test)


def test_a_frozen_server_is_noticed_and_forgiven(server: Server) -> None:
    """A server stopped for longer than every patience: outcomes are right, and all goes on when it wakes up."""

    async def test() -> None:
        async with opened(server.url + QUICK) as here:
            await here.topic()
            consumer = await here.join(await here.group())
            producer = await here.driver.producer(await here.driver.topic(here.name))
            await asyncio.to_thread(server.pause)
            try:
                started = time.monotonic()
                (unknown,) = await producer.publish([message(0)], LIMIT)
                assert time.monotonic() - started < here.driver.capabilities.lease.dead_peer_after + LATE
                assert type(unknown) is PublishUnknownError
                with pytest.raises(BrokerUnavailableError):
                    await receive(consumer, 1, LIMIT)
            finally:
                await asyncio.to_thread(server.resume)
            await insist(producer, 1)
            got = set()
            while "1" not in got:
                deliveries = await patient(consumer, 1)
                got |= set(ids(deliveries))
                await settle(consumer, deliveries)

            assert got <= {"0", "1"}
            await producer.close()
            await consumer.close()

    run(test)


def test_an_alarm_stops_publishing_and_nothing_else(server: Server) -> None:
    """While memory is short publishing is unavailable, and ping says so; lending, acks and nacks go on."""

    def limit(bytes_: int) -> None:
        environment = dict(
            part.split("=", 1)
            for part in Path(f"/proc/{Process.of(server.pid).pid}/environ").read_text().split("\0")
            if part
        )
        subprocess.run(
            ["/usr/lib/rabbitmq/bin/rabbitmqctl", "set_vm_memory_high_watermark", "absolute", str(bytes_)],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )

    async def test() -> None:
        async with opened(server.url + "?heartbeat=5&connect_timeout=2") as here:
            await here.topic()
            consumer = await here.join(await here.group())
            producer = await here.driver.producer(await here.driver.topic(here.name))
            await producer.publish([message(number) for number in range(4)], LIMIT)
            held = await take(consumer, 4)
            await asyncio.to_thread(limit, 1_000_000)
            try:
                (unknown,) = await producer.publish([message(4)], 2.0)
                assert type(unknown) is PublishUnknownError
                with pytest.raises(BrokerUnavailableError, match="takes no messages"):
                    await producer.publish([message(5)], 2.0)
                with pytest.raises(BrokerUnavailableError, match="takes no messages"):
                    await here.driver.ping()
                await end(consumer, held[:2])
                await end(consumer, held[2:3], Verb.NACK)
                await end(consumer, held[3:], Verb.NACK, 0.5)
                again = []
                for _ in range(2):
                    deliveries = await take(consumer, 1)
                    again += deliveries
                    await end(consumer, deliveries)
                assert ids(again) == ["2", "3"]
                assert {delivery.attempt for delivery in again} == {2}
            finally:
                await asyncio.to_thread(limit, 1_000_000_000)
            await insist(producer, 6)
            await here.driver.ping()
            rest = await take(consumer, 2)

            assert ids(rest) == ["4", "6"]
            await end(consumer, rest)
            await producer.close()
            await consumer.close()

    run(test)


def test_an_attempt_to_connect_is_given_up_without_a_complaint_of_the_loop() -> None:
    """Cancelled while the server is still silent, it closes the connection, and no callback of pika fails."""

    async def test() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        accepted, ended = asyncio.Event(), asyncio.Event()

        async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set()
            await reader.read()
            writer.close()
            ended.set()

        async with asyncio.timeout(LIMIT), await asyncio.start_server(silence, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            entering = asyncio.create_task(unistream.connect(f"amqp://{host}:{port}").__aenter__())
            await accepted.wait()
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            await ended.wait()
            await spin()
        assert complaints == []

    run(test)


def test_an_idle_member_costs_next_to_nothing() -> None:
    """Members of a shared and of an ordered group that wait take less than 1 % of a core each."""

    async def test() -> None:
        async with opened() as here:
            await here.topic(partitions=4, ordering="key")
            consumers = [await here.join(await here.group("a")), await here.join(await here.group("b", ordering="key"))]
            process = psutil.Process()
            used = []
            for _ in range(3):  # the least of three: what a machine full of other work adds is not the member's
                before = sum(process.cpu_times()[:2])
                await asyncio.gather(*(receive(consumer, 10, 2.0) for consumer in consumers))
                used.append(sum(process.cpu_times()[:2]) - before)

            assert min(used) < 2.0 * 0.02
            for consumer in consumers:
                await consumer.close()

    run(test)
