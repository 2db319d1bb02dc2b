"""A group without order: lending, fencing, attempts, delays, suspects."""

from __future__ import annotations

import pytest

from tests.unit.broker.model import tags_of
from unistream.broker.core import Broker
from unistream.broker.errors import GroupMissing, InvalidRequest, SessionEnded, TopicMissing
from unistream.broker.lease import Lent, Session
from unistream.broker.spec import GroupSpec, TopicSpec


class Bench:
    """A broker with one topic, one group, and one member, at time 0."""

    def __init__(self, spec: GroupSpec | None = None) -> None:
        self.broker = Broker()
        self.topic = self.broker.create_topic("t", TopicSpec())
        self.group = self.broker.create_group("t", "g", spec or GroupSpec(lease=10.0, max_lease=25.0), 0.0, 0)
        self.session = self.broker.join("t", "g")
        self.count = 0

    def publish(self, count: int, now: float = 0.0) -> None:
        """Publish `count` new messages."""
        entries = [(f"m{self.count + i}", b"v", None, ()) for i in range(count)]
        self.count += count
        self.broker.publish("t", entries, [entry[0] for entry in entries], now, int(now * 1000))

    def grant(self, limit: int, now: float, session: Session | None = None) -> Lent:
        """What is lent; something must be."""
        lent = self.broker.grant(session or self.session, limit, now, 0)
        assert lent is not None
        return lent

    def nothing(self, now: float) -> bool:
        """Whether nothing can be lent."""
        return self.broker.grant(self.session, 100, now, 0) is None


def test_members_share_what_is_published() -> None:
    """Inside a group a message is lent to one member at a time."""
    bench = Bench()
    other = bench.broker.join("t", "g")
    bench.publish(5)

    assert list(bench.grant(3, 0.0).offsets) == [0, 1, 2]
    assert list(bench.grant(3, 0.0, other).offsets) == [3, 4]
    assert bench.nothing(0.0)


def test_groups_do_not_touch_each_other() -> None:
    """Every group has its own copy of the topic and its own progress."""
    bench = Bench()
    bench.broker.create_group("t", "h", GroupSpec(), 0.0, 0)
    other = bench.broker.join("t", "h")
    bench.publish(2)
    bench.broker.ack(bench.session, tags_of(bench.grant(2, 0.0)), 0.0)

    assert list(bench.grant(2, 0.0, other).offsets) == [0, 1]
    assert bench.broker.lag("t", "h", 0.0, 0) == 2
    assert bench.broker.lag("t", "g", 0.0, 0) == 0


def test_ack_after_the_lease_ended_is_refused_and_changes_nothing() -> None:
    """A lease that ended settles nothing, also before anybody else has the message."""
    bench = Bench()
    bench.publish(1)
    tags = tags_of(bench.grant(1, 0.0))

    assert bench.broker.ack(bench.session, tags, 10.0) == tags
    assert bench.broker.lag("t", "g", 10.0, 0) == 1


def test_a_stale_settle_never_touches_another_members_loan() -> None:
    """The fence is the number of the grant, not the message."""
    bench = Bench()
    other = bench.broker.join("t", "g")
    bench.publish(1)
    stale = tags_of(bench.grant(1, 0.0))
    held = tags_of(bench.grant(1, 11.0, other))

    for verb in (bench.broker.ack, bench.broker.release):
        assert verb(bench.session, stale, 12.0) == stale
    assert bench.broker.nack(bench.session, stale, 0.0, 12.0) == stale
    assert bench.broker.extend(bench.session, stale, 5.0, 12.0) == stale
    assert bench.broker.ack(other, held, 12.0) == []


def test_nack_comes_again_after_its_delay_with_the_next_attempt() -> None:
    """A nacked message is lent again, not before its delay; others go first meanwhile."""
    bench = Bench()
    bench.publish(2)
    first = bench.grant(1, 0.0)
    bench.broker.nack(bench.session, tags_of(first), 5.0, 1.0)

    assert list(bench.grant(5, 5.9).offsets) == [1]
    assert bench.nothing(5.9)
    again = bench.grant(5, 6.0)
    assert list(again.offsets) == [0]
    assert list(again.attempts) == [2]
    assert not again.suspect


def test_release_does_not_spend_the_attempt() -> None:
    """What is given back untouched is lent as if for the first time."""
    bench = Bench()
    bench.publish(1)
    bench.broker.release(bench.session, tags_of(bench.grant(1, 0.0)), 1.0)

    assert list(bench.grant(1, 1.0).attempts) == [1]


def test_a_suspect_is_lent_alone() -> None:
    """A message whose lease was lost is lent by itself, before anything unseen."""
    bench = Bench()
    bench.publish(3)
    bench.grant(2, 0.0)

    lent = [bench.grant(10, 10.0) for _ in range(3)]
    assert [(list(one.offsets), list(one.attempts), one.suspect) for one in lent] == [
        ([0], [2], True),
        ([1], [2], True),
        ([2], [1], False),
    ]


