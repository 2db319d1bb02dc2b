"""A topic: duplicates, what is refused, what is forgotten, and where groups start."""

from __future__ import annotations

import pytest

from tests.unit.broker.model import tags_of
from unistream.broker.core import Broker
from unistream.broker.dedupe import Window
from unistream.broker.errors import InvalidRequest, PositionOutOfRange
from unistream.broker.log import Log
from unistream.broker.spec import AtOffset, AtTime, GroupSpec, Limits, TopicSpec
from unistream.broker.topic import Published


def publish(broker: Broker, ids: str, now: float = 0.0, size: int = 1) -> int | Published:
    """Publish one message per letter, at `now` on both clocks."""
    return broker.publish("t", [(id_, b"v" * size, None, ()) for id_ in ids], list(ids), now, int(now * 1000))


def refused(result: int | Published) -> dict[int, str]:
    """Which messages of a batch were refused, and why."""
    return {} if isinstance(result, int) else dict(result.refused)


def test_an_id_is_stored_once_within_the_window() -> None:
    """A duplicate gets the first one's offset, in the same batch and in a later one."""
    broker = Broker(Limits(dedupe_seconds=100.0))
    broker.create_topic("t", TopicSpec())

    assert publish(broker, "aba") == Published([0, 1, 0], frozenset({2}), {})
    assert publish(broker, "cb", 99.0) == Published([2, 1], frozenset({1}), {})
    assert publish(broker, "b", 101.1) == Published([3], frozenset(), {})


def test_a_window_that_turns_early_remembers_as_many_ids_as_promised() -> None:
    """The bound on ids forgets the oldest, never the newest."""
    window = Window(100.0, 10)
    for i in range(50):
        window.turn(0.0, i)
        assert window.claim([f"m{i}"], i)
    window.turn(0.0, 50)

    assert [i for i in range(40, 50) if window.offset(f"m{i}") != i] == []
    assert len(window._younger) + len(window._elder) <= 20


def test_a_batch_with_a_duplicate_inside_claims_nothing() -> None:
    """The window is as before, so that the batch can be taken one by one."""
    window = Window(100.0, 10)
    window.turn(0.0, 0)

    assert not window.claim(["a", "b", "a"], 0)
    assert window.claim(["a", "b"], 0)
    assert not window.claim(["c", "a"], 2)
    assert (window.offset("a"), window.offset("c")) == (0, None)


def test_a_message_above_the_limit_is_refused_alone() -> None:
    """The others of its batch are stored; key and headers count."""
    broker = Broker(Limits(message_bytes=10))
    broker.create_topic("t", TopicSpec())
    entries = [("a", b"v" * 10, None, ()), ("b", b"v" * 10, b"k", ()), ("c", b"", b"", (("name", b"value!"),))]

    assert broker.publish("t", entries, ["a", "b", "c"], 0.0, 0) == Published([0, -1, 1], frozenset(), {1: "too_large"})


def test_a_full_backlog_refuses_what_goes_beyond_it_and_takes_more_after_a_settle() -> None:
    """The slowest group counts; without groups there is no backlog."""
    broker = Broker()
    broker.create_topic("t", TopicSpec(max_backlog=3))
    assert not refused(publish(broker, "abcdefg"))
    broker.create_group("t", "fast", GroupSpec(), 0.0, 0)
    broker.create_group("t", "slow", GroupSpec(), 0.0, 0)
    fast, slow = broker.join("t", "fast"), broker.join("t", "slow")

    assert refused(publish(broker, "1234")) == {3: "full"}
    broker.ack(fast, tags_of(broker.grant(fast, 10, 0.0, 0)), 0.0)
    assert refused(publish(broker, "5")) == {0: "full"}
    broker.ack(slow, tags_of(broker.grant(slow, 1, 0.0, 0)), 0.0)
    assert not refused(publish(broker, "6"))


def test_an_overflow_that_drops_takes_the_oldest_of_the_slow_group_and_counts_them() -> None:
    """What is lent is not taken away; other groups lose nothing."""
    broker = Broker()
    topic = broker.create_topic("t", TopicSpec(max_backlog=3, overflow="drop_oldest"))
    slow = broker.create_group("t", "slow", GroupSpec(), 0.0, 0)
    fast = broker.create_group("t", "fast", GroupSpec(), 0.0, 0)
    session, other = broker.join("t", "slow"), broker.join("t", "fast")
    publish(broker, "abc")
    broker.ack(other, tags_of(broker.grant(other, 10, 0.0, 0)), 0.0)
    broker.grant(session, 1, 0.0, 0)
    publish(broker, "de")

    assert (slow.removed, slow.lag, fast.removed) == (2, 3, 0)
    assert list(broker.grant(session, 10, 0.0, 0).offsets) == [3, 4]
    assert topic.backlog == 3


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        (TopicSpec(max_messages=3), [7, 8, 9]),
        (TopicSpec(max_bytes=35), [7, 8, 9]),
        (TopicSpec(max_age=2.5), [7, 8, 9]),
        (TopicSpec(max_messages=9, max_bytes=45, max_age=2.0), [8, 9]),
    ],
)
def test_a_declared_retention_removes_what_a_group_has_not_read_and_counts_it(spec: TopicSpec, kept: list[int]) -> None:
    """Each bound removes the oldest, exactly."""
    broker = Broker()
    broker.create_topic("t", spec)
    group = broker.create_group("t", "g", GroupSpec(), 0.0, 0)
    session = broker.join("t", "g")
    for second, id_ in enumerate("abcdefghij"):
        publish(broker, id_, float(second), 10)

    assert list(broker.grant(session, 100, 9.0, 9000).offsets) == kept
    assert group.removed == group.unreported == 10 - len(kept)


