"""Receiving, leases and settling on a virtual clock, with a driver that does what each test says (DEL, BPC)."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import unistream
from tests.unit.portable.scripted import Script, connected, raising, spin
from unistream import capabilities as can
from unistream.conformance.clock import run
from unistream.driver.types import Receipt, Verb
from unistream.errors import (
    AlreadySettledError,
    BrokerUnavailableError,
    ClosedError,
    ConfigError,
    ContractError,
    GroupMissingError,
    LeaseLostError,
    PublishError,
    SettleError,
    TopicMissingError,
    UnistreamError,
    UnsupportedError,
)

LEASE = 12.0


@asynccontextmanager
async def joined(script: Script, **options: Any) -> AsyncIterator[unistream.Consumer]:
    """A consumer on the script."""
    window = {name: options.pop(name) for name in ("max_in_flight", "max_in_flight_bytes") if name in options}
    async with connected(script) as client:
        options = {"lease": LEASE, **options}
        async with client.group("g", "t", **options).consumer(**window) as consumer:
            yield consumer


# Receiving


def test_receive_times_out_and_waiters_are_served_in_turn() -> None:
    """`None` when the time is up; several callers get the messages in the order in which they asked."""

    async def main() -> None:
        script = Script()
        loop = asyncio.get_running_loop()
        async with joined(script) as consumer:
            began = loop.time()
            assert await consumer.receive(timeout=7) is None
            assert loop.time() - began == pytest.approx(7)
            assert await consumer.receive(timeout=0) is None
            assert await consumer.receive_many(5, timeout=1) == []
            with pytest.raises(ValueError, match="1 or more"):
                await consumer.receive_many(0)
            tasks = [asyncio.create_task(consumer.receive()) for _ in range(3)]
            await spin()
            script.lend(b"1", b"2", b"3")
            got = [await task for task in tasks]
            assert [one.value for one in got if one] == [b"1", b"2", b"3"]
            for one in got:
                assert one is not None
                await one.ack()

    run(main())


def test_a_cancelled_receive_loses_nothing() -> None:
    """What was fetched for a caller that gave up goes to the next one, in its old place."""

    async def main() -> None:
        script = Script()
        async with joined(script) as consumer:
            unlucky = asyncio.create_task(consumer.receive())
            await spin()
            script.lend(b"1", b"2")
            # One round serves it, and it is cancelled before it runs.
            await asyncio.sleep(0)
            unlucky.cancel()
            await spin()
            assert unlucky.cancelled()
            got = await consumer.receive_many(5, timeout=1)
            assert [one.value for one in got] == [b"1", b"2"]
            for one in got:
                await one.ack()

    run(main())


def test_cancelled_beside_close_is_cancelled() -> None:
    """A waiter that is cancelled in the moment of closing sees the cancellation, not ClosedError."""

    async def main() -> None:
        async with joined(Script()) as consumer:
            waiting = asyncio.create_task(consumer.receive())
            await spin()
            closing = asyncio.create_task(consumer.close())
            await asyncio.sleep(0)
            waiting.cancel()
            await closing
            assert (await asyncio.gather(waiting, return_exceptions=True))[0].__class__ is asyncio.CancelledError

    run(main())


def test_bytes_bound_what_the_application_holds() -> None:
    """Beyond `max_in_flight_bytes` nothing is handed out until something is settled; one message always is."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_in_flight_bytes=10) as consumer:
            script.lend(b"a" * 20, b"b" * 6, b"c" * 4, b"d")
            big = await consumer.receive()
            assert big is not None
            assert await consumer.receive(timeout=1) is None
            await big.ack()
            held = await consumer.receive_many(5, timeout=1)
            assert [one.value[:1] for one in held] == [b"b", b"c"]
            await held[0].ack()
            last = await consumer.receive(timeout=1)
            assert last is not None
            await held[1].ack()
            await last.ack()

    run(main())


def test_a_suspect_is_alone() -> None:
    """Nothing is fetched beside a delivery that may have killed its last member."""

    async def main() -> None:
        script = Script()
        async with joined(script) as consumer:
            script.lend(b"killer", attempt=2, suspect=True)
            script.lend(b"innocent")
            suspect = await consumer.receive()
            assert suspect is not None
            assert await consumer.receive(timeout=20) is None
            asked = len(script.receives)
            await suspect.ack()
            innocent = await consumer.receive(timeout=1)
            assert innocent is not None
            assert len(script.receives) > asked
            await innocent.ack()

    run(main())


