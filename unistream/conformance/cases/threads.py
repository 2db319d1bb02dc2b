"""Cases `thr.*`: threads, the blocking face, the wrong event loop, forks, and exact concurrency."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import unistream
from unistream import sync
from unistream.conformance.registry import case
from unistream.conformance.trial import CheckError, Trial, VacuousError
from unistream.errors import ClosedError, UnistreamError

THREADS = 8
EACH = 25


@case("thr.many-threads", rules=("PUB-2", "GRP-2", "GRP-1"), alone=True, sometimes=("receipts", "handled"), limit=90.0)
async def many_threads(trial: Trial) -> None:
    """Eight threads on one blocking client: every receipt is its caller's, and every message is handled once."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=10 * trial.lease)
    receipts, handled = await asyncio.to_thread(_crowd, trial, topic, group.name or "")
    trial.tally("receipts", len(receipts))
    trial.tally("handled", len(handled))
    mixed = [f"{asked} got {given}" for asked, given in receipts if asked != given]
    trial.equal(mixed, [], "PUB-2", "receipts of another caller's message")
    trial.equal(len(receipts), THREADS * EACH, "PUB-2", "receipts")
    twice = sorted({name for name in handled if handled.count(name) > 1})
    trial.equal(twice, [], "GRP-2", "messages handled by two threads")
    trial.equal(set(handled), {asked for asked, _ in receipts}, "GRP-1", "messages handled")


def _crowd(trial: Trial, topic: str, group: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Publish and consume from threads; return (id asked for, id in the receipt) pairs, and the bodies handled."""
    receipts: list[tuple[str, str]] = []
    handled: list[str] = []
    ends = time.monotonic() + 2 * trial.pace.patience
    with sync.Client(trial.target.connect()) as client:

        def publish(number: int, producer: sync.Producer) -> None:
            for turn in range(EACH):
                name = f"{trial.run}-{number}-{turn}"
                receipts.append((name, producer.publish(name.encode(), id=name).id))

        def consume(consumer: sync.Consumer) -> None:
            while len(handled) < THREADS * EACH and time.monotonic() < ends:
                delivery = consumer.receive(0.2)
                if delivery is not None:
                    handled.append(delivery.value.decode())
                    delivery.ack()

        with (
            client.producer(topic) as producer,
            client.group(group, topic, lease=10 * trial.lease).consumer() as consumer,
            ThreadPoolExecutor(2 * THREADS) as threads,
        ):
            work = [threads.submit(publish, number, producer) for number in range(THREADS)]
            work += [threads.submit(consume, consumer) for _ in range(THREADS)]
            for each in work:
                each.result()
    return receipts, handled


@case("thr.wrong-loop", rules=("END-6",), alone=True, sometimes=("refused", "delivered"))
async def wrong_loop(trial: Trial) -> None:
    """Use from a second event loop is a ClosedError that says so, at once, and harms nothing."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    lent = await trial.next(member)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "topics": trial.client.topics,
        "publish": lambda: producer.producer.publish(b"x"),
        "receive": lambda: member.consumer.receive(1.0),
        "ack": lent.delivery.ack,
        "lag": lambda: trial.client.group("g", topic).create(),
    }

    async def elsewhere() -> dict[str, str]:
        found = {}
        for name, call in calls.items():
            try:
                async with asyncio.timeout(5.0):
                    found[name] = f"it returned {await call()!r}"
            except ClosedError as error:
                found[name] = "ok" if "event loop" in str(error) else str(error)
            except Exception as error:  # any other error is a finding, and named
                found[name] = repr(error)
        return found

    found = await asyncio.to_thread(asyncio.run, elsewhere())
    trial.tally("refused", sum(each == "ok" for each in found.values()))
    trial.equal(found, dict.fromkeys(calls, "ok"), "END-6", "ClosedError that names the event loop, of each call:")
    await lent.ack()
    await producer.publish()
    await (await trial.next(member, "END-6")).ack()


