"""What backends say of nacks that a fault is around is excused, and nothing else: left twice, or come early."""

from __future__ import annotations

from tests.suite.story import Story
from unistream.conformance.checkers import Terms, judge

TWICE = Terms(grace=0.0, lease_scope="connection", nacks_twice=True)


def nacked(*, fault: bool) -> Story:
    """Tell of a message nacked by `a`, with or without a fault around that, and of a bystander `b` to have it next."""
    story = Story().publish("p.1").join("a").join("b").at(1).deliver("l1", "p.1", "a").nack("l1", delay=0.0)
    if fault:
        story = story.event("fault", member="a", note="connection reset")
    return story.at(1.2).deliver("l2", "p.1", "b", attempt=2).ack("l2")


def told(story: Story, terms: Terms = TWICE) -> set[str]:
    """Return which checkers flag the story."""
    return {violation.checker for violation in judge(story.history(), terms)}


def again(story: Story, name: str, at: float) -> Story:
    """Tell that the message comes to `b` once more, and is acked."""
    return story.at(at).deliver(name, "p.1", "b", attempt=2).ack(name)


def test_the_other_one_of_two_is_excused() -> None:
    """After a nack with a fault around it the message may come and be acked twice."""
    assert told(again(nacked(fault=True), "l3", 2).at(3).drain()) == set()


def test_a_third_one_is_not() -> None:
    """One such nack leaves two at most."""
    story = again(again(nacked(fault=True), "l3", 2), "l4", 3).at(4).drain()
    assert told(story) == {"unjustified-redelivery", "redelivered-after-settle"}


def test_nothing_is_excused_without_a_fault() -> None:
    """A nack in peace leaves one."""
    story = again(nacked(fault=False), "l3", 2).at(3).drain()
    assert told(story) == {"unjustified-redelivery", "redelivered-after-settle"}


def test_nothing_is_excused_without_the_claim() -> None:
    """A backend that does not say so is held to one."""
    story = again(nacked(fault=True), "l3", 2).at(3).drain()
    assert told(story, Terms(grace=0.0, lease_scope="connection")) == {
        "unjustified-redelivery",
        "redelivered-after-settle",
    }


def test_both_may_be_lent_at_once_but_no_third() -> None:
    """Each of the two is lent by itself."""
    story = nacked(fault=True).join("c").at(2).deliver("l3", "p.1", "b", attempt=2).deliver("l4", "p.1", "c", attempt=2)
    assert "not-exclusive" not in told(story)
    story = story.join("d").deliver("l5", "p.1", "d", attempt=2)
    assert "not-exclusive" in told(story)


KEEPS = Terms(grace=0.0, nack_kept_for=2.0)


def delayed(dies_at: float) -> Story:
    """Tell of a nack for 5 s whose member dies, and of the message that comes 0.1 s later."""
    story = Story().publish("p.1").join("a").join("b").at(1).deliver("l1", "p.1", "a").nack("l1", delay=5.0)
    story = story.at(dies_at).event("death", member="a").at(dies_at + 0.1)
    return story.deliver("l2", "p.1", "b", attempt=2).ack("l2").at(9).drain()


def test_what_its_member_kept_may_come_early_when_it_dies() -> None:
    """Within the time for which members say they keep it."""
    assert told(delayed(2.5), KEEPS) == set()


def test_no_delay_ends_with_its_member_later_or_unsaid() -> None:
    """After that time, and where nothing was said, the delay is the broker's."""
    assert told(delayed(3.5), KEEPS) == {"delay-early"}
    assert told(delayed(2.5), Terms(grace=0.0)) == {"delay-early"}