def test_with_one_attempt_nothing_is_fetched_ahead() -> None:
    """DEL-4: a member asks for what is waited for, no more: what it held when it died would be dead-lettered."""

    async def main() -> None:
        script = Script()
        async with joined(script, retry=unistream.Retry(1), dead_letter="dead") as consumer:
            script.lend(b"1", b"2", b"3", b"4")
            first = await consumer.receive()
            assert first is not None
            several = await asyncio.gather(consumer.receive(), consumer.receive())
            assert max(limit for limit, _ in script.receives) <= 2
            assert len(script.backlog) == 1
            for delivery in (first, *several):
                assert delivery is not None
                await delivery.ack()

    run(main())


def test_paused_means_no_fetch_and_no_loss() -> None:
    """Between `pause` and `resume` nothing is asked of the broker and what is held stays held, for an hour."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_lease=7200.0) as consumer:
            script.lend(b"1", b"2")
            first = await consumer.receive()
            assert first is not None
            await consumer.pause()
            await asyncio.sleep(10)
            asked = len(script.receives)
            waiting = asyncio.create_task(consumer.receive())
            await asyncio.sleep(3600)
            assert len(script.receives) == asked
            assert not waiting.done()
            await consumer.resume()
            second = await waiting
            assert second is not None
            assert [first.state, second.state] == ["lent", "lent"]
            await first.ack()
            await second.ack()

    run(main())


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("error", [GroupMissingError("gone"), TopicMissingError("gone"), UnistreamError("odd")])
def test_a_deleted_group_is_told_to_everybody(at_once: bool, error: UnistreamError) -> None:
    """GRP-7: whoever waits now or later gets the error, settling goes on, health says failed, an event tells."""

    async def main() -> None:
        script = Script()
        async with connected(script) as client:
            events = client.events()
            async with client.group("g", "t", lease=LEASE).consumer(max_in_flight=2) as consumer:
                script.lend(b"1", b"2")
                held = await consumer.receive_many(2)
                waiting = [asyncio.create_task(consumer.receive()) for _ in range(2)]
                await spin()

                def gone(limit: int, timeout: float) -> Any:
                    if at_once:
                        raise error
                    return raising(error)

                script.receive = gone
                # Frees credit, so the next fetch is made from inside `ack`, which must not be the one to suffer.
                await held[0].ack()
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
                assert [type(one) for one in outcomes] == [type(error)] * 2
                with pytest.raises(type(error)):
                    await consumer.receive()
                with pytest.raises(type(error)):
                    await anext(consumer)
                await held[1].ack()
                health = await client.health()
                assert (health.ok, health.state) == (False, "failed")
                told = await anext(events)
                assert isinstance(told, unistream.HealthChanged)
                assert not told.ok

    run(main())


@pytest.mark.parametrize("misbehave", [lambda: 1 / 0, lambda: raising(ValueError("foreign")), lambda: _cancelled()])
def test_a_foreign_error_from_a_fetch_is_a_contract_error(misbehave: Any) -> None:
    """What a driver lets through reaches whoever waits, as ContractError; nobody hangs."""

    async def main() -> None:
        script = Script()
        script.receive = lambda limit, timeout: misbehave()
        async with joined(script) as consumer:
            with pytest.raises(ContractError):
                await consumer.receive()

    run(main())


def test_a_broker_that_is_away_is_asked_again() -> None:
    """A fetch that does not reach the broker is repeated with backoff, and `health` says reconnecting meanwhile."""

    async def main() -> None:
        script = Script()
        script.receive = lambda limit, timeout: raising(BrokerUnavailableError("away"))
        async with connected(script) as client, client.group("g", "t").consumer() as consumer:
            waiting = asyncio.create_task(consumer.receive())
            await asyncio.sleep(10)
            assert (await client.health()).state == "reconnecting"
            assert len(script.receives) < 20
            script.receive = None
            script.lend(b"1")
            delivery = await waiting
            assert delivery is not None
            assert (await client.health()).ok
            await delivery.ack()

    run(main())


# Leases


def test_leases_are_renewed_until_max_lease() -> None:
    """Renewal keeps a delivery for `max_lease` after lending; then it is lost, credit comes back, settling raises."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_lease=60.0, max_in_flight=1) as consumer:
            script.lend(b"1", b"2")
            delivery = await consumer.receive()
            assert delivery is not None
            left = delivery.lease_expires_at - datetime.now(UTC)
            assert timedelta(seconds=LEASE - 1) < left <= timedelta(seconds=LEASE)
            await asyncio.sleep(59)
            assert delivery.state == "lent"
            assert {token for token, _ in script.extended} == {1}
            await asyncio.sleep(2)
            assert delivery.state == "lost"
            late: list[Any] = [delivery.ack(), delivery.nack(), delivery.reject("x"), delivery.extend(1)]
            for settle in late:
                with pytest.raises(LeaseLostError):
                    await settle
            assert (1, Verb.EXPIRE) in script.verbs
            assert consumer.stats.leases_lost == 1
            other = await consumer.receive(timeout=1)
            assert other is not None
            await other.ack()

    run(main())


