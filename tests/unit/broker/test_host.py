"""The host: waking who waits, on virtual time; and threads, on real ones."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from tests.unit.broker.model import tags_of
from unistream.broker import GroupMissing, GroupSpec, Host, Member, SessionEnded, TopicMissing, TopicSpec, named
from unistream.conformance.clock import run

LEASE = 10.0


class Bench:
    """A host on the running loop's clock with one topic and one group."""

    def __init__(self, topic: TopicSpec | None = None, ordering: Any = "none") -> None:
        self.loop = asyncio.get_running_loop()
        self.began = self.loop.time()
        self.host = Host(monotonic=self.loop.time, wall_ms=lambda: int(self.now * 1000))
        self.host.create_topic("t", topic or TopicSpec(ordering=ordering))
        self.host.create_group("t", "g", GroupSpec(ordering=ordering, lease=LEASE))
        self.voided: list[Any] = []
        self.removed: list[int] = []
        self.count = 0

    @property
    def now(self) -> float:
        """Seconds since the bench was made."""
        return self.loop.time() - self.began

    def join(self, group: str = "g", **options: Any) -> Member:
        """A new member."""
        return self.host.join("t", group, voided=self.voided.append, removed=self.removed.append, **options)

    def publish(self, count: int = 1, key: bytes | None = None) -> None:
        """Publish `count` new messages."""
        entries = [(f"m{self.count + i}", b"v", key, ()) for i in range(count)]
        self.count += count
        self.host.publish("t", entries, [entry[0] for entry in entries])

    async def wait(self, member: Member, timeout: float = 60.0) -> tuple[list[int], float]:
        """The offsets that the member gets, and when."""
        lent = await self.host.wait(member, 10, timeout)
        return (list(lent.offsets) if lent else []), round(self.now, 6)


