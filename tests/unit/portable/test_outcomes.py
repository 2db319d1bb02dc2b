"""What becomes of a message when the driver is slow, gone, unsure or wrong (PUB-1 to PUB-4)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import unistream
from tests.unit.portable.scripted import Script, connected, raising, spin
from tests.unit.portable.test_window import balanced
from unistream import capabilities as can
from unistream.conformance.clock import run
from unistream.driver.types import Receipt
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ConfigError,
    ContractError,
    NotPublishedError,
    PublishUnknownError,
    TimedOutError,
    TooLargeError,
    TopicFullError,
    TopicMissingError,
    UnistreamError,
)

DEDUPES = {"dedupe": can.Dedupe(window=60.0)}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("outcome", "stored"),
    [
        (TopicFullError("full"), "no"),
        (TopicFullError("full", stored="unknown"), "unknown"),
        (TooLargeError("large"), "no"),
        (NotPublishedError("refused"), "no"),
        (PublishUnknownError("lost"), "unknown"),
        (TopicMissingError("gone"), "no"),
        (AccessError("denied"), "no"),
        (UnistreamError("something else"), "unknown"),
    ],
)
def test_an_outcome_reaches_its_publisher_with_stored(at_once: bool, outcome: UnistreamError, stored: str) -> None:
    """Whatever a driver says of a message, in whichever way it answers, its publisher hears, with `stored` set."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: [outcome] if at_once else _later([outcome])
        async with connected(script) as client, client.producer("t") as producer:
            with pytest.raises(type(outcome)) as caught:
                await producer.publish(b"x")
            assert caught.value is outcome
            assert caught.value.stored == stored
            stats = producer.stats
            assert (stats.failed, stats.unknown) == ((1, 0) if stored == "no" else (0, 1))
            assert balanced(stats)

    run(main())


@pytest.mark.parametrize(
    "misbehave",
    [
        lambda batch, timeout: [],
        lambda batch, timeout: [Receipt("a", str(number)) for number in range(4)],
        lambda batch, timeout: [None] * len(batch),
        lambda batch, timeout: _later([]),
        lambda batch, timeout: _later(None),
        lambda batch, timeout: _later(["receipt"] * len(batch)),
        lambda batch, timeout: 1 / 0,
        lambda batch, timeout: raising(ZeroDivisionError("foreign")),
        lambda batch, timeout: raising(asyncio.CancelledError()),
        lambda batch, timeout: raising(ContractError("checked")),
    ],
)
@pytest.mark.parametrize("way", ["publish", "submit", "many", "many headers"])
def test_a_driver_that_misbehaves_is_a_contract_error(misbehave: Callable[..., Any], way: str) -> None:
    """Wrong counts, foreign errors and nonsense end at once in ContractError, stored unknown, on every way in."""

    async def main() -> None:
        script = Script()
        script.publish = misbehave
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with connected(script) as client, client.producer("t") as producer:
            errors: list[Any] = []
            if way.startswith("many"):
                # The first answer shows that the driver answers at once, or not.
                with pytest.raises(ContractError):
                    await producer.publish(b"first")
                headers = unistream.Headers({"a": b"b"} if way == "many headers" else None)
                errors = list(await producer.publish_many([unistream.Message(b"x", headers=headers), b"y"]))
            else:
                coroutine = producer.publish(b"x") if way == "publish" else (await producer.submit(b"x")).result()
                with pytest.raises(ContractError) as caught:
                    await coroutine
                errors = [caught.value]
            assert {type(error) for error in errors} == {ContractError}
            assert {error.stored for error in errors} == {"unknown"}
            assert producer.stats.in_flight == 0
            assert balanced(producer.stats)
        assert loop.time() == began

    run(main())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_broker_that_is_away_is_tried_again_until_the_timeout(at_once: bool) -> None:
    """BrokerUnavailableError, raised at once or when awaited, means: wait, try again; and in time NotPublishedError."""

    async def main() -> None:
        script = Script()
        tries: list[float] = []
        loop = asyncio.get_running_loop()

        def away(batch: Any, timeout: float) -> Any:
            tries.append(timeout)
            if at_once:
                raise BrokerUnavailableError("away")
            return raising(BrokerUnavailableError("away"))

        script.publish = away
        async with connected(script) as client, client.producer("t") as producer:
            began = loop.time()
            with pytest.raises(NotPublishedError) as caught:
                await producer.publish(b"x", timeout=10)
            assert loop.time() - began == pytest.approx(10)
            assert caught.value.stored == "no"
            assert isinstance(caught.value.__cause__, BrokerUnavailableError)
            assert 4 <= len(tries) <= 20
            assert tries == sorted(tries, reverse=True)
            assert not (await client.health()).ok
            script.publish = None
            back = asyncio.create_task(producer.publish(b"y"))
            await asyncio.sleep(6)
            script.calls[0].answer()
            await back
            assert (await client.health()).ok

    run(main())