def test_max_lease_equal_to_lease_renews_nothing() -> None:
    """`max_lease=lease` turns renewal off."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_lease=LEASE) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            await asyncio.sleep(LEASE + 1)
            assert delivery.state == "lost"
            assert script.extended == []

    run(main())


def test_extend_lasts_as_long_as_asked_within_max_lease() -> None:
    """An extended delivery outlives its lease; `max_lease` is the end, and nonsense is a ConfigError."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_lease=100.0) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            for seconds in (0, -1, float("nan")):
                with pytest.raises(ConfigError):
                    await delivery.extend(seconds)
            await delivery.extend(50)
            assert script.extended == [(1, 50)]
            await delivery.extend(1000)
            assert script.extended[-1][1] <= 100
            script.extend = lambda tokens, seconds: [LeaseLostError("no")] * len(tokens)
            await asyncio.sleep(40)
            assert delivery.state == "lent"
            with pytest.raises(LeaseLostError):
                await delivery.extend(50)
            assert delivery.state == "lost"

    run(main())


def test_a_renewal_that_fails_is_tried_again_and_nobody_hangs() -> None:
    """Out of reach: again after a pause. Refused: the delivery is lost. Gone: the consumer fails. Foreign: defect."""

    async def main() -> None:
        script = Script()
        async with joined(script) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            tries = 0

            def away(tokens: Any, seconds: float) -> Any:
                nonlocal tries
                tries += 1
                return raising(BrokerUnavailableError("away")) if tries < 4 else [None]

            script.extend = away
            await asyncio.sleep(LEASE)
            assert tries >= 4
            assert delivery.state == "lent"
            script.extend = lambda tokens, seconds: [LeaseLostError("no")]
            await asyncio.sleep(LEASE)
            assert delivery.state == "lost"

    async def broken(script: Script, extend: Any, kind: type[Exception]) -> None:
        script.extend = extend
        async with joined(script) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            with pytest.raises(kind):
                await consumer.receive()
            assert delivery is not None
            await asyncio.sleep(LEASE)
            assert delivery.state == "lost"

    run(main())
    run(broken(Script(), lambda tokens, seconds: raising(GroupMissingError("gone")), GroupMissingError))
    run(broken(Script(), lambda tokens, seconds: 1 / 0, ContractError))


def test_a_lost_loan_frees_its_place_at_once() -> None:
    """`lost` from the driver: state lost, credit free, no lease runs on, and saying it twice changes nothing."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_in_flight=1) as consumer:
            script.lend(b"1", b"2")
            delivery = await consumer.receive()
            assert delivery is not None
            assert script.lost is not None
            script.lost([1, 1, 99], "rebalanced")
            script.lost([1], "rebalanced")
            assert delivery.state == "lost"
            assert consumer.stats.leases_lost == 1
            other = await consumer.receive(timeout=1)
            assert other is not None
            await other.ack()

    run(main())


@pytest.mark.parametrize("many", [False, True])
def test_what_lost_its_lease_while_the_process_stood_still_is_not_handed_out(many: bool) -> None:
    """What was fetched ahead of a stop beyond the lease does not reach the application."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_in_flight=4) as consumer:
            script.lend(b"1", b"2", b"3")
            delivery = await consumer.receive()
            assert delivery is not None
            asyncio.get_running_loop().pass_time(LEASE + 1)  # type: ignore[attr-defined]
            assert not await (consumer.receive_many(4, timeout=0) if many else consumer.receive(timeout=0))
            assert delivery.state == "lost"
            await asyncio.sleep(1)
            assert consumer.stats.leases_lost == 3

    run(main())