def virtual(main: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on virtual time."""

    def test() -> None:
        run(main())

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


async def after(seconds: float, do: Callable[[], object]) -> None:
    """Do something later."""
    await asyncio.sleep(seconds)
    do()


@virtual
async def test_a_publish_wakes_those_who_wait_and_one_gets_it() -> None:
    """All look, the first one finds it, the others go on waiting."""
    bench = Bench()
    members = [bench.join() for _ in range(3)]
    waits = [bench.wait(member, 5.0) for member in members]
    results = await asyncio.gather(*waits, after(2.0, bench.publish))

    assert results[:3] == [([0], 2.0), ([], 5.0), ([], 5.0)]


@virtual
async def test_waiting_ends_with_the_time() -> None:
    """Not before and not after."""
    bench = Bench()

    assert await bench.wait(bench.join(), 3.0) == ([], 3.0)
    assert bench.host._rooms == {}


@virtual
async def test_a_delayed_message_comes_when_it_is_due() -> None:
    """Also when the delay was set while somebody waited already."""
    bench = Bench()
    one, two = bench.join(), bench.join()
    bench.publish()
    tags = tags_of(bench.host.grant(one, 1))
    waiting = asyncio.create_task(bench.wait(two))
    await after(1.0, lambda: bench.host.nack(one, tags, 2.5))

    assert await waiting == ([0], 3.5)


@virtual
async def test_a_lease_that_ends_hands_over_at_once() -> None:
    """Whoever waits is woken by the lease's own end, which an extension moves."""
    bench = Bench()
    one, two = bench.join(), bench.join()
    bench.publish()
    tags = tags_of(bench.host.grant(one, 1))
    waiting = asyncio.create_task(bench.wait(two))
    await after(8.0, lambda: bench.host.extend(one, tags, LEASE))

    assert await waiting == ([0], 18.0)


@virtual
async def test_a_member_that_waited_longer_is_still_woken_after_another_stopped_waiting() -> None:
    """Each has its own timer; that one went away does not hide what comes due for the other."""
    bench = Bench()
    one, two, three = bench.join(), bench.join(), bench.join()
    bench.publish()
    tags = tags_of(bench.host.grant(one, 1))
    short = asyncio.create_task(bench.wait(two, 1.0))
    long = asyncio.create_task(bench.wait(three, 60.0))
    assert await short == ([], 1.0)
    bench.host.nack(one, tags, 4.0)

    assert await long == ([0], 5.0)


@virtual
async def test_a_settle_that_frees_a_key_wakes_the_next() -> None:
    """In an ordered group the next message of the key goes to whoever waits."""
    bench = Bench(ordering="key")
    one, two = bench.join(), bench.join()
    bench.publish(2, b"k")
    tags = tags_of(bench.host.grant(one, 10))
    waiting = asyncio.create_task(bench.wait(two))
    await after(1.0, lambda: bench.host.ack(one, tags))

    assert await waiting == ([1], 1.0)


@virtual
async def test_cancelled_waiting_takes_nothing() -> None:
    """What comes later goes to others, and nobody is left waiting."""
    bench = Bench()
    one, two = bench.join(), bench.join()
    waiting = asyncio.create_task(bench.wait(one))
    await asyncio.sleep(1.0)
    waiting.cancel()
    bench.publish()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert bench.host._rooms == {}
    assert await bench.wait(two) == ([0], 1.0)


@virtual
async def test_waiting_ends_with_the_membership() -> None:
    """Leaving, deleting the group and deleting the topic each say what happened."""
    bench = Bench()
    bench.host.create_group("t", "h", GroupSpec())
    leaving, grouped, topical = bench.join(), bench.join(), bench.join("h")
    waits = [asyncio.create_task(bench.wait(member)) for member in (leaving, grouped, topical)]
    await asyncio.sleep(1.0)
    bench.host.leave(leaving)
    bench.host.delete_group("t", "g")
    bench.host.delete_topic("t")
    kinds = [type(result) for result in await asyncio.gather(*waits, return_exceptions=True)]

    assert kinds == [SessionEnded, GroupMissing, TopicMissing]
    assert bench.now == 1.0


@virtual
async def test_a_member_that_is_dropped_is_found_dead() -> None:
    """What it held goes to others as suspect, and it is no member any more."""
    bench = Bench()
    one, two = bench.join(), bench.join()
    bench.publish()
    bench.host.grant(one, 1)
    del one
    gc.collect()

    assert bench.host.members("t", "g") == [(two.session.name, 0)]
    lent = bench.host.grant(two, 1)
    assert lent is not None
    assert lent.suspect


@virtual
async def test_an_ephemeral_group_goes_with_its_member() -> None:
    """Closed or dropped, it leaves nothing; while it lives it is not among the groups."""
    bench = Bench()
    spec = GroupSpec(ephemeral=True)
    closed, dropped = bench.join("e1", ephemeral=spec), bench.join("e2", ephemeral=spec)
    bench.publish()
    assert bench.host.lag("t", "e1") == bench.host.lag("t", "e2") == 1
    assert [name for name, _ in bench.host.groups("t")] == ["g"]
    bench.host.leave(closed)
    del dropped
    gc.collect()
    for name in ("e1", "e2"):
        with pytest.raises(GroupMissing):
            bench.host.lag("t", name)


@virtual
async def test_a_seek_tells_the_members_which_loans_ended() -> None:
    """On their loop, with the tags."""
    bench = Bench()
    one, two = bench.join(), bench.join()
    bench.publish(2)
    tags = tags_of(bench.host.grant(one, 1))
    bench.host.seek("t", "g", "latest")
    await asyncio.sleep(0)

    assert bench.voided == [tags]
    assert await bench.wait(two, 1.0) == ([], 1.0)


@virtual
async def test_what_was_removed_is_told_once() -> None:
    """One member of each group hears the number; without members it is told to the first that joins."""
    bench = Bench(TopicSpec(max_messages=2))
    bench.publish(5)
    await asyncio.sleep(0)
    assert bench.removed == []
    members = [bench.join(), bench.join()]
    await asyncio.sleep(0)
    assert bench.removed == [3]
    bench.publish(1)
    bench.publish(1)
    await asyncio.sleep(0)

    assert bench.removed == [3, 2]
    assert len(members) == 2


def test_threads_share_a_broker() -> None:
    """Four loops in four threads and two publishing threads: every message is settled once."""
    host = Host()
    host.create_topic("t", TopicSpec())
    host.create_group("t", "g", GroupSpec())
    seen: list[list[str]] = [[] for _ in range(4)]
    joined = threading.Barrier(6)
    total = 4000

    async def consume(mine: list[str]) -> None:
        member = host.join("t", "g", voided=print, removed=print)
        joined.wait(30)
        while host.lag("t", "g") or len(set().union(*seen)) < total:
            lent = await host.wait(member, 7, 0.05)
            if lent:
                mine += [entry[0] for entry in lent.entries]
                assert host.ack(member, tags_of(lent)) == []
        host.leave(member)

    def publish(name: str) -> None:
        joined.wait(30)
        for i in range(total // 2):
            host.publish("t", [(f"{name}{i}", b"", None, ())], [f"{name}{i}"])

    def consuming(mine: list[str]) -> None:
        asyncio.run(consume(mine))

    threads = [threading.Thread(target=consuming, args=[mine]) for mine in seen]
    threads += [threading.Thread(target=publish, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    settled = [id_ for mine in seen for id_ in mine]
    assert sorted(settled) == sorted({f"{name}{i}" for name in "ab" for i in range(total // 2)})


def test_a_member_on_a_closed_loop_stops_nobody() -> None:
    """Its loop ended without a word while it waited; the others are woken all the same."""
    host = Host()
    host.create_topic("t", TopicSpec())
    host.create_group("t", "g", GroupSpec())
    loop = asyncio.new_event_loop()

    async def wait() -> Member:
        member = host.join("t", "g", voided=print, removed=print)
        waiting = asyncio.ensure_future(host.wait(member, 1, 60.0))
        await asyncio.sleep(0)
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]
        kept.append(waiting)
        return member

    kept: list[Awaitable[Any]] = []
    member = loop.run_until_complete(wait())
    loop.close()
    host.publish("t", [("a", b"", None, ())], ["a"])

    assert host.lag("t", "g") == 1
    assert host.members("t", "g") == [(member.session.name, 0)]
    for waiting in kept:
        waiting.get_coro().close()  # type: ignore[attr-defined]


FORKING = """
import os
from unistream.broker import TopicSpec, named
named("a").create_topic("t", TopicSpec())
child = os.fork()
if child == 0:
    os._exit(len(named("a").topics()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(named("a").topics()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_a_forked_child_starts_without_brokers() -> None:
    """What the parent named stays the parent's."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.split() == ["0", "1"]


def test_a_name_is_one_broker() -> None:
    """The same name is the same broker until the process ends."""
    assert named("test-host-a") is named("test-host-a")
    assert named("test-host-a") is not named("test-host-b")
