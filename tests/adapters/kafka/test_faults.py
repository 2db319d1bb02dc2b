"""Faults on a real Kafka: members that die or freeze, networks that fail, brokers that restart or stop answering."""

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
from kafka.admin import KafkaAdminClient, MemberToRemove

from tests.adapters.kafka.support import LIMIT, end, ids, message, opened, proxied, receive, run, settle, take, url
from tests.brokers.fleet import local
from tests.brokers.server import Server
from unistream.core.partitions import partition_for
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import RawDelivery, Receipt, Settlement, SettleOutcome, Verb
from unistream.errors import BrokerUnavailableError, LeaseLostError, PublishUnknownError, SettleError

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

SESSION = 3.0
QUICK = f"?session_timeout={SESSION}&dead_peer_after=2&connect_timeout=2"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Kafka of this module's own, to be stopped and frozen."""
    with local("kafka", tmp_path_factory.mktemp("kafka")) as broker:
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
        "tests.adapters.kafka.worker",
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
    """Receive until `count` came, through times in which the cluster is out of reach."""
    found: list[RawDelivery] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            try:
                found += await receive(consumer, count - len(found), 1.0)
            except BrokerUnavailableError:
                await asyncio.sleep(0.1)  # as the portable layer backs off
    return found


def test_a_killed_member_loses_nothing_and_what_it_settled_stays_settled() -> None:
    """After SIGKILL only what was unsettled comes, each alone, with its next attempt, within session and rebalance."""

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

                assert time.monotonic() - started < here.driver.capabilities.lease.recover_within + 5
                assert sorted(ids(rest), key=int) == kept
                assert {(delivery.attempt, delivery.suspect) for delivery in rest} == {(2, True)}
                assert await here.driver.lag(here.name, "g") == (0, True)
                await heir.close()

    run(test)


def test_a_message_that_kills_its_members_is_counted_every_time() -> None:
    """The attempt rises with every member that dies of it, and messages prefetched beside it are counted once."""

    async def test() -> None:
        async with opened(url() + QUICK) as here:
            await here.topic()
            group = await here.group()
            await here.publish(0)
            for attempt in (1, 2, 3):
                async with worker(here.name) as victim:
                    if attempt == 1:
                        await here.publish(3)
                    told = await victim.line()
                    while told["id"] != "0":
                        told = await victim.line()
                    assert told == {"id": "0", "attempt": attempt, "acked": False}
                    victim.process.send_signal(signal.SIGKILL)
                    await victim.process.wait()
            heir = await here.join(group)
            (first,) = await take(heir, 1, 100)
            await end(heir, [first])
            others = await take(heir, 1, 100) + await take(heir, 1, 100)

            assert (first.message.id, first.attempt, first.suspect) == ("0", 4, True)
            assert all(other.attempt <= 2 for other in others)
            await heir.close()

    run(test)


def test_order_by_key_survives_a_killed_member() -> None:
    """The heir of a killed member goes on with the first unsettled message of each key."""

    async def test() -> None:
        async with opened(url() + QUICK) as here:
            await here.topic(partitions=2, ordering="key")
            group = await here.group(ordering="key")
            for number in range(40):
                key = b"k%d" % (number % 4)
                await here.publish(1, first=number, key=key, partition=partition_for(key, 2))
            async with worker(here.name, ordering="key", settle_every=1):
                pass
            async with worker(here.name, ordering="key", settle_every=1) as victim:
                heir = await here.join(group)
                victim.process.send_signal(signal.SIGKILL)
                rest: list[RawDelivery] = []
                async with asyncio.timeout(60):
                    while (await here.driver.lag(here.name, "g")).messages:
                        deliveries = await receive(heir, 10, 1.0)
                        rest += deliveries
                        await end(heir, deliveries)

                for key in range(4):
                    mine = [int(one.message.id) for one in rest if one.message.key == b"k%d" % key]
                    assert mine == sorted(mine)
                await heir.close()

    run(test)


