"""The client's own life: opening, entering, closing, health, events; nothing leaks, nothing hides (END)."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import pytest

import unistream
from tests.unit.portable.scripted import Script, connected, raising, spin
from unistream import capabilities as can
from unistream.conformance.clock import run
from unistream.driver.types import DataLoss
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ClosedError,
    ConfigError,
    TopicMissingError,
    UnsupportedError,
)


@pytest.mark.parametrize("close_fails", [True, False])
def test_a_driver_that_can_not_be_opened_is_closed_and_its_error_shown(close_fails: bool) -> None:
    """The error of `open` comes out, also when `close` raises too; the client is closed afterwards."""

    async def main() -> None:
        script = Script(on_open=lambda: raising(AccessError("denied")))
        if close_fails:
            script.on_close = lambda: 1 / 0  # type: ignore[assignment]
        client = unistream.connect("scripted://", driver=script.driver())
        with pytest.raises(AccessError):
            await client.__aenter__()
        assert script.closed == 1
        for use in (client.topics, client.health, client.close):
            if use is client.topics:
                with pytest.raises(ClosedError):
                    await use()
        with pytest.raises(ClosedError):
            _ = client.capabilities
        assert (await client.health()).state == "closed"
        await client.close()
        assert script.closed == 1

    run(main())


def test_cancelled_while_opening_leaves_nothing_open() -> None:
    """Cancelling the entry of a client closes its driver."""

    async def main() -> None:
        script = Script(on_open=_never)
        client = unistream.connect("scripted://", driver=script.driver())
        entering = asyncio.create_task(client.__aenter__())
        await spin()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert script.closed == 1

    run(main())


def test_what_is_required_is_checked_at_open() -> None:
    """A need that is not met, or not a capability, fails at open with the names, and the driver is closed."""

    async def main() -> None:
        for need, kind, words in (
            ({"dedupe": True}, UnsupportedError, "dedupe"),
            ({"durability": "fsync"}, UnsupportedError, "durability"),
            ({"durabilty": "fsync"}, ConfigError, "did you mean 'durability'"),
            ({"durability": "very"}, ConfigError, "replicated"),
        ):
            script = Script(capabilities={"durability": can.Durability(kind="process_crash")})
            with pytest.raises(kind, match=words):
                await unistream.connect("scripted://", driver=script.driver(), require=need).__aenter__()
            assert script.closed == 1
        script = Script(capabilities={"durability": can.Durability(kind="replicated", copies=3)})
        needs = {"durability": "replicated(3)", "ordering": "key", "seek": True, "start": ["earliest", "time"]}
        async with unistream.connect("scripted://", driver=script.driver(), require=needs) as client:
            assert client.capabilities.durability.copies == 3

    run(main())


@pytest.mark.parametrize("part", ["producer", "consumer", "dead letters"])
def test_cancelled_or_closed_while_entering_leaves_nothing_open(part: str) -> None:
    """Producers and consumers whose entry is cut off, by their task or by closing the client, are not left behind."""

    async def main(by_close: bool) -> None:
        script = Script()
        hook = "on_producer" if part == "producer" else "on_consumer"
        setattr(script, hook, _never)
        async with connected(script) as client:
            entered: Any
            if part == "producer":
                entered = client.producer("t")
            else:
                entered = client.group("g", "t", dead_letter="d" if part == "dead letters" else None).consumer()
            entering = asyncio.create_task(entered.__aenter__())
            await spin()
            assert not entering.done()
            if by_close:
                await client.close()
                with pytest.raises(ClosedError):
                    await entering
            else:
                entering.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await entering
            assert script.open == []
            assert client._parts.links == {}

    run(main(True))
    run(main(False))


def test_closed_in_the_last_moment_of_entering_is_undone() -> None:
    """A part that was closed by somebody else while it opened closes what it opened."""

    async def main() -> None:
        for kind in ("producer", "consumer"):
            gate = asyncio.Event()
            script = Script(on_producer=gate.wait, on_consumer=gate.wait)  # type: ignore[arg-type]
            async with connected(script) as client:
                part: Any = client.producer("t") if kind == "producer" else client.group("g", "t").consumer()
                entering = asyncio.create_task(part.__aenter__())
                await spin()
                await part.close()
                gate.set()
                with pytest.raises(ClosedError):
                    await entering
                assert script.open == []

    run(main())


def test_a_part_that_can_not_be_entered_says_why() -> None:
    """TopicMissingError at open; twice entered, or entered after close, is a ClosedError; so is use before entry."""

    async def main() -> None:
        script = Script(missing={"gone"})
        async with connected(script) as client:
            with pytest.raises(TopicMissingError):
                await client.producer("gone").__aenter__()
            with pytest.raises(TopicMissingError):
                await client.group("g", "gone").consumer().__aenter__()
            producer = client.producer("t")
            with pytest.raises(ClosedError) as caught:
                await producer.publish(b"x")
            assert caught.value.stored == "no"
            async with producer:
                with pytest.raises(ClosedError):
                    await producer.__aenter__()
            consumer = client.group("g", "t").consumer()
            with pytest.raises(ClosedError):
                await consumer.receive()
            with pytest.raises(ClosedError):
                consumer.pause()
            await consumer.close()
            with pytest.raises(ClosedError):
                await consumer.__aenter__()
        for use in (client.topics, lambda: client.create_topic("x"), client.groups, lambda: client.delete_topic("x")):
            with pytest.raises(ClosedError):
                await use()
        with pytest.raises(ClosedError):
            await client.__aenter__()
        await client.close()

    run(main())


def test_one_part_that_fails_to_close_does_not_keep_the_others_open() -> None:
    """Every part and the driver are closed; the failures come out together, once."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: raising(unistream.NotPublishedError("no"))
        client = await unistream.connect("scripted://", driver=script.driver()).__aenter__()
        for _ in range(2):
            producer = await client.producer("t").__aenter__()
            await producer.submit(b"x")
        await client.group("g", "t").consumer().__aenter__()
        with pytest.raises(ExceptionGroup) as caught:
            await client.close()
        assert len(caught.value.exceptions) == 2
        assert (script.open, script.closed) == ([], 1)
        await client.close()

    run(main())