def test_a_delivery_dropped_unsettled_is_logged_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    """DEL-8: one warning that names this file, and no renewal keeps it alive."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_in_flight=2) as consumer:
            script.lend(b"1", b"2")
            await consumer.receive()
            kept = await consumer.receive()
            assert kept is not None
            gc.collect()
            await asyncio.sleep(LEASE * 3)
            assert (1, Verb.EXPIRE) in script.verbs
            assert kept.state == "lent"
            await kept.ack()

    with caplog.at_level(logging.WARNING, "unistream.consumer"):
        run(main())
    dropped = [record.getMessage() for record in caplog.records if "dropped without" in record.getMessage()]
    assert len(dropped) == 1
    assert __file__ in dropped[0]


def test_a_blocked_loop_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """A loop that stood still for more than a third of the shortest lease while something was held is warned of."""

    async def main(blocked: float) -> int:
        caplog.clear()
        script = Script()
        async with joined(script) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            loop: Any = asyncio.get_running_loop()
            await asyncio.sleep(0.5)
            loop._now += blocked
            await asyncio.sleep(2)
            await delivery.ack()
        return sum("event loop was blocked" in record.getMessage() for record in caplog.records)

    with caplog.at_level(logging.WARNING, "unistream.consumer"):
        assert run(main(LEASE / 3 + 2)) == 1
        assert run(main(LEASE / 4)) == 0


# Settling


def test_settling_is_idempotent_and_a_second_kind_is_refused() -> None:
    """DEL-5: the same settle again does nothing; a different one raises AlreadySettledError and changes nothing."""

    async def main() -> None:
        script = Script()
        async with joined(script) as consumer:
            script.lend(b"1", b"2", b"3")
            one, two, three = await consumer.receive_many(3)
            for _ in range(2):
                await one.ack()
                await one.ack(confirm=True)
                await two.nack(5)
                await three.reject("bad")
            for delivery, settles in ((one, (two.nack, one.nack)), (two, (two.ack,)), (three, (three.ack,))):
                with pytest.raises(AlreadySettledError):
                    await settles[-1]()
                with pytest.raises(AlreadySettledError):
                    await delivery.extend(5)
            await spin()
            assert sorted(script.verbs, key=lambda pair: pair[0]) == [(1, Verb.ACK), (2, Verb.NACK), (3, Verb.ACK)]
            stats = consumer.stats
            assert (stats.acked, stats.nacked, stats.rejected, stats.dropped) == (1, 1, 1, 1)

    run(main())


@pytest.mark.parametrize("confirm", [False, True])
def test_acking_many_gives_each_its_outcome(confirm: bool) -> None:
    """What can't be acked is told in its place, and keeps nothing else from being acked, in one batch."""

    async def main() -> None:
        script = Script()
        batches: list[int] = []

        def settle(batch: Any) -> Any:
            batches.append(len(batch))
            return raising_or([None] * len(batch))

        async with joined(script, max_in_flight=4) as consumer, joined(Script()) as other:
            script.lend(*[b"%d" % number for number in range(1, 9)])
            one, two, three, four = await consumer.receive_many(4)
            await two.nack(5)
            assert script.lost is not None
            script.lost([three._raw.token], "gone")
            script.settle = settle
            next_one = asyncio.create_task(consumer.receive())
            await spin()
            outcomes = await consumer.ack_many([one, two, three, four, one], confirm=confirm)
            assert [type(outcome) for outcome in outcomes] == [
                type(None),
                AlreadySettledError,
                LeaseLostError,
                type(None),
                type(None),
            ]
            assert await consumer.ack_many([]) == []
            assert await consumer.ack_many([one, four], confirm=confirm) == [None, None]
            assert await next_one is not None
            assert batches == [2]
            assert [one.state, two.state, three.state, four.state] == ["acked", "nacked", "lost", "acked"]
            assert (consumer.stats.acked, consumer.stats.nacked) == (2, 1)
            # Another consumer's deliveries are acked by their own.
            rest = await consumer.receive_many(3)
            assert await other.ack_many(rest, confirm=confirm) == [None] * len(rest)
            assert consumer.stats.acked == 2 + len(rest)

    run(main())