def test_a_frozen_member_is_put_out_and_fenced() -> None:
    """A member stopped beyond its session loses its partition; what it settles after waking up is refused."""

    async def test() -> None:
        async with opened(url() + QUICK) as here:
            await here.topic()
            group = await here.group()
            async with worker(here.name) as zombie:
                await here.publish(2)
                told = [await zombie.line() for _ in range(2)]
                zombie.process.send_signal(signal.SIGSTOP)
                heir = await here.join(group)
                first = await take(heir, 1)
                await end(heir, first)
                second = await take(heir, 1)
                zombie.process.send_signal(signal.SIGCONT)
                lost = await zombie.line()

                assert [one["attempt"] for one in told] == [1, 1]
                assert lost == {"lost": 2}
                assert sorted(ids(first + second)) == ["0", "1"]
                assert {delivery.attempt for delivery in first + second} == {2}
                # The woken member joins again; the loan of the heir is settled by the heir alone.
                await end(heir, second)
                assert await here.driver.lag(here.name, "g") == (0, True)
                await heir.close()

    run(test)


def test_a_member_without_a_network_knows_that_its_loans_ended() -> None:
    """Behind a dead network loans are lost before the broker gives them to others; afterwards everything works."""

    async def test() -> None:
        async with proxied(QUICK) as (here, proxy), opened(url() + QUICK) as there:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(3)
            held = await take(one, 3)
            proxy.freeze()
            there.name, name = here.name, there.name
            two = await there.join(group)
            again = await take(two, 1)

            assert sorted(here.ended) == sorted(delivery.token for delivery in held)
            assert all(isinstance(outcome, LeaseLostError) for outcome in await settle(one, held))
            await end(two, again)
            for _ in range(2):
                deliveries = await take(two, 1)
                await end(two, deliveries)
            proxy.heal()
            await two.close()
            await there.publish(2, first=3)
            rest = await patient(one, 2)
            assert ids(rest) == ["3", "4"]
            await end(one, rest)
            await one.close()
            there.name = name

    run(test)


def test_a_cut_connection_loses_no_settle() -> None:
    """Settles whose connection is cut are asked for again, and then stand; nothing settled comes again."""

    async def test() -> None:
        async with proxied(QUICK) as (here, proxy):
            await here.topic()
            group = await here.group()
            consumer = await here.join(group)
            await here.publish(60)
            held = await take(consumer, 60)
            for at in range(0, 60, 10):
                settling = asyncio.create_task(settle(consumer, held[at : at + 10]))
                await asyncio.sleep(0)
                proxy.cut()
                async with asyncio.timeout(LIMIT):
                    while True:
                        try:
                            outcomes = await settling
                            break
                        except BrokerUnavailableError:
                            await asyncio.sleep(0.05)  # as the portable layer backs off
                            settling = asyncio.create_task(settle(consumer, held[at : at + 10]))
                assert outcomes == [None] * 10
            assert await here.driver.lag(here.name, "g") == (0, True)
            await here.publish(1, first=60)
            assert ids(await patient(consumer, 1)) == ["60"]
            await consumer.close()

    run(test)


def test_a_settle_is_under_way_before_its_answer_is_awaited() -> None:
    """The first commit after a settle holds it and answers it, also when nothing can be sent any more by then."""

    async def test() -> None:
        async with proxied(QUICK) as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            (held,) = await take(consumer, 1)
            answer = consumer.settle([Settlement(held.token, Verb.ACK)])
            async with asyncio.timeout(LIMIT):
                left = 1
                while left:
                    left, _ = await here.driver.lag(here.name, "g")
            proxy.refuse = True
            proxy.cut()

            assert not isinstance(answer, list)
            assert await answer == [None]
            proxy.heal()
            await consumer.close()

    run(test)


def test_a_settle_whose_answer_is_lost_with_the_membership_is_unknown() -> None:
    """Where Kafka stored a settle, and its answer and then the membership were lost, it does not count as refused."""

    async def test() -> None:
        async with proxied(QUICK) as (here, proxy):
            await here.topic()
            consumer = await here.join(await here.group())
            await here.publish(1)
            (held,) = await take(consumer, 1)
            proxy.deaf = True
            with pytest.raises(BrokerUnavailableError):
                await settle(consumer, [held])
            await asyncio.to_thread(put_out, f"{here.name}.g")
            proxy.heal()
            proxy.cut()
            async with asyncio.timeout(LIMIT):
                outcomes: list[SettleOutcome] = []
                while not outcomes:
                    try:
                        outcomes = await settle(consumer, [held])
                    except BrokerUnavailableError:
                        await asyncio.sleep(0.05)  # as the portable layer backs off

            assert [type(outcome) for outcome in outcomes] == [SettleError]
            await consumer.close()

    run(test)


def put_out(group: str) -> None:
    """Take a group's members out of it, past the proxy."""
    admin = KafkaAdminClient(bootstrap_servers=url().removeprefix("kafka://"))
    leavers = [MemberToRemove(member["member_id"]) for member in admin.describe_groups([group])[group]["members"]]
    if leavers:  # else its session is over already
        admin.remove_group_members(group, leavers)
    admin.close()


