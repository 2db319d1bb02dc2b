"""Room in the window and what happens without it, on a virtual clock (PUB-2, PUB-5)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import unistream
from tests.unit.portable.scripted import Script, connected, spin
from unistream.conformance.clock import run
from unistream.errors import ClosedError, DroppedError, NotPublishedError, UnsupportedError, WindowFullError


def balanced(stats: unistream.ProducerStats) -> bool:
    """Whether every message is counted once."""
    return stats.confirmed + stats.failed + stats.unknown + stats.dropped + stats.in_flight == stats.published


@pytest.mark.parametrize("limits", [{"max_unconfirmed": 2}, {"max_unconfirmed_bytes": 10}])
def test_block_waits_for_room_in_turn(limits: dict[str, Any]) -> None:
    """A full window, of messages or of bytes, lets publishers in one by one, in the order in which they came."""

    async def main() -> None:
        script = Script(batch_messages=1)
        async with connected(script) as client, client.producer("t", **limits) as producer:
            tasks = [asyncio.create_task(producer.publish(b"%05d" % i)) for i in range(5)]
            await spin()
            seen = []
            for _ in range(5):
                assert producer._window.messages <= 2
                assert balanced(producer.stats)
                seen += script.calls[-1].values
                script.calls[-1].answer()
                await spin()
            assert [(await task).position for task in tasks] == [value.decode() for value in seen]
            assert seen == sorted(seen)
            assert producer.stats.confirmed == 5

    run(main())


def test_no_batch_takes_the_whole_window_from_the_others() -> None:
    """Of what waits, as many batches form as the driver takes at once: while one is confirmed others are under way."""

    async def main() -> None:
        script = Script(pipeline=2)
        async with connected(script) as client, client.producer("t", max_unconfirmed=8) as producer:
            publishing = asyncio.create_task(producer.publish_many([b"%d" % number for number in range(14)]))
            await spin()
            for call in script.calls:
                call.answer()
            await spin()
            assert [len(call.batch) for call in script.calls] == [1, 1, 4, 4]
            script.calls[2].answer()
            await spin()
            script.calls[3].answer()
            await spin()
            script.calls[4].answer()
            assert [len(call.batch) for call in script.calls[4:]] == [4]
            assert all(isinstance(outcome, unistream.Receipt) for outcome in await publishing)

    run(main())


def test_block_ends_with_the_timeout_and_frees_the_place() -> None:
    """After `timeout` seconds without room: WindowFullError, stored no; those behind move up."""

    async def main() -> None:
        script = Script()
        loop = asyncio.get_running_loop()
        async with connected(script) as client, client.producer("t", max_unconfirmed=1) as producer:
            first = asyncio.create_task(producer.publish(b"1", timeout=60))
            await spin()
            late = asyncio.create_task(producer.publish(b"2", timeout=3))
            patient = asyncio.create_task(producer.publish(b"3", timeout=60))
            began = loop.time()
            with pytest.raises(WindowFullError) as caught:
                await late
            assert loop.time() - began == pytest.approx(3)
            assert caught.value.stored == "no"
            assert balanced(producer.stats)
            script.calls[0].answer()
            await first
            await spin()
            script.calls[1].answer()
            assert (await patient).position == "3"
            stats = producer.stats
            assert (stats.published, stats.confirmed, stats.failed, stats.in_flight) == (3, 2, 1, 0)

    run(main())


def test_a_big_message_is_not_starved_by_small_ones() -> None:
    """Who waits first is served first, also when a later and smaller message would fit."""

    async def main() -> None:
        script = Script(batch_messages=1)
        async with connected(script) as client, client.producer("t", max_unconfirmed_bytes=10) as producer:
            small = await producer.submit(b"aaaa")
            big = asyncio.create_task(producer.publish(b"b" * 9))
            await spin()
            later = asyncio.create_task(producer.publish(b"c"))
            await spin()
            assert len(script.calls) == 1
            script.calls[0].answer()
            await spin()
            assert script.calls[1].values == [b"b" * 9]
            script.calls[1].answer()
            await spin()
            script.calls[2].answer()
            await asyncio.gather(small, big, later)

    run(main())


def test_fail_refuses_at_once() -> None:
    """`when_full="fail"`: WindowFullError without any waiting."""

    async def main() -> None:
        script = Script()
        options: Any = {"max_unconfirmed": 1, "when_full": "fail"}
        async with connected(script) as client, client.producer("t", **options) as producer:
            first = await producer.submit(b"1")
            began = asyncio.get_running_loop().time()
            with pytest.raises(WindowFullError) as caught:
                await producer.publish(b"2")
            assert caught.value.stored == "no"
            assert asyncio.get_running_loop().time() == began
            script.calls[0].answer()
            await first
            assert producer.stats.failed == 1

    run(main())


def test_drop_newest_drops_what_comes() -> None:
    """The new message's publisher gets DroppedError, and what was there stays."""

    async def main() -> None:
        script = Script()
        options: Any = {"max_unconfirmed": 2, "when_full": "drop_newest"}
        async with connected(script) as client, client.producer("t", **options) as producer:
            kept = [await producer.submit(b"1"), await producer.submit(b"2")]
            with pytest.raises(DroppedError):
                await producer.publish(b"3")
            script.calls[0].answer()
            await spin()
            script.calls[1].answer()
            assert [(await one).position for one in kept] == ["1", "2"]
            assert producer.stats.dropped == 1
            assert balanced(producer.stats)

    run(main())