def test_a_pipeline_that_breaks_goes_on_in_order() -> None:
    """When every outstanding batch comes back, they are repeated in the order of publishing, one at a time at first."""

    async def main() -> None:
        script = Script(pipeline=3, batch_messages=2)
        async with connected(script) as client, client.producer("t") as producer:
            # The first goes alone: whatever comes while it is under way forms the next batches.
            confirmations = [await producer.submit(b"%d" % i, key=b"k") for i in range(8)]
            assert [call.values for call in script.calls] == [[b"0"], [b"1"], [b"2"]]
            script.calls[0].answer()
            await spin()
            assert script.calls[3].values == [b"3", b"4"]
            # The later ones hear of it first.
            for index in (3, 2, 1):
                script.calls[index].fail(BrokerUnavailableError("cut"))
                await spin()
            assert len(script.calls) == 4
            await asyncio.sleep(1)
            assert [call.values for call in script.calls[4:]] == [[b"1", b"2"]]
            for index in range(4, 8):
                script.calls[index].answer()
                await spin()
                if index + 1 >= len(script.calls):
                    break
            for call in script.calls[4:]:
                call.answer()
            await spin()
            for call in script.calls[4:]:
                call.answer()
            assert [(await one).position for one in confirmations] == [str(i) for i in range(8)]
            sent = [value for call in script.calls[4:] for value in call.values]
            assert sent == [b"%d" % i for i in range(1, 8)]

    run(main())


def test_an_unknown_outcome_is_repeated_only_where_the_backend_dedupes() -> None:
    """With deduplication the same id goes again after a pause; without it the publisher is told."""

    async def main(dedupes: bool) -> None:
        script = Script(capabilities=DEDUPES if dedupes else {})
        async with connected(script) as client, client.producer("t") as producer:
            task = asyncio.create_task(producer.publish(b"x", key=b"k"))
            await spin()
            script.calls[0].answer(PublishUnknownError("cut"))
            await spin()
            assert len(script.calls) == 1
            await asyncio.sleep(1)
            if dedupes:
                assert script.calls[1].batch[0].id == script.calls[0].batch[0].id
                script.calls[1].answer(Receipt(script.calls[1].batch[0].id, "1", True))
                assert (await task).duplicate is True
            else:
                assert len(script.calls) == 1
                with pytest.raises(PublishUnknownError):
                    await task

    run(main(True))
    run(main(False))


def test_a_repeat_never_passes_a_later_message_of_its_key() -> None:
    """PUB-4: in a batch and across a pipeline, only messages with nothing later of their key handed over go again."""

    async def main() -> None:
        script = Script(capabilities=DEDUPES, pipeline=2, batch_messages=4)
        unknown = PublishUnknownError
        async with connected(script) as client, client.producer("t") as producer:
            first = await producer.submit(b"a", key=b"k")
            second = await producer.submit(b"b", key=b"k")
            # The later batch is confirmed first: the earlier may not be repeated any more.
            script.calls[1].answer()
            await spin()
            script.calls[0].answer(unknown("cut"))
            with pytest.raises(unknown):
                await first
            await second
            await spin()
            third = await producer.submit(b"c", key=b"k")
            rest = [await producer.submit(value, key=key) for value, key in ((b"d", b"k"), (b"e", b"k"), (b"f", None))]
            script.calls[2].answer()
            await third
            await spin()
            script.calls[3].answer()
            await spin()
            batch = script.calls[4]
            assert batch.values == [b"e", b"f"]
            batch.answer(unknown("cut"), Receipt(batch.batch[1].id, "f"))
            await asyncio.sleep(1)
            assert script.calls[5].values == [b"e"]
            script.calls[5].answer()
            assert (await rest[1]).position == "e"
            assert (await rest[2]).position == "f"

    run(main())