def test_many_acks_are_sent_though_their_caller_is_cancelled() -> None:
    """END-2: whoever is cancelled while the broker confirms has acked all the same."""

    async def main() -> None:
        script = Script()
        async with joined(script) as consumer:
            script.lend(b"1", b"2")
            deliveries = await consumer.receive_many(2)
            acking = asyncio.create_task(consumer.ack_many(deliveries, confirm=True))
            await asyncio.sleep(0)
            acking.cancel()
            await asyncio.gather(acking, return_exceptions=True)
            await spin()
            assert script.verbs == [(1, Verb.ACK), (2, Verb.ACK)]

    run(main())


def test_an_ack_refused_later_is_lost_and_counted_once() -> None:
    """DEL-7: the refusal of an ack that had returned sets the state, counts `acks_lost`, and raises nowhere."""

    async def main() -> None:
        script = Script()
        script.settle = lambda batch: raising_or([LeaseLostError("gone")] * len(batch))
        async with joined(script) as consumer:
            script.lend(b"1", b"2")
            for _ in range(2):
                delivery = await consumer.receive()
                assert delivery is not None
                async with delivery:
                    await delivery.ack()
                await spin()
                assert delivery.state == "lost"
            assert consumer.stats.acks_lost == 2

    run(main())


@pytest.mark.parametrize(
    "misbehave",
    [
        lambda batch: 1 / 0,
        lambda batch: raising(ZeroDivisionError("foreign")),
        lambda batch: [],
        lambda batch: raising_or([]),
        lambda batch: raising_or(None),
        lambda batch: [1] * len(batch),
        lambda batch: raising(asyncio.CancelledError()),
        lambda batch: raising(ContractError("checked")),
    ],
)
def test_a_driver_that_breaks_settling_hangs_nobody(misbehave: Any) -> None:
    """Foreign errors and wrong counts are a SettleError for who waits, and later settles still go out."""

    async def main() -> None:
        script = Script()
        script.settle = misbehave
        async with joined(script) as consumer:
            script.lend(b"1", b"2", b"3")
            one, two, three = await consumer.receive_many(3)
            with pytest.raises(SettleError) as unknown:
                await one.ack(confirm=True)
            assert type(unknown.value) is SettleError
            await two.ack()
            await spin()
            assert two.state == "lost"
            script.settle = None
            await three.ack(confirm=True)
            assert script.verbs == [(3, Verb.ACK)]

    run(main())


def test_settles_wait_for_a_broker_that_is_away_while_the_lease_lasts() -> None:
    """A settle whose outcome is unknown is repeated; when its lease has ended it is given up and said so."""

    async def main() -> None:
        script = Script()
        script.settle = lambda batch: raising(BrokerUnavailableError("away"))
        async with joined(script, max_lease=LEASE) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            waiting = asyncio.create_task(delivery.ack(confirm=True))
            await asyncio.sleep(LEASE / 3)
            script.settle = None
            await waiting
            assert script.verbs == [(1, Verb.ACK)]
            script.settle = lambda batch: raising(BrokerUnavailableError("away"))
            script.lend(b"2")
            other = await consumer.receive()
            assert other is not None
            with pytest.raises(SettleError):
                await other.ack(confirm=True)
            assert other.state == "lost"
            script.settle = None

    run(main())


def test_settles_go_out_as_soon_as_the_broker_is_seen_again() -> None:
    """A settle does not sleep through its lease in a backoff once a fetch of the same consumer has succeeded."""

    async def main() -> None:
        script = Script()
        async with joined(script, max_lease=60.0) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            tries = 0
            enough = asyncio.Event()

            def away(batch: Any) -> Any:
                nonlocal tries
                tries += 1
                if tries == 6:
                    enough.set()
                return raising(BrokerUnavailableError("away"))

            script.settle = away
            acked = asyncio.create_task(delivery.ack(confirm=True))
            await enough.wait()
            # The next try is more than a second away.
            script.settle = None
            now = asyncio.get_running_loop().time()
            script.lend(b"2")
            other = await consumer.receive()
            await acked
            assert asyncio.get_running_loop().time() - now < 0.1
            assert other is not None
            await other.ack(confirm=True)

    run(main())