def test_drop_oldest_drops_only_what_was_not_handed_over() -> None:
    """The oldest waiting message goes; one at the broker never does, and then the newest goes instead."""

    async def main() -> None:
        script = Script()
        options: Any = {"max_unconfirmed": 2, "when_full": "drop_oldest"}
        async with connected(script) as client, client.producer("t", **options) as producer:
            handed = await producer.submit(b"handed")
            waiting = await producer.submit(b"waiting")
            newer = await producer.submit(b"newer")
            with pytest.raises(DroppedError):
                await waiting
            script.calls[0].answer()
            await handed
            await spin()
            assert script.calls[1].values == [b"newer"]
            # Both places are at the broker now.
            other = asyncio.create_task(producer.publish(b"other"))
            await spin()
            last = await producer.submit(b"last")
            with pytest.raises(DroppedError):
                await other
            assert not last.done()
            script.calls[1].answer()
            await newer
            await spin()
            script.calls[2].answer()
            await last

    run(main())


def test_drop_oldest_never_passes_the_bound() -> None:
    """Where dropping every waiting message would not make room, nothing waiting is dropped, and the newest goes."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            options: Any = {"max_unconfirmed": 10, "max_unconfirmed_bytes": 10, "when_full": "drop_oldest"}
            async with client.producer("t", **options) as producer:
                handed = await producer.submit(b"1234567")
                waiting = await producer.submit(b"89")
                with pytest.raises(DroppedError):
                    await producer.publish(b"too big")
                assert producer._window.bytes <= 10
                assert not waiting.done()
                script.calls[0].answer()
                await handed
                await spin()
                script.calls[1].answer()
                await waiting

    run(main())


def test_a_cancelled_publisher_that_waits_for_room_counts_as_dropped() -> None:
    """CancelledError goes on, the place is free, the message is never sent."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t", max_unconfirmed=1) as producer:
            first = await producer.submit(b"1")
            for _ in range(2):
                task = asyncio.create_task(producer.publish(b"never"))
                await spin()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert producer.stats.dropped == 2
            assert balanced(producer.stats)
            script.calls[0].answer()
            await first
            last = asyncio.create_task(producer.publish(b"2"))
            await spin()
            assert script.calls[1].values == [b"2"]
            script.calls[1].answer()
            await last

    run(main())