def test_within_a_batch_only_the_tail_of_a_key_is_repeated() -> None:
    """Of one key's messages in a batch those after the last that is decided are sent again, in order."""

    async def main() -> None:
        script = Script(capabilities=DEDUPES)
        async with connected(script) as client, client.producer("t") as producer:
            opener = await producer.submit(b"0")
            sent = [await producer.submit(b"%d" % i, key=b"k") for i in range(1, 5)]
            script.calls[0].answer()
            await opener
            await spin()
            cut = [PublishUnknownError("cut") for _ in range(3)]
            script.calls[1].answer(cut[0], Receipt(script.calls[1].batch[1].id, "2"), cut[1], cut[2])
            with pytest.raises(PublishUnknownError):
                await sent[0]
            await asyncio.sleep(1)
            assert script.calls[2].values == [b"3", b"4"]
            script.calls[2].answer()
            assert [(await one).position for one in sent[1:]] == ["2", "3", "4"]

    run(main())


def test_a_message_that_may_be_stored_is_never_called_not_stored() -> None:
    """After an unknown outcome neither a timeout, nor a cancellation, nor a refusal of the repeat says "no"."""

    async def main(end: str) -> None:
        script = Script(capabilities=DEDUPES)
        async with connected(script) as client, client.producer("t") as producer:
            task = asyncio.create_task(producer.publish(b"x", timeout=5))
            await spin()
            script.calls[0].answer(PublishUnknownError("cut"))
            await spin()
            script.publish = lambda batch, timeout: (
                [TopicFullError("full")] if end == "refused" else raising(BrokerUnavailableError("away"))
            )
            if end == "cancelled":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(PublishUnknownError):
                    await task
            assert producer.stats.unknown == 1
            assert balanced(producer.stats)

    for end in ("late", "refused", "cancelled"):
        run(main(end))


def test_a_driver_that_always_answers_unknown_is_not_asked_in_a_tight_loop() -> None:
    """Repeats wait the backoff, also when the driver answers at once."""

    async def main() -> None:
        script = Script(capabilities=DEDUPES)
        count = 0

        def unknown(batch: Any, timeout: float) -> Any:
            nonlocal count
            count += 1
            return [PublishUnknownError("cut")]

        script.publish = unknown
        async with connected(script) as client, client.producer("t") as producer:
            with pytest.raises(PublishUnknownError):
                await producer.publish(b"x", timeout=10)
            assert 2 <= count <= 20

    run(main())


def test_a_late_answer_changes_nothing() -> None:
    """After its timeout a message is unknown; the answer that comes then is nobody's, and shifts no other receipt."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t") as producer:
            with pytest.raises(PublishUnknownError) as caught:
                await producer.publish(b"late", timeout=2)
            assert caught.value.stored == "unknown"
            behind = asyncio.create_task(producer.publish(b"next"))
            await spin()
            script.calls[0].answer()
            await spin()
            script.calls[1].answer()
            assert (await behind).position == "next"
            stats = producer.stats
            assert (stats.unknown, stats.confirmed) == (1, 1)

    run(main())


def test_a_cancelled_publish_is_unknown_once_handed_over_and_never_sent_again() -> None:
    """Cancelled in the queue: dropped. Cancelled at the driver: unknown. The others get their own receipts."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t") as producer:
            tasks = [asyncio.create_task(producer.publish(b"%d" % i)) for i in range(4)]
            await spin()
            tasks[0].cancel()
            tasks[2].cancel()
            await spin()
            script.calls[0].answer()
            await spin()
            assert script.calls[1].values == [b"1", b"3"]
            script.calls[1].answer()
            assert [(await task).position for task in (tasks[1], tasks[3])] == ["1", "3"]
            stats = producer.stats
            assert (stats.confirmed, stats.unknown, stats.dropped) == (2, 1, 1)
            await producer.flush()

    run(main())


def test_failures_that_nobody_looked_at_are_raised_once() -> None:
    """`flush` raises the failures of submitted messages as a group; looked at once, they are not raised again."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: _later([NotPublishedError(one.value.decode()) for one in batch])
        async with connected(script) as client, client.producer("t") as producer:
            seen = await producer.submit(b"seen")
            await producer.submit(b"unseen")
            impatient = await producer.submit(b"impatient")
            with pytest.raises(TimedOutError):
                # Gives up before it is decided: nobody has seen the outcome.
                await impatient.result(timeout=0)
            with pytest.raises(NotPublishedError):
                await seen
            with pytest.raises(ExceptionGroup) as caught:
                await producer.flush()
            assert sorted(str(error) for error in caught.value.exceptions) == ["impatient", "unseen"]
            await producer.flush()
            peeked = await producer.submit(b"peeked")
            await spin()
            assert str(peeked.failure()) == "peeked"
            await producer.flush()
            await producer.submit(b"at the end")
            with pytest.raises(ExceptionGroup):
                await producer.close()
            await producer.close()

    run(main())


def test_leaving_by_an_exception_lets_it_through() -> None:
    """The block's own exception goes on; the failures that nobody saw are logged beside it."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: _later([NotPublishedError("x")])

        async def leave(client: unistream.Client) -> None:
            async with client.producer("t") as producer:
                await producer.submit(b"x")
                raise KeyError("mine")

        async with connected(script) as client:
            with pytest.raises(KeyError):
                await leave(client)

    run(main())


