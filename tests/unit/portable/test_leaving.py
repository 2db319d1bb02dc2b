"""Closing consumers, running handlers, and what is given back (END-1, END-2, DEL-11)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any

import pytest

import unistream
from tests.unit.portable.scripted import Script, connected, raising, spin
from tests.unit.portable.test_consuming import LEASE, joined
from unistream._registry import find_driver
from unistream._turns import follow
from unistream.conformance.clock import run
from unistream.driver.checked import checked
from unistream.driver.types import Verb
from unistream.errors import BrokerUnavailableError, ClosedError, ConfigError, GroupMissingError, LeaseLostError


def test_close_gives_back_what_is_held_and_says_so() -> None:
    """Unsettled deliveries, handed out or not, are released at once; the report counts them; iteration ends."""

    async def main() -> None:
        script = Script()
        async with joined(script) as consumer:
            script.lend(*(b"%d" % i for i in range(10)))
            held = await consumer.receive_many(4)
            await held[0].ack()
            await held[1].nack(1)
            waiting = asyncio.create_task(_count(consumer))
            report = await consumer.close()
            assert report == (2, 8, 0)
            assert [verb for _, verb in script.verbs].count(Verb.RELEASE) == 8
            assert await waiting <= 6
            assert await consumer.close() == report
            with pytest.raises(ClosedError):
                await consumer.receive()
            with pytest.raises(LeaseLostError):
                await held[2].ack()

    async def _count(consumer: unistream.Consumer) -> int:
        return len([delivery async for delivery in consumer])

    run(main())


def test_drain_waits_for_what_is_handed_out_and_no_longer() -> None:
    """Settled in time: handled. Not settled: given back when `drain` has passed."""

    async def main(settled_after: float, expected: tuple[int, int, int], took: float) -> None:
        script = Script()
        loop = asyncio.get_running_loop()
        async with joined(script) as consumer:
            script.lend(b"1", b"2")
            delivery = await consumer.receive()
            assert delivery is not None
            began = loop.time()
            loop.call_later(settled_after, lambda: settling.append(asyncio.ensure_future(delivery.ack())))
            settling: list[asyncio.Future[None]] = []
            assert await consumer.close(drain=5) == expected
            assert loop.time() - began == pytest.approx(took)
            await asyncio.sleep(20)
            await asyncio.gather(*settling, return_exceptions=True)

    run(main(2, (1, 1, 0), 2))
    run(main(10, (0, 2, 0), 5))


def test_cancelling_a_drain_gives_the_rest_back_at_once() -> None:
    """Also when it is cancelled twice: the loans are released and the driver is closed before it ends."""

    async def main() -> None:
        script = Script()
        loop = asyncio.get_running_loop()
        async with joined(script) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            began = loop.time()
            closing = asyncio.create_task(consumer.close(drain=1000))
            await spin()
            closing.cancel()
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            assert closing.cancelled()
            await spin()
            assert script.verbs == [(1, Verb.RELEASE)]
            assert (await consumer.close()).returned == 1
            assert loop.time() == began

    run(main())


@pytest.mark.parametrize("settle", [lambda batch: raising(BrokerUnavailableError("away")), lambda batch: _never()])
def test_leaving_a_broker_that_is_away_ends_and_abandons(settle: Any) -> None:
    """What can't be given back is counted as abandoned, and closing ends within seconds, also if the driver hangs."""

    async def main() -> None:
        script = Script()
        loop = asyncio.get_running_loop()
        async with joined(script) as consumer:
            script.lend(b"1", b"2", b"3")
            await consumer.receive_many(2)
            script.settle = settle
            began = loop.time()
            report = await consumer.close()
            assert (report.returned, report.abandoned) == (0, 3)
            assert loop.time() - began < 15

    run(main())