def test_what_a_block_ends_with_settles_its_delivery() -> None:
    """DEL-10: success acks; an exception nacks and goes on; cancellation gives back; Reject dead-letters or drops."""

    async def main() -> None:
        script = Script()
        async with joined(script, retry=unistream.Retry(backoff=unistream.Backoff(5, jitter=0))) as consumer:

            async def leave(error: BaseException | None) -> unistream.Delivery:
                script.lend(b"x")
                delivery = await consumer.receive()
                assert delivery is not None
                with nullcontext() if error is None else pytest.raises(type(error)):
                    async with delivery:
                        if error is not None:
                            raise error
                await spin()
                return delivery

            states = []
            for error in (None, ValueError("x"), asyncio.CancelledError(), KeyboardInterrupt(), unistream.Reject("r")):
                states.append((await leave(error)).state)
            assert [str(state) for state in states] == ["acked", "nacked", "nacked", "nacked", "rejected"]
            assert [(one.verb, one.delay) for one in script.settled] == [
                (Verb.ACK, 0.0),
                (Verb.NACK, 5.0),
                (Verb.RELEASE, 0.0),
                (Verb.RELEASE, 0.0),
                (Verb.ACK, 0.0),
            ]
            script.settled.clear()
            script.settle = lambda batch: [LeaseLostError("no")] * len(batch)
            assert [str((await leave(error)).state) for error in (None, ValueError("x"))] == ["lost", "lost"]
            assert consumer.stats.acks_lost == 1

    run(main())


def test_a_backoff_longer_than_the_backend_can_is_cut() -> None:
    """A nack without a delay never asks for more than the capability; one with a delay beyond it is refused."""

    async def main(capability: can.NackDelay, expected: float) -> None:
        script = Script(capabilities={"nack_delay": capability})
        retry = unistream.Retry(backoff=unistream.Backoff(60, jitter=0))
        async with joined(script, retry=retry) as consumer:
            script.lend(b"1", b"2")
            one, two = await consumer.receive_many(2)
            with pytest.raises(UnsupportedError):
                await one.nack(100)
            for delay in (-1, float("nan")):
                with pytest.raises(ConfigError):
                    await one.nack(delay)
            assert one.state == "lent"
            await one.nack()
            assert script.settled[0].delay == expected
            await two.ack()

    run(main(can.NackDelay(max=10), 10))
    run(main(can.NackDelay(level=can.Level.NONE), 0))


def test_other_loops_and_threads_are_refused() -> None:
    """END-6: every call on a consumer and its deliveries from another loop is ClosedError, and changes nothing."""

    async def main() -> None:
        script = Script()
        async with joined(script) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            calls: list[Any] = [
                delivery.ack,
                delivery.nack,
                lambda: delivery.reject("x"),
                lambda: delivery.extend(5),
                consumer.receive,
                consumer.close,
                lambda: _call(consumer.pause),
                lambda: _call(consumer.resume),
            ]
            errors: list[object] = []

            def elsewhere() -> None:
                for call in calls:
                    try:
                        asyncio.run(call())
                    except ClosedError as error:
                        errors.append(error)

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert len(errors) == len(calls)
            assert delivery.state == "lent"
            await delivery.ack()

    run(main())


# Dead letters


def test_the_last_nack_and_a_reject_are_dead_lettered_then_acked() -> None:
    """DEL-3, DEL-4: published with origin, confirmed, and only then acked; counted once."""

    async def main() -> None:
        script = Script(missing={"dead"})
        async with joined(script, retry=unistream.Retry(2), dead_letter="dead") as consumer:
            script.lend(b"1", attempt=2, key=b"k")
            script.lend(b"2")
            last, fresh = await consumer.receive_many(2)
            burial = asyncio.create_task(last.nack(reason="bad\ud800 é\n" + "x" * 9000))
            again = asyncio.create_task(last.nack())
            await spin()
            assert script.settled == []
            [letter] = script.calls[0].batch
            assert (letter.id, letter.value, letter.key, letter.dedupe) == ("id-1", b"1", b"k", "id-1/t/g")
            marks = dict(letter.headers)
            assert marks["unistream-dead-reason"].startswith(b"bad? %C3%A9%0Ax")
            assert (marks["unistream-dead-attempts"], marks["unistream-dead-group"]) == (b"2", b"g")
            assert all(len(value) <= 4096 and value.isascii() for value in marks.values())
            script.calls[0].answer()
            await asyncio.gather(burial, again)
            assert len(script.calls) == 1
            rejected = asyncio.create_task(fresh.reject("no"))
            await spin()
            script.calls[1].answer()
            await rejected
            assert script.verbs == [(1, Verb.ACK), (2, Verb.ACK)]
            stats = consumer.stats
            assert (stats.nacked, stats.rejected, stats.dead_lettered, stats.acked) == (1, 1, 2, 0)

    run(main())