def test_room_granted_in_the_moment_of_cancellation_goes_to_the_next() -> None:
    """A publisher that is cancelled just when it gets room does not keep it."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t", max_unconfirmed=1) as producer:
            first = await producer.submit(b"1")
            unlucky = asyncio.create_task(producer.publish(b"2"))
            lucky = asyncio.create_task(producer.publish(b"3"))
            await spin()
            script.calls[0].answer()
            await first
            assert not unlucky.done()
            unlucky.cancel()
            await spin()
            assert unlucky.cancelled()
            assert script.calls[1].values == [b"3"]
            script.calls[1].answer()
            await lucky
            assert (producer.stats.dropped, producer.stats.confirmed) == (1, 2)
            assert producer._window.messages == 0

    run(main())


def test_flush_waits_for_those_that_wait_for_room_and_for_no_later_ones() -> None:
    """`flush` covers what was published before it, a publisher that has no room yet included, and nothing else."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t", max_unconfirmed=1) as producer:
            first = asyncio.create_task(producer.publish(b"1"))
            await spin()
            second = asyncio.create_task(producer.publish(b"2"))
            await spin()
            flush = asyncio.create_task(producer.flush())
            await spin()
            third = asyncio.create_task(producer.publish(b"3"))
            script.calls[0].answer()
            await spin()
            assert not flush.done()
            script.calls[1].answer()
            await spin()
            assert flush.done()
            assert not third.done()
            script.calls[2].answer()
            await asyncio.gather(first, second, third)

    run(main())


def test_close_takes_in_who_waits_for_room_and_refuses_who_comes_later() -> None:
    """Closing lets everything published before it be decided; a publish after it is a ClosedError, stored no."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            producer = await client.producer("t", max_unconfirmed=1).__aenter__()
            first = asyncio.create_task(producer.publish(b"1"))
            await spin()
            second = asyncio.create_task(producer.publish(b"2"))
            await spin()
            closing = asyncio.create_task(producer.close())
            await spin()
            with pytest.raises(ClosedError) as caught:
                await producer.publish(b"3")
            assert caught.value.stored == "no"
            for index in range(2):
                assert not closing.done()
                script.calls[index].answer()
                await spin()
            await closing
            assert (await first).position == "1"
            assert (await second).position == "2"

    run(main())


def test_a_batch_under_way_at_close_ends_with_an_outcome_per_message() -> None:
    """`publish_many` that is cut off by `close` says ClosedError for each message that was not taken."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            producer = await client.producer("t", max_unconfirmed=1).__aenter__()
            many = asyncio.create_task(producer.publish_many([b"1", b"2", b"3"]))
            await spin()
            closing = asyncio.create_task(producer.close())
            for _ in range(3):
                await spin()
                script.calls[-1].answer()
            await closing
            outcomes = await many
            assert [type(one).__name__ for one in outcomes] == ["Receipt", "Receipt", "ClosedError"]
            assert balanced(producer.stats)

    run(main())


def test_spill_is_refused_before_anything_is_opened() -> None:
    """`when_full="spill"` is UnsupportedError, and nonsense is a ConfigError that names the choices."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            with pytest.raises(UnsupportedError) as caught:
                client.producer("t", when_full="spill")
            assert caught.value.capability == "spill"
            with pytest.raises(unistream.ConfigError, match="drop_oldest"):
                client.producer("t", when_full="wait")  # type: ignore[arg-type]
            nothing: tuple[dict[str, Any], ...] = ({"max_unconfirmed": 0}, {"max_unconfirmed_bytes": 0})
            for limits in nothing:
                with pytest.raises(unistream.ConfigError):
                    client.producer("t", **limits)
        assert script.calls == []

    run(main())


def test_a_client_closed_while_the_broker_is_away_ends_within_the_timeouts() -> None:
    """Undecided messages are waited for until their own timeouts, never longer."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: _away()
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with connected(script) as client:
            producer = await client.producer("t").__aenter__()
            for index in range(3):
                await producer.submit(b"%d" % index, timeout=5.0 + index)
            with pytest.raises(ExceptionGroup) as caught:
                await client.close()
        assert 7 <= loop.time() - began < 8
        failures = caught.value.exceptions
        assert [type(one) for one in failures] == [NotPublishedError] * 3

    async def _away() -> None:
        raise unistream.BrokerUnavailableError("away")

    run(main())