def test_closers_wait_for_each_other() -> None:
    """A second `close`, of a client or a producer, returns when the first is through; neither closes twice."""

    async def main() -> None:
        script = Script()
        client = await unistream.connect("scripted://", driver=script.driver()).__aenter__()
        producer = await client.producer("t").__aenter__()
        submitted = await producer.submit(b"x")
        await spin()
        closers = [asyncio.create_task(each()) for each in (producer.close, client.close, client.close)]
        await spin()
        assert not any(closer.done() for closer in closers)
        script.calls[0].answer()
        await asyncio.gather(*closers)
        assert submitted.done()
        assert script.closed == 1

    run(main())


def test_cancelling_close_gives_up_what_is_undecided() -> None:
    """A cancelled `close` of client or producer leaves nothing open and every message counted."""

    async def main(kind: str) -> None:
        script = Script()
        client = await unistream.connect("scripted://", driver=script.driver()).__aenter__()
        producer = await client.producer("t", max_unconfirmed=2).__aenter__()
        handed, waiting = await producer.submit(b"1"), await producer.submit(b"2")
        blocked = asyncio.create_task(producer.publish(b"3"))
        await spin()
        closing = asyncio.create_task(client.close() if kind == "client" else producer.close())
        await spin()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert script.open == []
        with pytest.raises(unistream.PublishUnknownError):
            await handed
        with pytest.raises(unistream.DroppedError):
            await waiting
        with pytest.raises(unistream.DroppedError):
            await blocked
        stats = producer.stats
        assert (stats.unknown, stats.dropped, stats.in_flight) == (1, 2, 0)
        await client.close()
        assert script.closed == 1

    run(main("client"))
    run(main("producer"))