def test_a_frozen_broker_never_wedges_the_producer(server: Server) -> None:
    """
    A broker frozen for longer than every deadline, then resumed: outcomes are right, and publishing goes on.

    kafka-python's own deadline would leave the producer without a word for ever.
    """

    async def test() -> None:
        async with opened(server.url + "?dead_peer_after=2&connect_timeout=2&session_timeout=3") as here:
            producer = await here.driver.producer(await here.topic(partitions=2))
            batch = [message(number, partition=number % 2) for number in range(50)]
            await producer.publish(batch[:10], LIMIT)
            await asyncio.to_thread(server.pause)
            try:
                calls = [
                    asyncio.ensure_future(producer.publish(batch[at : at + 20], 3.0))  # type: ignore[arg-type]
                    for at in (10, 30)
                ]
                started = time.monotonic()
                done = await asyncio.gather(*calls)
                assert time.monotonic() - started < 5
                assert {type(outcome) for outcomes in done for outcome in outcomes} == {PublishUnknownError}
                await asyncio.sleep(5)  # twice the client's own patience with a request
                cpu = psutil.Process().cpu_percent()
                await asyncio.sleep(2)
                cpu = psutil.Process().cpu_percent()
            finally:
                await asyncio.to_thread(server.resume)
            async with asyncio.timeout(LIMIT):
                while True:
                    try:
                        outcomes = await producer.publish([message(50 + n, partition=n % 2) for n in range(10)], LIMIT)
                        break
                    except BrokerUnavailableError:
                        await asyncio.sleep(0.1)  # as the portable layer backs off
            stored = [int(one.value) for one in await here.stored(2)]

            assert all(isinstance(outcome, Receipt) for outcome in outcomes)
            assert len(stored) == len(set(stored)), "an unknown message was stored twice"
            assert set(range(10)) | set(range(50, 60)) <= set(stored) <= set(range(60))
            assert cpu < 50, "the client spins while the broker is frozen"
            await producer.close()

    run(test)


def test_everything_works_again_after_the_broker_restarts(server: Server) -> None:
    """A restarted broker gets the producer, the member and the control connection back without help."""

    async def test() -> None:
        async with opened(server.url + QUICK) as here:
            await here.topic(partitions=2)
            group = await here.group()
            consumer = await here.join(group)
            producer = await here.driver.producer(await here.driver.topic(here.name))
            await producer.publish([message(number, partition=number % 2) for number in range(6)], LIMIT)
            held = await take(consumer, 6)
            await end(consumer, held[:3])
            await asyncio.to_thread(server.kill9)
            with pytest.raises(BrokerUnavailableError):
                await receive(consumer, 10, LIMIT)
            with pytest.raises(BrokerUnavailableError):
                await here.driver.ping()
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(LIMIT):
                while True:
                    try:
                        outcomes = await producer.publish([message(n, partition=n % 2) for n in range(6, 10)], LIMIT)
                        await here.driver.ping()
                        break
                    except BrokerUnavailableError:
                        await asyncio.sleep(0.1)  # as the portable layer backs off

            assert all(isinstance(outcome, Receipt) for outcome in outcomes)
            seen = {delivery.message.id for delivery in held[:3]}
            async with asyncio.timeout(60):
                while len(seen) < 10:
                    for delivery in await patient(consumer, 1):
                        assert delivery.message.id not in seen
                        if await settle(consumer, [delivery]) == [None]:
                            seen.add(delivery.message.id)
            assert await here.driver.lag(here.name, "g") == (0, True)
            await producer.close()
            await consumer.close()

    run(test)


def test_an_idle_member_costs_next_to_nothing() -> None:
    """A member that waits, and one that nobody asks, take less than 2 % of a core together with their heartbeats."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            consumer = await here.join(group)
            process = psutil.Process()
            await receive(consumer, 10, 1.0)
            for asked in (True, False):
                used = []
                for _ in range(3):  # the least of three: what a machine full of other work adds is not the member's
                    before = sum(process.cpu_times()[:2])
                    await (receive(consumer, 10, 2.0) if asked else asyncio.sleep(2.0))
                    used.append(sum(process.cpu_times()[:2]) - before)

                assert min(used) < 2.0 * 0.02
            assert await settle(consumer, [], Verb.ACK) == []
            await consumer.close()

    run(test)