def test_age_removes_also_while_nothing_is_published() -> None:
    """Asking for the lag is enough to see it."""
    broker = Broker()
    broker.create_topic("t", TopicSpec(max_age=5.0))
    broker.create_group("t", "g", GroupSpec(), 0.0, 0)
    publish(broker, "ab")

    assert broker.lag("t", "g", 4.9, 4999) == 2
    assert broker.lag("t", "g", 5.0, 5000) == 0


def test_without_retention_settled_messages_go_beyond_the_history_and_unsettled_ones_never() -> None:
    """What the slowest group has not settled stays, however long the topic grows."""
    broker = Broker(Limits(history_messages=100))
    topic = broker.create_topic("t", TopicSpec())
    broker.create_group("t", "g", GroupSpec(), 0.0, 0)
    session = broker.join("t", "g")
    held = None
    for i in range(1000):
        broker.publish("t", [(f"m{i}", b"", None, ())], [f"m{i}"], 0.0, 0)
        lent = broker.grant(session, 1, 0.0, 0)
        if i == 500:
            held = lent
        else:
            broker.ack(session, tags_of(lent), 0.0)
    assert (topic.log.start, topic.log.end) == (500, 1000)
    broker.ack(session, tags_of(held), 0.0)
    publish(broker, "abcdef")

    assert topic.log.start == 906
    assert broker.create_group("t", "late", GroupSpec(start="earliest"), 0.0, 0).lag == 100


def test_without_groups_the_history_is_bounded_and_there_for_a_late_group() -> None:
    """A topic nobody consumes does not grow for ever, in messages and in bytes."""
    broker = Broker(Limits(history_messages=100, history_bytes=1000))
    topic = broker.create_topic("t", TopicSpec())
    for i in range(1000):
        broker.publish("t", [(f"m{i}", b"v" * 20, None, ())], [f"m{i}"], 0.0, 0)

    assert 50 <= len(topic.log) <= 54


def test_groups_start_where_they_ask() -> None:
    """Latest, earliest, a time, a position; what was asked for and is gone is counted."""
    broker = Broker()
    broker.create_topic("t", TopicSpec(max_messages=6))
    for second, id_ in enumerate("abcdefgh"):
        publish(broker, id_, float(second))
    starts = {
        "latest": ("latest", 8, 0),
        "earliest": ("earliest", 2, 0),
        "time": (AtTime(4_999_001), 5, 0),
        "exact": (AtTime(5_000_000), 5, 0),
        "later": (AtTime(5_000_001), 6, 0),
        "position": (AtOffset(3), 3, 0),
        "gone": (AtOffset(0), 2, 2),
        "end": (AtOffset(8), 8, 0),
    }
    found = {}
    for name, (start, _, _) in starts.items():
        group = broker.create_group("t", name, GroupSpec(start=start), 7.0, 7000)
        found[name] = (start, group.cursor, group.removed)

    assert found == starts
    with pytest.raises(PositionOutOfRange, match="ends at 8"):
        broker.create_group("t", "beyond", GroupSpec(start=AtOffset(9)), 7.0, 7000)


def test_a_clock_set_back_does_not_spoil_the_search_by_time() -> None:
    """Times of messages never fall."""
    log = Log()
    for wall_ms in (10, 20, 15, 30):
        log.append([("a", b"", None, ())], [0], wall_ms)

    assert [log.at_time(ms) for ms in (5, 20, 21, 31)] == [0, 1, 3, 4]


def test_a_log_gives_back_memory_and_keeps_its_offsets() -> None:
    """Entries are found by offset before and after the slots in front were closed."""
    log = Log()
    for i in range(10_000):
        log.append([(str(i), b"xx", None, ())], [2], i)
        if i >= 100:
            log.remove_to(i - 99)

    assert len(log._entries) < 1500
    assert (len(log), log.bytes, log[9_950][0], log.at_time(9_960)) == (100, 200, "9950", 9_960)
    assert [entry[0] for entry in log.slice(9_998, 5)[0]] == ["9998", "9999"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopicSpec(partitions=0),
        lambda: TopicSpec(max_age=-1.0),
        lambda: TopicSpec(ordering="time"),
        lambda: TopicSpec(overflow="spill"),
        lambda: GroupSpec(lease=0.0),
        lambda: GroupSpec(lease=60.0, max_lease=30.0),
        lambda: GroupSpec(start="now"),
        lambda: GroupSpec(ordering="partition"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object) -> None:
    """Before anything is created."""
    with pytest.raises(InvalidRequest):
        make()