def test_a_suspect_that_is_released_stays_a_suspect_and_one_that_is_nacked_does_not() -> None:
    """Only a word from the member clears the suspicion."""
    bench = Bench()
    bench.publish(1)
    bench.grant(1, 0.0)
    bench.broker.release(bench.session, tags_of(bench.grant(1, 10.0)), 10.0)
    released = bench.grant(1, 10.0)
    bench.broker.nack(bench.session, tags_of(released), 0.0, 10.0)

    assert released.suspect
    assert not bench.grant(1, 10.0).suspect


def test_a_lost_member_hands_over_at_once_and_one_that_leaves_spends_no_attempt() -> None:
    """Leaving gives back untouched; dying costs an attempt and makes a suspect."""
    bench = Bench()
    dying, leaving = bench.broker.join("t", "g"), bench.broker.join("t", "g")
    bench.publish(2)
    bench.grant(1, 0.0, dying)
    bench.grant(1, 0.0, leaving)
    bench.broker.lose(dying, 1.0)
    bench.broker.leave(leaving, 2.0)

    one, other = bench.grant(10, 2.0), bench.grant(10, 2.0)
    assert (list(one.offsets), list(one.attempts), one.suspect) == ([0], [2], True)
    assert (list(other.offsets), list(other.attempts), other.suspect) == ([1], [1], False)
    with pytest.raises(SessionEnded):
        bench.broker.grant(dying, 1, 2.0, 0)


def test_extend_moves_part_of_a_batch_and_stops_at_max_lease() -> None:
    """Each message of a batch can be extended by itself, never beyond `max_lease` since it was lent."""
    bench = Bench()
    bench.publish(3)
    tags = tags_of(bench.grant(3, 0.0))
    bench.broker.extend(bench.session, tags[:1], 10.0, 5.0)

    assert list(bench.grant(1, 12.0).offsets) == [1]
    assert bench.broker.extend(bench.session, tags, 100.0, 12.0) == tags[1:]
    assert bench.broker.extend(bench.session, tags[:1], 100.0, 24.0) == []
    assert bench.broker.ack(bench.session, tags[:1], 25.0) == tags[:1]


def test_extend_can_shorten_a_lease() -> None:
    """The lease then ends at the earlier time."""
    bench = Bench()
    bench.publish(2)
    tags = tags_of(bench.grant(2, 0.0))
    bench.broker.extend(bench.session, tags, 1.0, 1.0)

    assert bench.group.next_due() == 2.0
    assert bench.grant(1, 2.0).suspect


def test_seek_ends_loans_and_replays_with_attempts_that_do_not_fall() -> None:
    """After a seek everything from there is lent again, whatever was settled."""
    bench = Bench()
    bench.publish(3)
    lent = bench.grant(3, 0.0)
    bench.broker.ack(bench.session, tags_of(lent)[:1], 0.0)
    ended = bench.broker.seek("t", "g", "earliest", 1.0, 0)

    assert ended == {bench.session: tags_of(lent)[1:]}
    assert bench.broker.ack(bench.session, tags_of(lent), 1.0) == tags_of(lent)
    again = bench.grant(3, 1.0)
    assert list(again.offsets) == [0, 1, 2]
    assert list(again.attempts) == [1, 2, 2]


def test_members_of_what_was_deleted_are_told_what() -> None:
    """A session of a deleted group or topic gets the reason with its next grant."""
    bench = Bench()
    bench.broker.delete_group("t", "g")
    bench.broker.delete_group("t", "g")
    bench.broker.create_group("t", "h", GroupSpec(), 0.0, 0)
    other = bench.broker.join("t", "h")
    bench.broker.delete_topic("t")
    bench.broker.delete_topic("t")

    with pytest.raises(GroupMissing, match="'g'"):
        bench.broker.grant(bench.session, 1, 0.0, 0)
    with pytest.raises(TopicMissing, match="'t'"):
        bench.broker.grant(other, 1, 0.0, 0)
    with pytest.raises(TopicMissing):
        bench.broker.publish("t", [("x", b"", None, ())], ["x"], 0.0, 0)


def test_an_ephemeral_group_lives_as_long_as_its_one_member() -> None:
    """It leaves nothing behind, and nobody else can join it."""
    bench = Bench()
    bench.broker.create_group("t", "e", GroupSpec(ephemeral=True), 0.0, 0)
    session = bench.broker.join("t", "e")
    with pytest.raises(InvalidRequest):
        bench.broker.join("t", "e")
    bench.broker.leave(session, 0.0)
    bench.broker.leave(session, 0.0)

    assert "e" not in bench.topic.groups


def test_a_created_group_stands_and_is_not_changed_by_a_second_creation() -> None:
    """Of several creators one pins; the others see what stands."""
    bench = Bench()
    bench.publish(3)
    stands = bench.broker.create_group("t", "g", GroupSpec(start="latest", lease=99.0), 0.0, 0)

    assert stands is bench.group
    assert stands.spec.lease == 10.0
    assert stands.lag == 3


def test_timers_of_settled_batches_are_not_kept() -> None:
    """A hundred thousand settled loans leave no trace until their leases would have ended."""
    bench = Bench()
    for _ in range(100_000):
        bench.publish(1)
        bench.broker.ack(bench.session, tags_of(bench.grant(1, 0.0)), 0.0)

    assert len(bench.group._ends) < 2_000
    assert not bench.session.leases
