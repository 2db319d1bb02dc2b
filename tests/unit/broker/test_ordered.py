"""A group in key order: one unsettled message per key, through everything."""

from __future__ import annotations

import pytest

from tests.unit.broker.model import tags_of
from unistream.broker.core import Broker
from unistream.broker.errors import InvalidRequest
from unistream.broker.lease import Lent, Session
from unistream.broker.spec import GroupSpec, Limits, TopicSpec


class Bench:
    """A broker with one ordered topic, one ordered group, and two members."""

    def __init__(self, limits: Limits | None = None, **topic: int) -> None:
        self.broker = Broker(limits)
        self.broker.create_topic("t", TopicSpec(ordering="key", **topic))
        self.group = self.broker.create_group("t", "g", GroupSpec(ordering="key", lease=10.0), 0.0, 0)
        self.one, self.two = self.broker.join("t", "g"), self.broker.join("t", "g")
        self.count = 0

    def publish(self, *keys: bytes | None) -> None:
        """Publish one message per key."""
        entries = [(f"m{self.count + i}", b"v", key, ()) for i, key in enumerate(keys)]
        self.count += len(keys)
        self.broker.publish("t", entries, [entry[0] for entry in entries], 0.0, 0)

    def grant(self, session: Session, now: float, limit: int = 10) -> list[int]:
        """The offsets lent."""
        self.lent: Lent | None = self.broker.grant(session, limit, now, 0)
        return list(self.lent.offsets) if self.lent else []


def test_one_message_per_key_is_out_and_other_keys_flow() -> None:
    """The second message of a key waits for the first; `b""` is a key, None is none."""
    bench = Bench()
    bench.publish(b"a", b"a", b"b", None, None, b"", b"")

    assert bench.grant(bench.one, 0.0) == [0, 2, 3, 4, 5]
    assert bench.grant(bench.two, 0.0) == []
    assert bench.lent is None


def test_a_settled_message_gives_its_key_the_next() -> None:
    """Messages of a key follow each other in publish order, whoever gets them."""
    bench = Bench()
    bench.publish(b"a", b"a", b"a")
    for offset, session in enumerate((bench.one, bench.two, bench.one)):
        assert bench.grant(session, 0.0) == [offset]
        assert bench.broker.ack(session, tags_of(bench.lent), 0.0) == []
    assert bench.group._lanes == {}


@pytest.mark.parametrize("fate", ["nack", "expire", "lose", "release", "leave"])
def test_a_key_stays_busy_until_its_message_is_settled(fate: str) -> None:
    """Nothing overtakes a message that comes again, however its loan ended."""
    bench = Bench()
    bench.publish(b"a", b"a", b"b")
    assert bench.grant(bench.one, 0.0, 1) == [0]
    tags = tags_of(bench.lent)
    now = 1.0
    match fate:
        case "nack":
            bench.broker.nack(bench.one, tags, 5.0, 1.0)
        case "expire":
            now = 10.0
        case "lose":
            bench.broker.lose(bench.one, 1.0)
        case "release":
            bench.broker.release(bench.one, tags, 1.0)
        case "leave":
            bench.broker.leave(bench.one, 1.0)

    if fate == "nack":
        assert bench.grant(bench.two, now) == [2]
        now = 6.0
        assert bench.grant(bench.two, now) == [0]
    else:
        assert 1 not in bench.grant(bench.two, now)
        bench.grant(bench.two, now)
    assert bench.broker.ack(bench.two, [bench.group.leased[0].token], now) == []
    assert bench.grant(bench.two, now) == [1]


def test_a_hot_key_stops_the_cursor_only_at_the_parking_limit() -> None:
    """Beyond the limit nothing more is looked at, until a parked message gets its turn."""
    bench = Bench(Limits(parked_messages=3))
    bench.publish(*[b"hot"] * 6, b"cold")
    assert bench.grant(bench.one, 0.0) == [0]
    assert bench.group.parked == 3
    assert not bench.group.available(0.0)
    served = [0]
    while len(served) < 7:
        bench.broker.ack(bench.one, tags_of(bench.lent), 0.0)
        served += bench.grant(bench.one, 0.0)

    assert sorted(served) == list(range(7))
    assert [offset for offset in served if offset != 6] == list(range(6))


def test_a_removed_message_ends_its_turn() -> None:
    """Retention takes waiting messages out of their lanes, lent ones keep them until they are given back."""
    bench = Bench(max_messages=3)
    bench.publish(b"a", b"a", b"a")
    assert bench.grant(bench.one, 0.0) == [0]
    tags = tags_of(bench.lent)
    bench.publish(b"a", b"b")
    assert bench.group.removed == 1
    bench.broker.nack(bench.one, tags, 0.0, 0.0)

    assert bench.group.removed == 2
    assert bench.grant(bench.one, 0.0) == [2, 4]
    assert bench.group.lag == 3


def test_an_unordered_group_on_an_ordered_topic_is_fine_and_the_reverse_is_refused() -> None:
    """Order is asked for by the group and must be declared by the topic."""
    bench = Bench()
    bench.broker.create_group("t", "free", GroupSpec(), 0.0, 0)
    bench.publish(b"a", b"a")
    assert bench.grant(bench.broker.join("t", "free"), 0.0) == [0, 1]

    bench.broker.create_topic("plain", TopicSpec())
    with pytest.raises(InvalidRequest, match="key order"):
        bench.broker.create_group("plain", "g", GroupSpec(ordering="key"), 0.0, 0)
