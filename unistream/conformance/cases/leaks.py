"""Cases `lek.*`, and what waiting costs: nothing that was opened stays behind, and nothing grows with use."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unistream import Retention, sync
from unistream.conformance.registry import SHOULD, Tier, case
from unistream.conformance.tasks import Together
from unistream.conformance.trial import Trial

ROUNDS = 6
MIB = 1 << 20


def _open_files() -> int:
    """How many file descriptors this process has, or 0 where nobody can tell."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder))
    return 0


def _census() -> dict[str, int]:
    gc.collect()
    return {
        "file descriptors": _open_files(),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect what Python says of things that nobody closed, awaited or looked at."""
    found: list[str] = []
    loop = asyncio.get_running_loop()
    hook, handler = sys.unraisablehook, loop.get_exception_handler()
    sys.unraisablehook = lambda args: found.append(f"unraisable: {args.exc_value!r} in {args.object!r}")
    loop.set_exception_handler(lambda _, context: found.append(str(context.get("message"))))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", ResourceWarning)
            warnings.filterwarnings("always", "coroutine .* was never awaited", RuntimeWarning)
            yield found
            gc.collect()
            found += [str(warning.message) for warning in caught]
    finally:
        sys.unraisablehook = hook
        loop.set_exception_handler(handler)


async def _use(trial: Trial, topic: str, group: str) -> None:
    """Open a client, use all of it, and close it; then the same in the blocking face."""
    async with trial.target.connect() as client, client.producer(topic) as producer:
        await producer.publish(b"x")
        async with client.group(group, topic, lease=trial.lease).consumer() as consumer:
            delivery = await consumer.receive(trial.pace.patience)
            assert delivery is not None
            await delivery.ack()

    def blocking() -> None:
        with sync.Client(trial.target.connect()) as client, client.producer(topic) as producer:
            producer.publish(b"x")
            with client.group(group, topic, lease=trial.lease).consumer() as consumer:
                delivery = consumer.receive(trial.pace.patience)
                assert delivery is not None
                delivery.ack()

    await asyncio.to_thread(blocking)


@case("lek.client", rules=("END-2", "END-1"), alone=True, sometimes=("rounds",), limit=240.0)
async def client(trial: Trial) -> None:
    """Opening, using and closing clients leaves no file, thread or task behind, nor a complaint of Python's."""
    topic = await trial.topic()
    group = await trial.group(topic)
    await _use(trial, topic, group.name or "")
    before = _census()
    with _complaints() as complaints:
        for _ in range(ROUNDS):
            await _use(trial, topic, group.name or "")
            trial.tally("rounds")
        grown = await _settled(trial, before)
    trial.equal(grown, {}, "END-2", f"growth over {ROUNDS} clients of each face:")
    trial.equal(complaints, [], "END-2", "complaints about things left behind:")


async def _settled(trial: Trial, before: dict[str, int]) -> dict[str, str]:
    """Wait until all that ends in its own time has ended; return what has grown by one a round or more."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + trial.pace.patience / 3
    while True:
        grown = {
            what: f"{before[what]} -> {count}" for what, count in _census().items() if count >= before[what] + ROUNDS
        }
        if not grown or loop.time() >= ends:
            return grown
        await asyncio.sleep(0.1)


@case("lek.broker", rules=("GRP-5", "END-1"), sometimes=("rounds",), limit=120.0)
async def broker(trial: Trial) -> None:
    """Members and ephemeral groups that have left are gone from the broker's lists."""
    topic = await trial.topic()
    group = await trial.group(topic)
    before = sorted(spec.name for spec in await trial.client.groups(topic))
    for _ in range(5):
        client = await trial.open()
        async with trial.regroup(client, group).consumer() as lasting, client.group(None, topic).consumer() as passing:
            async with client.producer(topic) as producer:
                await producer.publish(b"x")
            for consumer in (lasting, passing):
                delivery = await consumer.receive(trial.pace.patience)
                trial.that(delivery is not None, "GRP-1", "a delivery to each member", "none")
                assert delivery is not None
                await delivery.ack()
            trial.tally("rounds")
        await client.close()
    left = await trial.within(
        trial.pace.patience + trial.claims.lease.dead_peer_after,
        _no_members(group),
        "END-1",
        "an empty list of members",
    )
    trial.equal(left, 0, "END-1", "members after all have left")
    after = sorted(spec.name for spec in await trial.client.groups(topic))
    trial.equal(after, before, "GRP-5", "groups of the topic")


async def _no_members(group: Any) -> int:
    while members := await group.members():  # noqa: ASYNC110 - see below
        await asyncio.sleep(0.1)  # the broker's list is asked again; nothing tells of its changes
    return len(members)


@case("lek.steady", rules=("END-2", "BPC-2"), alone=True, sometimes=("messages",), limit=180.0)
async def steady(trial: Trial) -> None:
    """Memory does not grow with the messages that went through, on either side."""
    # A broker in this process keeps its history of settled messages here, unless told not to, and ids it has seen.
    inside = "process" in trial.target.lacks
    topic = await trial.topic(retention=Retention(max_messages=100) if inside and trial.claims.retention else None)
    group = await trial.group(topic, lease=10 * trial.lease)
    batch, allowed = 50, 1000 if inside else 100
    async with trial.client.producer(topic) as producer, group.consumer() as consumer:

        async def round_trip(count: int) -> None:
            for _ in range(count):
                await producer.submit(os.urandom(4000))
            for _ in range(count):
                delivery = await consumer.receive(trial.pace.patience)
                trial.that(delivery is not None, "GRP-1", "a delivery", "none")
                assert delivery is not None
                await delivery.ack()
            trial.tally("messages", count)

        tracemalloc.start()
        try:
            # Whatever is kept for a while by intent, such as a history of settled messages, fills up first.
            for _ in range(48):
                await round_trip(batch)
            # The last acks are on their way, and their messages with them.
            await asyncio.sleep(trial.terms.settle_flush)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(48):
                await round_trip(batch)
            await asyncio.sleep(trial.terms.settle_flush)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    each = (after - before) / (48 * batch)
    trial.that(each < allowed, "END-2", f"less than {allowed} bytes kept per message", f"{each:.0f} bytes")


def _resident() -> int:
    """Bytes of memory that this process has, memory of C libraries included, or 0 where nobody can tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


@case("bpc.client-buffer-bounded", rules=("BPC-2",), alone=True, sometimes=("backlog",), limit=120.0)
async def client_buffer_bounded(trial: Trial) -> None:
    """A stalled handler before a backlog of 40 MB does not make the process grow by more than its bound and a fetch."""
    topic = await trial.topic()
    group = await trial.group(topic, lease=30 * trial.lease)
    body = 10_000
    async with trial.client.producer(topic) as producer:
        for _ in range(4_000):
            await producer.submit(os.urandom(body))
    trial.tally("backlog", 4_000)
    gc.collect()
    before = _resident()
    tracemalloc.start()
    try:
        client = await trial.open()
        group = trial.regroup(client, group)
        async with group.consumer(max_in_flight=10, max_in_flight_bytes=MIB) as consumer:
            delivery = await consumer.receive(trial.pace.patience)
            trial.that(delivery is not None, "GRP-1", "a delivery", "none")
            await asyncio.sleep(2 * trial.pace.silence)
            traced, _ = tracemalloc.get_traced_memory()
            grown = max(traced, _resident() - before if before else 0)
            trial.that(grown < 16 * MIB, "BPC-2", "less than 16 MiB of growth", f"{grown / MIB:.1f} MiB")
    finally:
        tracemalloc.stop()


@case("con.idle-cost", rules=("END-3",), alone=True, sometimes=("idle",))
async def idle_cost(trial: Trial) -> None:
    """A consumer that waits for nothing costs less than 2 % of a core."""
    topic = await trial.topic()
    group = await trial.group(topic)
    seconds = 3.0
    async with trial.client.producer(topic) as producer, group.consumer() as consumer:
        trial.that(await consumer.receive(trial.pace.silence) is None, "GRP-1", "nothing yet", "a delivery")
        busy, began = time.process_time(), time.monotonic()
        trial.that(await consumer.receive(seconds) is None, "GRP-1", "nothing", "a delivery")
        share = (time.process_time() - busy) / (time.monotonic() - began)
        # Whoever listens to nobody costs nothing either.
        await producer.publish(b"x")
        delivery = await consumer.receive(trial.pace.patience)
        trial.that(delivery is not None, "GRP-1", "a delivery after the idle time", "none")
        assert delivery is not None
        await delivery.ack()
    trial.tally("idle")
    trial.that(share < 0.02, "END-3", "less than 2 % of a core", f"{100 * share:.2f} %")


async def _through(trial: Trial, topic: str, group: Any) -> None:
    """Let one message through a topic and a group."""
    async with trial.client.producer(topic) as producer, group.consumer() as consumer:
        await producer.publish(b"x")
        delivery = await consumer.receive(trial.pace.patience)
        trial.that(delivery is not None, "GRP-1", f"a delivery of {topic}", "none")
        assert delivery is not None
        await delivery.ack()


@case("ovl.many-topics", rules=("GRP-1", "GRP-7"), level=SHOULD, tier=Tier.LONG, sometimes=("topics",), limit=600.0)
async def many_topics(trial: Trial) -> None:
    """Two hundred topics are made, used and deleted, and leave nothing in the list."""
    names = [await trial.topic() for _ in range(200)]
    for start in range(0, len(names), 20):
        async with asyncio.TaskGroup() as tasks:
            for name in names[start : start + 20]:
                tasks.create_task(_through(trial, name, trial.client.group("g", name, lease=trial.lease)))
        trial.tally("topics", 20)
    for name in names:
        await trial.client.delete_topic(name)
    left = {spec.name for spec in await trial.client.topics()} & set(names)
    trial.equal(left, set(), "GRP-7", "topics left")


@case("ovl.connect-storm", rules=("END-3",), level=SHOULD, tier=Tier.LONG, sometimes=("connected",), limit=120.0)
async def connect_storm(trial: Trial) -> None:
    """A hundred clients that connect at once are all served."""

    async def one() -> None:
        client = await trial.works(trial.open(), "END-3", "a connection beside others")
        health = await client.health()
        trial.that(health.ok, "END-3", "a healthy client", health)
        trial.tally("connected")

    async with Together() as tasks:
        for _ in range(100):
            tasks.create_task(one())


@case("ovl.backlog-drain", rules=("GRP-1", "GRP-2"), tier=Tier.LONG, sometimes=("handled",), limit=300.0)
async def backlog_drain(trial: Trial) -> None:
    """A backlog of 20 000 messages is drained by four members, each message once."""
    topic = await trial.topic(partitions=4)
    group = await trial.group(topic, lease=30 * trial.lease)
    wanted = 20_000
    async with trial.client.producer(topic) as producer:
        for number in range(wanted):
            await producer.submit(b"%d" % number)
    seen: dict[bytes, int] = {}

    async def drain() -> None:
        async with trial.regroup(await trial.open(), group).consumer(max_in_flight=200) as consumer:
            while len(seen) < wanted:
                delivery = await consumer.receive(trial.pace.silence)
                if delivery is not None:
                    seen[delivery.value] = seen.get(delivery.value, 0) + 1
                    await delivery.ack()

    members = asyncio.gather(*(drain() for _ in range(4)))
    await trial.within(240.0, members, "GRP-1", f"{wanted} messages")
    trial.tally("handled", len(seen))
    again = sum(count - 1 for count in seen.values())
    trial.equal(again, 0, "GRP-2", "second deliveries")