def test_leaving_does_not_wait_for_a_burial_that_gets_nowhere() -> None:
    """A dead letter under way is given a few seconds; then its message is given back, once, and nothing is left."""

    async def main() -> None:
        script = Script()
        loop = asyncio.get_running_loop()
        async with joined(script, retry=unistream.Retry(1), dead_letter="dead") as consumer:
            script.lend(b"poison", attempt=2)
            script.lend(b"other")
            other = await consumer.receive()
            assert other is not None
            rejecting = asyncio.create_task(other.reject("x"))
            await spin()
            began = loop.time()
            report = await consumer.close()
            assert loop.time() - began < 12
            assert report == (0, 2, 0)
            with pytest.raises(LeaseLostError):
                await rejecting
            assert {token for token, verb in script.verbs if verb is Verb.RELEASE} == {1, 2}

    run(main())


def test_run_settles_by_how_the_handler_ends() -> None:
    """Return acks, Reject rejects, anything else nacks, a cancellation inside a handler too; `run` goes on."""

    async def main() -> None:
        script = Script()
        ended: list[bytes] = []

        async def handler(delivery: unistream.Delivery) -> None:
            ended.append(delivery.value)
            if delivery.value == b"reject":
                raise unistream.Reject("bad")
            if delivery.value == b"fail":
                raise ValueError("x")
            if delivery.value == b"cancelled":
                raise asyncio.CancelledError
            if delivery.value == b"own":
                await delivery.nack(7)

        async with connected(script) as client:
            running = asyncio.create_task(client.group("g", "t", lease=LEASE).run(handler))
            await spin()
            script.lend(b"ok", b"reject", b"fail", b"cancelled", b"own", b"last")
            await asyncio.sleep(1)
            assert ended[-1] == b"last"
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            kinds = [verb for _, verb in sorted(script.verbs, key=lambda pair: pair[0])]
            assert kinds == [Verb.ACK, Verb.ACK, Verb.NACK, Verb.NACK, Verb.NACK, Verb.ACK]

    run(main())


def test_run_has_exactly_as_many_handlers_as_asked() -> None:
    """With enough messages `concurrency` handlers run at every moment, and never one more."""

    async def main() -> None:
        script = Script()
        now: list[int] = []
        running = 0

        async def handler(delivery: unistream.Delivery) -> None:
            nonlocal running
            running += 1
            now.append(running)
            await asyncio.sleep(1 + len(now) % 3)
            running -= 1

        async with connected(script) as client:
            script.lend(*(b"%d" % i for i in range(40)))
            task = asyncio.create_task(client.group("g", "t", lease=LEASE).run(handler, concurrency=4))
            await asyncio.sleep(60)
            assert (max(now), len(now)) == (4, 40)
            assert now[3:] == [4] * 37
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(ConfigError):
                await client.group("g", "t").run(handler, concurrency=0)
            with pytest.raises(ConfigError):
                await client.group("g", "t").run(handler, max_in_flight=0)

    run(main())


def member(client: unistream.Client) -> unistream.Consumer:
    """The one consumer that a `run` has opened."""
    [consumer] = [part for part in client._parts if isinstance(part, unistream.Consumer)]
    return consumer


def test_cancelled_run_lets_handlers_finish_until_drain_then_gives_back() -> None:
    """Handlers that end in time are acked; those that do not are cancelled, their messages returned, none counted."""

    async def main() -> None:
        script = Script()
        consumers: list[unistream.Consumer] = []

        async def handler(delivery: unistream.Delivery) -> None:
            consumers.append(member(client))
            await asyncio.sleep(3 if delivery.value == b"quick" else 1000)

        async with connected(script) as client:
            script.lend(b"quick", b"slow")
            group = client.group("g", "t", lease=LEASE)
            task = asyncio.create_task(group.run(handler, concurrency=2, drain=10))
            await asyncio.sleep(1)
            began = asyncio.get_running_loop().time()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.get_running_loop().time() - began == pytest.approx(10)
            assert dict(script.verbs) == {1: Verb.ACK, 2: Verb.RELEASE}
            assert consumers[0].stats.acks_lost == 0

    run(main())