@pytest.mark.parametrize(
    "error", [TopicMissingError("deleted"), unistream.TooLargeError("large"), ValueError("foreign")]
)
def test_a_dead_letter_that_fails_is_a_publish_error_and_the_delivery_stays(error: Exception) -> None:
    """The delivery is still lent; a handler's block nacks it instead, and the message comes again."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: [error] if isinstance(error, UnistreamError) else raising(error)
        async with joined(script, dead_letter="dead") as consumer:
            script.lend(b"1", b"2")
            one, two = await consumer.receive_many(2)
            with pytest.raises(PublishError) as caught:
                await one.reject("x")
            assert caught.value.stored in ("no", "unknown")
            assert one.state == "lent"
            await two._loans.conclude(two, unistream.Reject("x"))
            assert script.verbs == [(2, Verb.NACK)]
            assert consumer.stats.dead_lettered == 0
            script.publish = lambda batch, timeout: [Receipt(batch[0].id)]
            await one.reject("x")
            assert consumer.stats.dead_lettered == 1

    run(main())


def test_a_message_without_an_attempt_left_is_never_handed_out() -> None:
    """A poison message goes aside by itself; if that fails its lease runs out and the next lending tries again."""

    async def main() -> None:
        script = Script()
        script.publish = lambda batch, timeout: [unistream.NotPublishedError("no")]
        async with joined(script, retry=unistream.Retry(1), dead_letter="dead") as consumer:
            script.lend(b"poison", attempt=2)
            assert await consumer.receive(timeout=LEASE * 2) is None
            assert script.verbs == [(1, Verb.EXPIRE)]
            script.publish = lambda batch, timeout: [Receipt(batch[0].id)]
            script.lend(b"poison", attempt=3)
            assert await consumer.receive(timeout=5) is None
            assert script.verbs[-1] == (2, Verb.ACK)
            report = await consumer.close()
            assert (report.handled, consumer.stats.dead_lettered, consumer.stats.delivered) == (1, 1, 0)

    run(main())


def test_drop_means_dropped_and_counted() -> None:
    """`dead_letter=DROP`: acked without a publish, logged, counted as dropped."""

    async def main() -> None:
        script = Script()
        async with joined(script, retry=unistream.Retry(1), dead_letter=unistream.DROP) as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            await delivery.nack(reason="bad")
            assert script.verbs == [(1, Verb.ACK)]
            assert (consumer.stats.dropped, consumer.stats.dead_lettered) == (1, 0)
            assert script.calls == []

    run(main())


def test_a_lease_lost_during_a_burial_is_a_lease_lost_error() -> None:
    """The dead letter was published, the ack came too late: it will come again, and is not counted twice."""

    async def main() -> None:
        script = Script()
        async with joined(script, dead_letter="dead") as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            burial = asyncio.create_task(delivery.reject("x"))
            await spin()
            assert script.lost is not None
            script.lost([1], "rebalanced")
            assert delivery.state == "lost"
            script.calls[0].answer()
            with pytest.raises(LeaseLostError):
                await burial
            assert consumer.stats.dead_lettered == 0
            assert script.settled == []

    run(main())


def test_a_cancelled_reject_goes_on_and_is_not_doubled() -> None:
    """Cancelling the caller does not stop the burial; asking again waits for the same one."""

    async def main() -> None:
        script = Script()
        async with joined(script, dead_letter="dead") as consumer:
            script.lend(b"1")
            delivery = await consumer.receive()
            assert delivery is not None
            first = asyncio.create_task(delivery.reject("x"))
            await spin()
            first.cancel()
            await spin()
            assert first.cancelled()
            second = asyncio.create_task(delivery.reject("x"))
            await spin()
            script.calls[0].answer()
            await second
            assert len(script.calls) == 1
            assert (delivery.state, consumer.stats.dead_lettered) == ("rejected", 1)

    run(main())


async def _call(call: Any) -> None:
    call()


async def _cancelled() -> Any:
    raise asyncio.CancelledError


async def raising_or(answer: Any) -> Any:
    """An awaitable answer."""
    await asyncio.sleep(0)
    return answer