def test_health_asks_the_broker_and_every_part() -> None:
    """Whatever `ping` raises is a failed check, not an exception; changes are events, once each."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            events = client.events()
            assert (await client.health()) == (True, "connected", (unistream.Check("connection", True),))
            for error, state in ((BrokerUnavailableError("away"), "reconnecting"), (AccessError("denied"), "failed")):

                def ping(error: Exception = error) -> None:
                    raise error

                script.ping = ping
                health = await client.health()
                assert (health.ok, health.state) == (False, state)
            script.ping = None
            assert (await client.health()).ok
            told = [await anext(events), await anext(events)]
            assert [getattr(one, "ok", None) for one in told] == [False, True]
            async with client.group("g", "t").consumer() as one, client.group("g", "t").consumer() as two:
                links = client._parts.links
                links[two].down(BrokerUnavailableError("away"))
                assert links[one].what == links[two].what
                assert isinstance(await anext(events), unistream.Disconnected)
                for _ in range(3):
                    await client.health()
                assert isinstance(await anext(events), unistream.HealthChanged)
                script.emit(DataLoss("t", "g", 3))  # type: ignore[misc]
                assert await anext(events) == DataLoss("t", "g", 3)

    run(main())


def test_listeners_hear_everything_until_the_end() -> None:
    """Several listeners, several callers of one, a cancelled one, an abandoned one; iteration ends with the client."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            first, second = client.events(), client.events()
            client.events()
            gc.collect()
            assert len(client._listeners._all) == 2
            waiting = [asyncio.create_task(_next(first)) for _ in range(3)]
            await spin()
            waiting[0].cancel()
            await spin()
            for count in range(2):
                script.emit(DataLoss("t", "g", count))  # type: ignore[misc]
            assert {(await task).count for task in waiting[1:]} == {0, 1}
            for count in range(2000):
                script.emit(DataLoss("t", "g", count))  # type: ignore[misc]
            late = asyncio.create_task(_next(first))
            await late
        rest = [event async for event in second]
        assert len(rest) == 1000
        assert rest[-1] == DataLoss("t", "g", 1999)
        assert [event async for event in first]

    async def _next(events: Any) -> Any:
        return await anext(events)

    run(main())


def test_declarations_out_of_range_are_config_errors_before_any_call() -> None:
    """Wrong types and values of topics and groups are named, and nothing reaches the driver."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            for settings in (
                {"partitions": 0},
                {"partitions": "8"},
                {"ordering": "keys"},
                {"overflow": "drop"},
                {"max_backlog": 0},
                {"retention": 60},
                {"retention": unistream.Retention(max_age=-1)},
                {"retention": unistream.Retention(max_age="1h")},  # type: ignore[arg-type]
            ):
                with pytest.raises(ConfigError):
                    await client.create_topic("x", **settings)
            for name in ("", "a/b", "x" * 201, "ä", None):
                with pytest.raises(ConfigError):
                    await client.create_topic(name)  # type: ignore[arg-type]
            for options in (
                {"lease": 0},
                {"lease": "60"},
                {"lease": float("nan")},
                {"lease": 60, "max_lease": 30},
                {"ordering": "keys"},
                {"start": 5},
                {"retry": unistream.Retry(3)},
                {"dead_letter": "t"},
                {"dead_letter": True},
                {"dead_letter": "a/b"},
            ):
                with pytest.raises(ConfigError):
                    client.group("g", "t", **options)

    run(main())


def test_a_forked_process_may_not_use_the_client() -> None:
    """After a fork every call is a ClosedError that says so."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t") as producer:
            assert "fork" in _asked_in_a_fork(producer)

    run(main())


def _asked_in_a_fork(producer: unistream.Producer) -> str:
    """What the error says that a forked child gets."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = b"no error"
        try:
            producer._here()
        except ClosedError as error:
            answer = str(error).encode()
        finally:
            os.write(writing, answer)
            os._exit(0)
    os.waitpid(pid, 0)
    answer = os.read(reading, 1000)
    os.close(reading)
    os.close(writing)
    return answer.decode()


async def _never() -> None:
    await asyncio.get_running_loop().create_future()


def test_cancelled_in_the_moment_of_having_entered_is_undone() -> None:
    """A part that had just been opened when its entry was cancelled is closed again."""

    async def main() -> None:
        gate = asyncio.Event()
        script = Script(on_producer=gate.wait)  # type: ignore[arg-type]
        async with connected(script) as client:
            entering = asyncio.create_task(client.producer("t").__aenter__())
            await spin()
            [opening] = client._parts._openings
            opening.add_done_callback(lambda _: entering.cancel())
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await entering
            assert script.open == []

    run(main())


def test_a_settle_that_gets_through_does_not_heal_a_deleted_group() -> None:
    """`health` stays failed, though the connection stands."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.group("g", "t").consumer() as consumer:
            link = client._parts.links[consumer]
            link.fail(unistream.GroupMissingError("gone"))
            link.up()
            link.down(BrokerUnavailableError("away"))
            assert (await client.health()).state == "failed"

    run(main())