FORK_SECONDS = 10.0


@case("thr.fork", rules=("END-6",), alone=True, sometimes=("forked", "delivered"))
async def fork(trial: Trial) -> None:
    """In a forked child the client is a ClosedError that says so, at once; the parent's goes on."""
    if not hasattr(os, "fork"):
        raise VacuousError("this operating system has no fork")
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    await producer.publish()
    lent = await trial.next(member)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "topics": trial.client.topics,
        "publish": lambda: producer.producer.publish(b"x"),
        "receive": lambda: member.consumer.receive(1.0),
    }
    for name, call in calls.items():
        trial.equal(await asyncio.to_thread(_in_child, call), "ok", "END-6", f"{name} in the child:")
        trial.tally("forked")
    await lent.ack()
    await producer.publish()
    await (await trial.next(member, "END-6")).ack()


def _in_child(call: Callable[[], Awaitable[object]]) -> str:
    """Make a call in a forked child; return `ok` when it is the right error, else what it was."""
    out, into = os.pipe()
    with warnings.catch_warnings():
        # Forking with threads about is what this is for; the child only makes the call and ends.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.write(into, _word(call).encode())
        finally:
            os._exit(0)
    os.close(into)
    try:
        ready, _, _ = select.select([out], [], [], FORK_SECONDS)
        return os.read(out, 4096).decode() if ready else f"no answer within {FORK_SECONDS} s"
    finally:
        os.close(out)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _word(call: Callable[[], Awaitable[object]]) -> str:
    async def make() -> object:
        return await call()

    try:
        return f"it returned {asyncio.run(make())!r}"
    except ClosedError as error:
        return "ok" if "fork" in str(error) else str(error)
    except Exception as error:  # any other error is a finding, and named
        return repr(error)


@case("thr.concurrency-exact", rules=("DEL-11",), sometimes=("handled",))
async def concurrency_exact(trial: Trial) -> None:
    """`run(concurrency=5)` runs five handlers at a time when there is work, and never six."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=10 * trial.lease)
    producer = await trial.producer(topic)
    for _ in range(60):
        await producer.submit()
    await producer.watched()
    running = peak = handled = 0
    done = asyncio.Event()

    async def handler(delivery: unistream.Delivery) -> None:
        nonlocal running, peak, handled
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.02)
        running -= 1
        handled += 1
        if handled == 60:
            done.set()

    running_group = asyncio.create_task(group.run(handler, concurrency=5))
    try:
        await trial.within(2 * trial.pace.patience, done.wait(), "DEL-11", "60 messages handled")
    finally:
        running_group.cancel()
        await asyncio.wait({running_group})
    trial.tally("handled", handled)
    trial.equal(peak, 5, "DEL-11", "handlers at a time")


@case("thr.handlers-in-threads", rules=("DEL-11", "END-1"), alone=True, sometimes=("handled",))
async def handlers_in_threads(trial: Trial) -> None:
    """In the blocking face handlers run in threads, exactly as many as asked for, and closing the client ends `run`."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=10 * trial.lease)
    producer = await trial.producer(topic)
    for _ in range(30):
        await producer.submit()
    await producer.watched()
    peak, handled, names, report = await asyncio.to_thread(_run_blocking, trial, topic, group.name or "")
    trial.tally("handled", handled)
    trial.equal(handled, 30, "DEL-11", "messages handled")
    trial.equal(peak, 3, "DEL-11", "handlers at a time")
    trial.that(threading.current_thread().name not in names, "DEL-11", "handlers in threads of their own", names)
    trial.equal(report.abandoned, 0, "END-1", "deliveries abandoned")