def test_waiting_for_a_confirmation_again_and_again_keeps_nothing() -> None:
    """Polling with a short timeout leaves no waiter behind."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t") as producer:
            confirmation = await producer.submit(b"x", timeout=60)
            for _ in range(10):
                with pytest.raises(TimedOutError):
                    await confirmation.result(timeout=0.1)
            assert confirmation._waiters == ()
            script.calls[0].answer()
            assert (await confirmation).position == "x"

    run(main())


def test_publish_many_has_an_outcome_per_message_in_order() -> None:
    """Bad messages in the middle get their errors in their places, and the others are published."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: [Receipt(one.id, one.value.decode()) for one in batch]
        async with connected(script) as client, client.producer("t") as producer:
            messages: list[Any] = [
                b"0",
                unistream.Message(b"1", key=b"k"),
                unistream.Message(b"2", headers=unistream.Headers({"Unistream-id": b"x"})),
                b"x" * 2000,
                "text",
                unistream.Message(b"5", id="é"),
                b"6",
            ]
            outcomes = await producer.publish_many(messages)
            kinds = [type(one).__name__ for one in outcomes]
            assert kinds == [
                "Receipt",
                "Receipt",
                "ConfigError",
                "TooLargeError",
                "ConfigError",
                "ConfigError",
                "Receipt",
            ]
            assert [one.position for one in outcomes if isinstance(one, unistream.Receipt)] == ["0", "1", "6"]
            assert all(one.stored == "no" for one in outcomes if isinstance(one, UnistreamError))
            assert producer.stats.failed == 4
            assert balanced(producer.stats)

    run(main())


def test_batches_that_go_straight_through_keep_the_drivers_bounds() -> None:
    """`publish_many` on a driver that answers at once hands over no more messages and bytes than it takes."""

    async def main() -> None:
        script = Script(batch_messages=10, batch_bytes=500)
        script.publish = lambda batch, timeout: [Receipt(one.id) for one in batch]
        async with connected(script) as client, client.producer("t", max_unconfirmed_bytes=300) as producer:
            await producer.publish(b"first")
            outcomes = await producer.publish_many([b"x" * 100] * 25)
            assert all(isinstance(one, unistream.Receipt) for one in outcomes)
            assert producer.stats.confirmed == 26

    run(main())


@pytest.mark.parametrize(
    "bad",
    [
        {"value": "text"},
        {"value": None},
        {"value": b"x", "key": 5},
        {"value": b"x", "key": "\ud800"},
        {"value": b"x", "headers": {"unistream-id": b"x"}},
        {"value": b"x", "headers": {"UNISTREAM-x": b"x"}},
        {"value": b"x", "headers": {"a": 5}},
        {"value": b"x", "headers": {5: b"a"}},
        {"value": b"x", "headers": {"\ud800": b"a"}},
        {"value": b"x", "headers": {"a": "\ud800"}},
        {"value": b"x", "headers": [("a", b"b", b"c")]},
        {"value": b"x", "id": b"bytes"},
        {"value": b"x", "id": "a" * 129},
        {"value": b"x", "id": "a\n"},
        {"value": b"x", "id": " a"},
    ],
)
def test_a_message_that_can_not_be_sent_is_a_config_error_and_counted(bad: dict[str, Any]) -> None:
    """Values of another type, reserved headers and half characters are refused before anything is sent."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t") as producer:
            with pytest.raises(ConfigError) as caught:
                await producer.publish(**bad)
            assert caught.value.stored == "no"
            assert producer.stats.failed == 1
            assert balanced(producer.stats)
            assert script.calls == []

    run(main())


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_of_nothing_still_gives_the_driver_a_moment(timeout: float) -> None:
    """No driver is called with a timeout that is not above 0; one that answers at once still confirms."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client, client.producer("t") as producer:
            with pytest.raises(PublishUnknownError):
                await producer.publish(b"x", timeout=timeout)
            script.calls[0].answer()
            await spin()
            script.publish = lambda batch, timeout: [Receipt(batch[0].id, "1")]
            assert (await producer.publish(b"y", timeout=timeout)).position == "1"

    run(main())


async def _later(answer: Any) -> Any:
    await asyncio.sleep(0)
    return answer
