"""Members in real processes that are killed, stopped and cut off under load: no promise is broken."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Literal, NamedTuple

import pytest

import unistream
from tests.adapters.redis.support import opened, run
from tests.brokers import local

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]

COUNT = 4000
LEASE = 1.5


class Span(NamedTuple):
    """A message in the hands of a member: `end` is infinite where the member never said so."""

    begin: float
    end: float
    member: int
    attempt: int
    id: str
    key: str


class Crew:
    """The members' processes."""

    def __init__(self, url: str, topic: str, ordering: str, folder: Path) -> None:
        self._url, self._topic, self._ordering, self._folder = url, topic, ordering, folder
        self.members: list[Popen[bytes]] = []

    def start(self) -> None:
        """Start one more."""
        log = self._folder / str(len(self.members))
        words = [self._url, self._topic, "g", self._ordering, str(LEASE), str(log)]
        self.members.append(Popen([sys.executable, "-m", "tests.adapters.redis.worker", *words]))

    def spans(self) -> list[Span]:
        """What they wrote down, by time."""
        spans = []
        for member in range(len(self.members)):
            begun: dict[tuple[str, str], tuple[float, str]] = {}
            path = self._folder / str(member)
            for line in path.read_text().splitlines() if path.exists() else ():
                what, identity, key, attempt, at = line.split()
                if what == "begin":
                    begun[identity, attempt] = (float(at), key)
                else:
                    begin, _ = begun.pop((identity, attempt))
                    spans.append(Span(begin, float(at), member, int(attempt), identity, key))
            for (identity, attempt), (begin, key) in begun.items():
                spans.append(Span(begin, float("inf"), member, int(attempt), identity, key))
        return sorted(spans)


@contextmanager
def crew(url: str, topic: str, ordering: str, folder: Path) -> Iterator[Crew]:
    """A crew that is gone at the end, whatever happens."""
    made = Crew(url, topic, ordering, folder)
    try:
        yield made
    finally:
        for member in made.members:
            member.send_signal(signal.SIGCONT)
            member.terminate()
        for member in made.members:
            member.wait(30)


@pytest.mark.parametrize("ordering", ["none", "key"])
def test_members_killed_stopped_and_cut_off(ordering: Literal["none", "key"], tmp_path: Path) -> None:
    """SIGKILL, SIGSTOP beyond the lease and cut connections, under load, break no promise."""
    killed, stopped = 0, 1

    async def test() -> None:
        # A Redis of its own: every connection to it is cut.
        with local("redis", tmp_path / "redis") as server:
            await work(server.url)

    async def work(url: str) -> None:
        async with opened(url) as here, unistream.connect(url) as client:
            await client.create_topic(here.name, partitions=6, ordering=ordering)
            group = client.group("g", here.name, ordering=ordering, lease=LEASE, max_lease=60.0)
            await group.create()
            with crew(url, here.name, ordering, tmp_path) as members:
                for _ in range(3):
                    members.start()
                async with client.producer(here.name) as producer:
                    for number in range(COUNT):
                        await producer.submit(b"", key=b"%d" % (number % 60), id=str(number))
                await until(lambda: len(members.spans()) > COUNT // 10)
                members.members[killed].kill()
                members.start()
                await until(lambda: len(members.spans()) > COUNT // 5)
                members.members[stopped].send_signal(signal.SIGSTOP)
                await asyncio.sleep(2.5 * LEASE)
                members.members[stopped].send_signal(signal.SIGCONT)
                await here.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                left = -1
                while left:
                    await asyncio.sleep(0.2)
                    left = (await group.lag()).messages
            check(members.spans(), ordering)

    async def until(condition) -> None:  # type: ignore[no-untyped-def]
        while not condition():  # noqa: ASYNC110 - the members are other processes
            await asyncio.sleep(0.05)

    def check(spans: list[Span], ordering: str) -> None:
        by_id: dict[str, list[Span]] = defaultdict(list)
        by_key: dict[str, list[Span]] = defaultdict(list)
        for span in spans:
            by_id[span.id].append(span)
            by_key[span.key].append(span)
        assert set(by_id) == {str(number) for number in range(COUNT)}, "a message was lost"
        again = [chain for chain in by_id.values() if len(chain) > 1]
        print(f"{len(spans)} lendings of {COUNT} messages, {len(again)} messages more than once")
        assert again, "nobody died of anything: the faults did not bite"
        for chain in by_key.values() if ordering == "key" else again:
            for one, other in itertools.pairwise(chain):
                # What a killed or stopped member held ended with its lease, though it could not say so.
                lost = one.end - one.begin > LEASE and one.member in (killed, stopped)
                end = one.begin if lost else one.end
                assert other.begin >= end or one.member == other.member == stopped, f"{one} and {other} overlap"
        if ordering == "key":
            for key, chain in by_key.items():
                first = list(dict.fromkeys(int(span.id) for span in chain))
                assert first == sorted(first), f"key {key} out of order"
                newest = -1
                for span in chain:
                    assert int(span.id) >= newest or span.member == stopped, f"{span} after {newest}"
                    newest = max(newest, int(span.id))

    run(test)