def test_close_from_inside_a_handler_does_not_wait_for_it() -> None:
    """Handlers that close their consumer, one or several, end the run at once; `run` returns the report."""

    async def main() -> None:
        script = Script()

        async def handler(delivery: unistream.Delivery) -> None:
            await asyncio.sleep(1 if delivery.value == b"1" else 2)
            await delivery.ack()
            await member(client).close(drain=100)

        async with connected(script) as client:
            script.lend(b"1", b"2")
            began = asyncio.get_running_loop().time()
            report = await client.group("g", "t", lease=LEASE).run(handler, concurrency=2)
            assert report.handled == 2
            assert asyncio.get_running_loop().time() - began < 5

    run(main())


def test_handlers_that_all_close_unsettled_do_not_wait_for_each_other() -> None:
    """The second handler that calls `close` is not waited for either, though the drain had begun."""

    async def main() -> None:
        script = Script()

        async def handler(delivery: unistream.Delivery) -> None:
            await asyncio.sleep(0 if delivery.value == b"1" else 1)
            await member(client).close(drain=100)

        async with connected(script) as client:
            script.lend(b"1", b"2")
            began = asyncio.get_running_loop().time()
            report = await client.group("g", "t", lease=LEASE).run(handler, concurrency=2)
            assert report.returned == 2
            assert asyncio.get_running_loop().time() - began < 5

    run(main())


def test_run_ends_with_the_error_when_its_group_is_deleted() -> None:
    """GRP-7: one GroupMissingError, however many workers waited; nothing goes unlooked at."""

    async def main() -> None:
        script = Script()
        script.receive = lambda limit, timeout: raising(GroupMissingError("gone"))
        async with connected(script) as client:
            with pytest.raises(GroupMissingError):
                await client.group("g", "t", lease=LEASE).run(_ignore, concurrency=5)

    run(main())


def test_closing_the_client_ends_a_run() -> None:
    """`Client.close`, also from a handler, ends `run` with a report."""

    async def main(inside: bool) -> None:
        script = Script()

        async def handler(delivery: unistream.Delivery) -> None:
            if inside:
                await delivery.ack()
                await client.close()

        async with connected(script) as client:
            script.lend(b"1")
            task = asyncio.create_task(client.group("g", "t", lease=LEASE).run(handler))
            await asyncio.sleep(1)
            if not inside:
                await client.close()
            assert (await task).handled == 1

    run(main(True))
    run(main(False))


def test_a_stop_and_start_under_load_strands_nothing_on_the_reference_broker() -> None:
    """Twenty members one after another, each closed in the middle: together they handle everything once."""

    async def main() -> None:
        driver = checked(find_driver("memory"))
        async with unistream.connect("memory://", driver=driver) as client:
            await client.create_topic("t")
            group = client.group("g", "t", lease=LEASE)
            await group.create()
            async with client.producer("t") as producer:
                await producer.publish_many([b"%d" % i for i in range(200)])
            handled: list[bytes] = []
            for turn in range(20):
                async with group.consumer(max_in_flight=50) as consumer:
                    for delivery in await consumer.receive_many(10 + turn, timeout=1):
                        if len(handled) % 7:
                            await delivery.ack()
                            handled.append(delivery.value)
                        else:
                            handled.append(delivery.value)
                            await delivery.ack(confirm=True)
            assert sorted(handled) == sorted(b"%d" % i for i in range(200))
            assert (await group.lag()).messages == 0

    run(main())


async def _ignore(delivery: unistream.Delivery) -> None:
    return


async def _never() -> Any:
    await asyncio.get_running_loop().create_future()


def test_an_answer_that_nobody_began_to_await_is_closed() -> None:
    """A task that is cancelled before its first step, as at the end of a loop, leaves nothing that complains."""

    async def answer() -> None:
        raise AssertionError("never begun")

    async def following(answer: Awaitable[None]) -> None:
        await answer

    async def main() -> None:
        coming = answer()
        ended: list[asyncio.Task[None]] = []
        task = follow(following(coming), coming, ended.append)
        task.cancel()
        await asyncio.wait([task])
        await spin()
        assert ended == [task]
        assert inspect.getcoroutinestate(coming) == inspect.CORO_CLOSED

    asyncio.run(main())