def _run_blocking(trial: Trial, topic: str, group: str) -> tuple[int, int, set[str], unistream.DrainReport]:
    """Run a blocking handler until thirty are done; return the peak, how many, in which threads, and the report."""
    lock = threading.Lock()
    done = threading.Event()
    running = peak = handled = 0
    names: set[str] = set()

    def handler(delivery: sync.Delivery) -> None:
        nonlocal running, peak, handled
        with lock:
            running += 1
            peak = max(peak, running)
            names.add(threading.current_thread().name)
        time.sleep(0.02)
        with lock:
            running -= 1
            handled += 1
            if handled == 30:
                done.set()

    client = sync.Client(trial.target.connect())
    with client, ThreadPoolExecutor(1) as threads:
        of = client.group(group, topic, lease=10 * trial.lease)
        report = threads.submit(of.run, handler, concurrency=3)
        done.wait(2 * trial.pace.patience)
        client.close()
        return peak, handled, names, report.result(trial.pace.patience)


@case("thr.both-faces-alike", rules=("PUB-2", "DEL-4", "DEL-5", "END-6"), alone=True, sometimes=("compared",))
async def both_faces_alike(trial: Trial) -> None:
    """One program text gives the same results, errors included, through the asyncio face and the blocking one."""
    loop = asyncio.get_running_loop()
    patience = 2 * trial.pace.patience
    face: dict[str, list[object]] = {}

    def over_loop(doing: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, loop).result(patience)

    def blocking(topic: str) -> list[object]:
        with sync.Client(trial.target.connect()) as client:
            return _program(client, topic, lambda result: result, "__enter__", "__exit__")

    face["asyncio"] = await asyncio.to_thread(
        _program, await trial.open(), await trial.topic(), over_loop, "__aenter__", "__aexit__"
    )
    face["blocking"] = await asyncio.to_thread(blocking, await trial.topic())
    for ours, theirs in zip(face["asyncio"], face["blocking"], strict=True):
        trial.equal(theirs, ours, "PUB-2", "result of the blocking face:")
        trial.tally("compared")


def _program(client: Any, topic: str, call: Callable[[Any], Any], enter: str, leave: str) -> list[object]:
    """Publish, lend, nack, settle twice, wait in vain, use after close; return what came of each step."""
    results: list[object] = []

    def outcome(step: Callable[[], Any]) -> Any:
        try:
            return call(step())
        except UnistreamError as error:
            return type(error).__name__, getattr(error, "stored", None), error.retryable

    group = client.group("g", topic, lease=10.0)
    call(group.create())
    producer = client.producer(topic)
    call(getattr(producer, enter)())
    receipt = call(producer.publish(b"value", key="key", headers={"h": b"\x00", "g": "text"}, id="id-1"))
    confirmation = call(producer.submit(b"", id="id-2"))
    results += [receipt.id, call(confirmation.result(10.0)).id, confirmation.done()]
    many = call(producer.publish_many([unistream.Message(b"third"), b"fourth"]))
    results += [[type(each).__name__ for each in many], producer.stats]
    consumer = group.consumer(max_in_flight=10)
    call(getattr(consumer, enter)())
    for _ in range(4):
        delivery = call(consumer.receive(15.0))
        if delivery is None:
            raise CheckError("GRP-1", "four deliveries", "fewer")
        results.append((delivery.value, delivery.key, delivery.headers.items(), delivery.attempt, str(delivery.state)))
        call(delivery.nack(0.0) if delivery.value == b"third" else delivery.ack())
        results += [str(delivery.state), outcome(delivery.ack)]
    again = call(consumer.receive(15.0))
    results += [(again.value, again.attempt), outcome(lambda: again.reject("enough"))]
    results += [outcome(lambda: again.reject("enough")), outcome(lambda: consumer.receive(0.05))]
    call(getattr(consumer, leave)(None, None, None))
    results.append(outcome(lambda: consumer.receive(0.05)))
    call(getattr(producer, leave)(None, None, None))
    results += [outcome(lambda: producer.publish(b"late")), outcome(lambda: client.delete_topic("no such name"))]
    return results
