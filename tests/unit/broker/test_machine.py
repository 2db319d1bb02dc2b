"""The broker against its model with commands that Hypothesis chooses and shrinks."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.unit.broker.model import Pair
from unistream.broker.spec import GroupSpec, Limits, TopicSpec

TOPICS = st.one_of(
    st.just(TopicSpec()),
    st.just(TopicSpec(ordering="key")),
    st.builds(TopicSpec, ordering=st.just("key"), max_messages=st.integers(1, 20)),
    st.builds(TopicSpec, max_backlog=st.integers(1, 10), overflow=st.sampled_from(["reject", "drop_oldest"])),
    st.builds(TopicSpec, max_age=st.sampled_from([1.0, 10.0])),
)


class Commands(RuleBasedStateMachine):
    """One topic, up to two groups, any members; every rule compares broker and model."""

    @initialize(topic=TOPICS)
    def begin(self, topic: TopicSpec) -> None:
        """A new broker, with one group."""
        self.pair = Pair(topic, Limits(history_messages=16, dedupe_seconds=1e9, message_bytes=100))
        self.serial = 0
        self.loans: list[tuple[Any, list[tuple[int, int]]]] = []
        self.pair.create_group("g0", GroupSpec(ordering=topic.ordering, lease=5.0, max_lease=12.0))
        self.pair.join("g0")

    @rule(keys=st.lists(st.sampled_from([None, b"", b"a", b"b"]), min_size=1, max_size=5), again=st.booleans())
    def publish(self, keys: list[bytes | None], again: bool) -> None:
        """New messages; perhaps the last one once more."""
        entries = []
        for key in keys:
            self.serial += not (again and self.serial)
            entries.append((f"m{self.serial}", b"v", key, ()))
        self.pair.publish(entries)

    @precondition(lambda self: self.pair.sessions)
    @rule(data=st.data(), limit=st.integers(1, 4))
    def grant(self, data: st.DataObject, limit: int) -> None:
        """Somebody asks."""
        session = data.draw(st.sampled_from(self.pair.sessions))
        tags = self.pair.grant(session, limit)
        if tags:
            self.loans.append((session, tags))

    @precondition(lambda self: self.loans)
    @rule(
        data=st.data(),
        verb=st.sampled_from(["ack", "nack", "release", "extend"]),
        seconds=st.sampled_from([0.5, 3.0, 20.0]),
    )
    def settle(self, data: st.DataObject, verb: str, seconds: float) -> None:
        """Somebody settles loans of any age, some more than once."""
        session, tags = data.draw(st.sampled_from(self.loans))
        if session in self.pair.sessions:
            some = data.draw(st.lists(st.sampled_from(tags), min_size=1, unique=True))
            self.pair.settle(session, verb, some, seconds)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.pair.advance(seconds)

    @precondition(lambda self: self.pair.groups)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        """A new member."""
        self.pair.join(data.draw(st.sampled_from(sorted(self.pair.groups))))

    @precondition(lambda self: self.pair.sessions)
    @rule(data=st.data(), lost=st.booleans())
    def part(self, data: st.DataObject, lost: bool) -> None:
        """A member leaves or dies."""
        self.pair.leave(data.draw(st.sampled_from(self.pair.sessions)), lost=lost)

    @rule(start=st.sampled_from(["latest", "earliest"]))
    def second_group(self, start: Any) -> None:
        """Another group, whose progress is its own."""
        if "g1" not in self.pair.groups:
            self.pair.create_group("g1", GroupSpec(start=start, lease=5.0, max_lease=12.0))

    @rule(data=st.data())
    def seek(self, data: st.DataObject) -> None:
        """The first group goes anywhere."""
        self.pair.seek("g0", data.draw(st.integers(0, len(self.pair.entries))))


TestCommands = Commands.TestCase
TestCommands.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
