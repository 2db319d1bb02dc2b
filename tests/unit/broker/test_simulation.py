"""Long random runs of the broker against its model, on a virtual clock; a seed names a run for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.unit.broker.model import Pair
from unistream.broker.spec import GroupSpec, Limits, TopicSpec

STEPS = 1000
SEEDS = range(18)


KINDS: list[dict[str, Any]] = [
    {},
    {"max_age": 5.0},
    {"max_bytes": 2000},
    {"max_backlog": 10, "overflow": "reject"},
    {"max_messages": 50},
    {"max_backlog": 10, "overflow": "drop_oldest"},
    {"max_messages": 5},
    {"max_backlog": 100, "overflow": "drop_oldest"},
    {"max_age": 60.0, "max_bytes": 200},
]
"""Topics that differ in what they remove or refuse; neighbouring seeds take turns at them."""


class Run:
    """One random run: which command comes next depends on the seed alone."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        limits = Limits(
            history_messages=32 if seed % 2 else 500, dedupe_seconds=30.0, message_bytes=100, dedupe_ids=100_000
        )
        ordering = self.rng.choice(["none", "key"])
        self.pair = Pair(TopicSpec(ordering=ordering, **KINDS[seed % len(KINDS)]), limits)
        self.serial = 0
        self.tags: list[tuple[object, list[tuple[int, int]]]] = []

    def step(self) -> None:
        """Do one command."""
        commands = {
            self.publish: 20,
            self.grant: 25,
            self.settle: 30,
            self.advance: 8,
            self.join: 4,
            self.part: 3,
            self.create: 2,
            self.seek: 1,
            self.delete: 0.3,
        }
        self.rng.choices(list(commands), list(commands.values()))[0]()

    def publish(self) -> None:
        """A batch with some duplicates and now and then one that is too large."""
        entries = []
        for _ in range(self.rng.choice([1, 1, 3, 10])):
            self.serial += 1
            # Most duplicates come soon, some when the window has passed.
            again = self.rng.randrange(self.rng.choice([10, 200])) if self.rng.random() < 0.05 else 0
            id_ = f"m{max(1, self.serial - again)}"
            if id_ in self.pair.ids and 29.0 < self.pair.now - self.pair.ids[id_][1] < 31.0:
                # The window ends to within a hundredth; the model does not say on which side this one falls.
                id_ = f"m{self.serial}"
            key = self.rng.choice([None, b"", b"a", b"b", b"c"])
            size = 200 if self.rng.random() < 0.01 else self.rng.randrange(30)
            entries.append((id_, b"x" * size, key, (("h", b"v"),) if self.rng.random() < 0.2 else (), 0))
        self.pair.publish(entries)

    def grant(self) -> None:
        """A member asks for some."""
        if self.pair.sessions:
            session = self.rng.choice(self.pair.sessions)
            tags = self.pair.grant(session, self.rng.choice([1, 2, 10]))
            if tags:
                self.tags.append((session, tags))

    def settle(self) -> None:
        """Somebody settles some of a batch, perhaps long after, perhaps twice."""
        if not self.tags:
            return
        index = self.rng.randrange(len(self.tags))
        session, tags = self.tags[index]
        if session not in self.pair.sessions:
            del self.tags[index]
            return
        # As lent, or anything of it in any order.
        some = tags if self.rng.random() < 0.5 else self.rng.sample(tags, self.rng.randint(1, len(tags)))
        verb = self.rng.choice(["ack", "ack", "ack", "nack", "nack", "release", "extend"])
        seconds = [1.0, 8.0, 30.0] if verb == "extend" else [0.0, 0.5, 7.0]
        self.pair.settle(session, verb, some, self.rng.choice(seconds))
        if self.rng.random() < 0.7:
            left = [tag for tag in tags if tag not in some]
            if left:
                self.tags[index] = (session, left)
            else:
                del self.tags[index]

    def advance(self) -> None:
        """Time passes."""
        self.pair.advance(self.rng.choice([0.001, 0.5, 3.0, 12.0]))

    def join(self) -> None:
        """A new member, of at most six."""
        if self.pair.groups and len(self.pair.sessions) < 6:
            self.pair.join(self.rng.choice(sorted(self.pair.groups)))

    def part(self) -> None:
        """A member leaves or dies."""
        if self.pair.sessions:
            self.pair.leave(self.rng.choice(self.pair.sessions), lost=self.rng.random() < 0.6)

    def create(self) -> None:
        """A group, of at most three."""
        name = self.rng.choice(["g1", "g2", "g3"])
        ordering = self.rng.choice(["none", self.pair.topic.spec.ordering])
        start = self.rng.choice(["latest", "earliest"])
        lease = self.rng.choice([2.0, 10.0])
        if name not in self.pair.groups:
            self.pair.create_group(name, GroupSpec(ordering=ordering, start=start, lease=lease, max_lease=15.0))

    def seek(self) -> None:
        """A group goes anywhere."""
        if self.pair.groups:
            name = self.rng.choice(sorted(self.pair.groups))
            self.pair.seek(name, self.rng.randint(0, len(self.pair.entries)))

    def delete(self) -> None:
        """A group goes."""
        if self.pair.groups:
            self.pair.delete_group(self.rng.choice(sorted(self.pair.groups)))

    def drain(self) -> None:
        """With one live member per group and nothing new, everything is settled in the end."""
        for session in list(self.pair.sessions):
            self.pair.leave(session, lost=True)
        for name in sorted(self.pair.groups):
            session = self.pair.join(name)
            for _ in range(10 * len(self.pair.entries) + 100):
                tags = self.pair.grant(session, 100)
                if tags:
                    self.pair.settle(session, "ack", tags)
                elif self.pair.topic.groups[name].lag:
                    self.pair.advance(1.0)
                else:
                    break
            assert self.pair.topic.groups[name].lag == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_random_commands_keep_every_invariant_and_drain(seed: int) -> None:
    """Whatever happens, the broker answers as the model says, and in the end all is settled or counted."""
    print(f"seed {seed}")
    run = Run(seed)
    for _ in range(STEPS):
        run.step()
    run.drain()

    assert len(run.pair.entries) > 20
    assert run.pair.lent > 50
    assert run.pair.again > 5
