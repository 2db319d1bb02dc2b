"""Every checker passes a good history and flags a bad one, naming the rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.suite.story import Story
from unistream.conformance.checkers import CHECKERS, Terms, judge

STRICT = Terms(grace=0.0)


def told(story: Story, terms: Terms = STRICT) -> set[tuple[str, str]]:
    """Return which checkers flag the story, with the rules that they name."""
    return {(violation.checker, violation.rule) for violation in judge(story.history(), terms)}


def good() -> Story:
    """Tell the shortest story in which everything is right: published, delivered, acked, drained."""
    story = Story().publish("p.1").join("a").at(1).deliver("l1", "p.1", "a").ack("l1")
    return story.at(2).leave("a").drain()


GOOD: dict[str, Callable[[], Story]] = {
    "plain": good,
    "nack comes back after its delay": lambda: (
        good_start().nack("l1", delay=2.0).at(3.1).deliver("l2", "p.1", "a", attempt=2).ack("l2").drain()
    ),
    "an expired lease frees the message and the member's room": lambda: (
        Story(lease=5)
        .publish("p.1")
        .publish("p.2")
        .join("a", limit=1)
        .at(1)
        .deliver("l1", "p.1", "a")
        .at(6.1)
        .deliver("l2", "p.2", "a")
        .ack("l2")
        .at(6.2)
        .deliver("l3", "p.1", "a", attempt=2)
        .ack("l3")
        .drain()
    ),
    "an ack of unknown outcome may come back": lambda: (
        good_start().ack("l1", outcome="info").at(11.5).deliver("l2", "p.1", "a", attempt=2).ack("l2").drain()
    ),
    "an ack of unknown outcome releases the key": lambda: (
        Story(ordering="key")
        .publish("p.1", key="k")
        .publish("p.2", key="k")
        .join("a")
        .at(1)
        .deliver("l1", "p.1", "a", key="k")
        .ack("l1", outcome="info")
        .at(2)
        .deliver("l2", "p.2", "a", key="k")
        .ack("l2")
        .at(12)
        .drain()
    ),
    "what the dead member held goes to another": lambda: (
        good_start()
        .join("b")
        .at(2)
        .event("death", member="a")
        .at(11.1)
        .deliver("l2", "p.1", "b", attempt=2)
        .ack("l2")
        .drain()
    ),
    "order starts anew after an unknown outcome": lambda: (
        Story(ordering="key")
        .publish("p.1", key="k", outcome="info")
        .publish("p.2", key="k")
        .join("a")
        .at(1)
        .deliver("l2", "p.2", "a", key="k")
        .ack("l2")
        .deliver("l1", "p.1", "a", key="k")
        .ack("l1")
        .drain()
    ),
    "the last nack dead-letters": lambda: (
        Story(max_attempts=1).publish("p.1").join("a").at(1).deliver("l1", "p.1", "a").nack("l1", delay=0.0).drain()
    ),
    "the rejected is found in the dead-letter topic": lambda: (
        with_dead_letters()
        .settle("reject", "l1")
        .at(2)
        .deliver("l2", "p.1", "d", topic="dead", origin="t/g")
        .ack("l2")
        .drain()
        .drain(topic="dead")
    ),
    "the failed last attempt frees its key": lambda: (
        Story(ordering="key", max_attempts=1)
        .publish("p.1", key="k")
        .publish("p.2", key="k")
        .join("a")
        .at(1)
        .deliver("l1", "p.1", "a", key="k")
        .nack("l1", delay=0.0)
        .at(2)
        .deliver("l2", "p.2", "a", key="k")
        .ack("l2")
        .drain()
    ),
    "what others publish on purpose is delivered too": lambda: (
        good_start()
        .ack("l1")
        .event("stray", digest="beef")
        .deliver("l9", None, "a", error="foreign", digest="beef")
        .ack("l9")
        .drain()
    ),
    "a plain ack may be refused later, when its lease had ended": lambda: (
        good_start()
        .at(10.95)
        .ack("l1", confirmed=False)
        .at(11.5)
        .deliver("l2", "p.1", "a", attempt=2)
        .ack("l2")
        .event("refuse", lending="l1")
        .drain()
    ),
    "a plain ack lost with its member may come back": lambda: (
        good_start()
        .join("b")
        .ack("l1", confirmed=False)
        .at(1.05)
        .event("death", member="a")
        .at(11.1)
        .deliver("l2", "p.1", "b", attempt=2)
        .ack("l2")
        .drain()
    ),
}


def good_start() -> Story:
    """Tell how one message is published and lent to one member."""
    return Story().publish("p.1").join("a").at(1).deliver("l1", "p.1", "a")


def with_dead_letters() -> Story:
    """Tell how one message is lent by a group that has a dead-letter topic and two attempts."""
    story = Story(dead_letter="dead", max_attempts=2).group(topic="dead").publish("p.1").join("a")
    return story.at(1).deliver("l1", "p.1", "a")


def two_in_order() -> Story:
    """Tell how two messages of one key are published to an ordered group with two members."""
    return Story(ordering="key").publish("p.1", key="k").publish("p.2", key="k").join("a").join("b").at(1)


BAD: dict[str, tuple[str, str, Callable[[], Story]]] = {
    "never delivered": ("lost", "PUB-1", lambda: good().at(3).publish("p.2").drain()),
    "one group of two misses it": (
        "lost",
        "PUB-1",
        lambda: Story().group("h").publish("p.1").at(1).deliver("l1", "p.1", "a").ack("l1").drain().drain(group="h"),
    ),
    "nacked and gone": ("lost-unsettled", "GRP-1", lambda: good_start().nack("l1", delay=0.0).at(2).drain()),
    "held by the dead and gone": (
        "lost-unsettled",
        "GRP-1",
        lambda: good_start().event("death", member="a").at(30).drain(),
    ),
    "invented": ("phantom", "PUB-1", lambda: good().join("b").deliver("l9", "q.7", "b").ack("l9")),
    "a stranger's": ("phantom", "PUB-1", lambda: good().join("b").deliver("l9", None, "b", error="foreign").ack("l9")),
    "altered body": ("corrupt", "GRP-1", lambda: good().join("b").deliver("l9", None, "b", error="corrupt")),
    "altered key": (
        "corrupt",
        "GRP-1",
        lambda: Story().publish("p.1", key="k").join("a").deliver("l1", "p.1", "a", key="K").ack("l1"),
    ),
    "altered headers": (
        "corrupt",
        "GRP-1",
        lambda: Story().publish("p.1", digest="aa").join("a").deliver("l1", "p.1", "a", digest="bb").ack("l1"),
    ),
    "refused and delivered": (
        "aborted-read",
        "PUB-2",
        lambda: Story().publish("p.1", outcome="fail").join("a").at(1).deliver("l1", "p.1", "a").ack("l1"),
    ),
    "stored twice": (
        "duplicate-write",
        "PUB-3",
        lambda: good_start().nack("l1", delay=0.0).at(2).deliver("l2", "p.1", "a", attempt=2, position="9").ack("l2"),
    ),
    "receipt and delivery differ": (
        "inconsistent-position",
        "PUB-1",
        lambda: Story().publish("p.1", position="7").join("a").at(1).deliver("l1", "p.1", "a", position="8").ack("l1"),
    ),
    "two messages in one place": (
        "inconsistent-position",
        "PUB-1",
        lambda: good_start().publish("p.2", position="1").at(2).deliver("l2", "p.2", "a", position="1").ack("l2"),
    ),
    "stored in the wrong order": (
        "nonmonotonic-publish",
        "PUB-4",
        lambda: Story().publish("p.1", key="k", position="12-1").publish("p.2", key="k", position="9-5"),
    ),
    "lent again without a cause": (
        "unjustified-redelivery",
        "DEL-9",
        lambda: good_start().join("b").at(2).deliver("l2", "p.1", "b", attempt=2).ack("l2"),
    ),
    "lent again after a plain ack": (
        "unjustified-redelivery",
        "DEL-9",
        lambda: good_start().ack("l1", confirmed=False).at(12).deliver("l2", "p.1", "a", attempt=2).ack("l2"),
    ),
    "lent again after a confirmed ack": (
        "redelivered-after-settle",
        "DEL-1",
        lambda: good_start().ack("l1").at(12).deliver("l2", "p.1", "a", attempt=2).ack("l2"),
    ),
    "lent again after a reject": (
        "redelivered-after-settle",
        "DEL-3",
        lambda: good_start().settle("reject", "l1").at(2).deliver("l2", "p.1", "a", attempt=2).ack("l2"),
    ),
    "two holders": (
        "not-exclusive",
        "GRP-2",
        lambda: good_start().join("b").at(2).deliver("l2", "p.1", "b", attempt=2).ack("l2"),
    ),
    "the former holder acks": (
        "stale-settle-accepted",
        "DEL-7",
        lambda: good_start().join("b").at(11.5).deliver("l2", "p.1", "b", attempt=2).ack("l1").ack("l2"),
    ),
    "the former holder extends": (
        "stale-settle-accepted",
        "DEL-7",
        lambda: good_start().join("b").at(11.5).deliver("l2", "p.1", "b", attempt=2).settle("extend", "l1"),
    ),
    "settled by one that slept through its lease": (
        "stale-settle-accepted",
        "DEL-7",
        lambda: (
            Story()
            .publish("p.1")
            .join("a")
            .join("b")
            .at(20)
            .deliver("l2", "p.1", "b", attempt=2)
            .at(25)
            .event("fault", member="a", since=5, note="process stopped")
            .at(26)
            .deliver("l1", "p.1", "a", lease=-10.0)
            .ack("l1")
            .ack("l2")
        ),
    ),
    "taken and refused later with lease left": (
        "settle-refused-in-lease",
        "DEL-7",
        lambda: good_start().at(2).ack("l1", confirmed=False).at(3).event("refuse", lending="l1"),
    ),
    "refused with lease left": (
        "settle-refused-in-lease",
        "DEL-7",
        lambda: good_start().at(2).ack("l1", outcome="fail"),
    ),
    "the younger first": (
        "order-first",
        "ORD-2",
        lambda: (
            two_in_order().deliver("l2", "p.2", "a", key="k").ack("l2").deliver("l1", "p.1", "a", key="k").ack("l1")
        ),
    ),
    "overtaken while held": (
        "overtake",
        "ORD-2",
        lambda: (
            two_in_order().deliver("l1", "p.1", "a", key="k").deliver("l2", "p.2", "b", key="k").ack("l1").ack("l2")
        ),
    ),
    "overtaken while its nack waits": (
        "overtake",
        "ORD-2",
        lambda: (
            two_in_order()
            .deliver("l1", "p.1", "a", key="k")
            .nack("l1", delay=3.0)
            .at(2)
            .deliver("l2", "p.2", "b", key="k")
            .ack("l2")
        ),
    ),
    "overtaken in its last attempt": (
        "overtake",
        "ORD-2",
        lambda: (
            Story(ordering="key", max_attempts=1)
            .publish("p.1", key="k")
            .publish("p.2", key="k")
            .join("a")
            .deliver("l1", "p.1", "a", key="k")
            .at(1)
            .deliver("l2", "p.2", "a", key="k")
        ),
    ),
    "overtaken after a refused ack": (
        "overtake",
        "ORD-2",
        lambda: (
            two_in_order()
            .deliver("l1", "p.1", "a", key="k")
            .at(11.5)
            .ack("l1", outcome="fail")
            .deliver("l2", "p.2", "b", key="k")
            .ack("l2")
        ),
    ),
    "attempt stuck": (
        "count",
        "DEL-4",
        lambda: good_start().nack("l1", delay=0.0).at(2).deliver("l2", "p.1", "a", attempt=1).ack("l2"),
    ),
    "attempt from zero": (
        "count",
        "DEL-4",
        lambda: Story().publish("p.1").join("a").deliver("l1", "p.1", "a", attempt=0),
    ),
    "attempt of another group": (
        "count",
        "DEL-4",
        lambda: (
            good_start().group("h").join("b", group="h").publish("p.2").deliver("l2", "p.2", "b", group="h", attempt=2)
        ),
    ),
    "attempt falls after a crash": (
        "count",
        "DEL-4",
        lambda: (
            good_start()
            .nack("l1", delay=0.0)
            .at(2)
            .deliver("l2", "p.1", "a", attempt=2)
            .event("death", member="a")
            .join("b")
            .at(12.5)
            .deliver("l3", "p.1", "b", attempt=1)
            .ack("l3")
        ),
    ),
    "more than its bound": (
        "inflight",
        "BPC-1",
        lambda: (
            Story().publish("p.1").publish("p.2").join("a", limit=1).deliver("l1", "p.1", "a").deliver("l2", "p.2", "a")
        ),
    ),
    "before its delay": (
        "delay-early",
        "DEL-2",
        lambda: good_start().nack("l1", delay=5.0).at(2).deliver("l2", "p.1", "a", attempt=2).ack("l2"),
    ),
    "long after its delay": (
        "late",
        "DEL-2",
        lambda: (
            good_start()
            .nack("l1", delay=2.0)
            .at(9)
            .event("idle", member="a", since=1)
            .deliver("l2", "p.1", "a", attempt=2)
            .ack("l2")
        ),
    ),
    "late before somebody died": (
        "late",
        "DEL-2",
        lambda: (
            good_start()
            .join("b")
            .nack("l1", delay=2.0)
            .at(9)
            .event("idle", member="a", since=1)
            .event("idle", member="b", since=1)
            .event("death", member="b")
            .at(9.5)
            .deliver("l2", "p.1", "a", attempt=2)
            .ack("l2")
        ),
    ),
    "waiting beside it": (
        "progress",
        "GRP-1",
        lambda: Story().publish("p.1").join("a").at(15).event("idle", member="a", since=0),
    ),
    "the dead member's message waits": (
        "progress",
        "GRP-4",
        lambda: good_start().join("b").event("death", member="a").at(40).event("idle", member="b", since=1),
    ),
    "the leaver's message waits": (
        "progress",
        "GRP-4",
        lambda: good_start().join("b").at(2).leave("a").at(9).event("idle", member="b", since=2),
    ),
    "rejected and gone": (
        "dead-letter-lost",
        "DEL-3",
        lambda: with_dead_letters().settle("reject", "l1").at(2).drain().drain(topic="dead"),
    ),
    "the last attempt nacked and gone": (
        "dead-letter-lost",
        "DEL-4",
        lambda: (
            with_dead_letters()
            .nack("l1", delay=0.0)
            .at(2)
            .deliver("l2", "p.1", "a", attempt=2)
            .nack("l2", delay=0.0)
            .drain()
            .drain(topic="dead")
        ),
    ),
    "the last attempt's member died and it is gone": (
        "dead-letter-lost",
        "DEL-4",
        lambda: (
            with_dead_letters()
            .nack("l1", delay=0.0)
            .at(2)
            .deliver("l2", "p.1", "a", attempt=2)
            .event("death", member="a")
            .at(30)
            .drain()
            .drain(topic="dead")
        ),
    ),
    "dead-lettered for nothing": (
        "dead-letter-unjustified",
        "DEL-4",
        lambda: (
            Story(dead_letter="dead", max_attempts=4)
            .group(topic="dead")
            .publish("p.1")
            .join("a")
            .deliver("l1", "p.1", "a")
            .deliver("l2", "p.1", "d", topic="dead", origin="t/g")
        ),
    ),
    "the drain stands still": ("progress", "END-3", lambda: good_start().drain("fail")),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history_breaks_no_rule(name: str) -> None:
    """What the contract allows is flagged by no checker at all."""
    assert told(GOOD[name]()) == set()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_flagged_by_the_rule_it_breaks(name: str) -> None:
    """The checker that is meant for the fault names its rule."""
    checker, rule, tell = BAD[name]

    assert (checker, rule) in told(tell())


def test_every_checker_has_a_bad_history() -> None:
    """No checker is without a history that it flags, and every one has a sentence and rules."""
    flagged = {checker for checker, _, _ in BAD.values()} | {"sometimes"}

    assert flagged == set(CHECKERS)
    assert all(checker.sentence and checker.rules for checker in CHECKERS.values())


def test_a_run_in_which_nothing_happened_is_vacuous() -> None:
    """A counter that had to rise and did not is reported; one that rose is not."""
    terms = Terms(sometimes=("redelivered", "acked"))

    found = judge(good().history(), terms)

    assert [(each.checker, "redelivered" in each.message) for each in found] == [("sometimes", True)]


def test_fifo_is_asked_only_where_it_was_promised() -> None:
    """Without keys the order of first deliveries binds one undisturbed member and nobody else."""
    story = Story().publish("p.1").publish("p.2").join("a").deliver("l2", "p.2", "a").deliver("l1", "p.1", "a")

    assert told(story) == set()
    assert told(story, Terms(fifo=True)) == {("order-first", "ORD-5")}


def test_declared_retention_excuses_only_what_was_reported() -> None:
    """A loss that was reported is the user's own wish; a silent one breaks END-4."""
    terms = Terms(retention=True)

    assert told(good().at(3).publish("p.2").event("loss", topic="t", group="g", count=1).drain(), terms) == set()
    assert told(good().at(3).publish("p.2").drain(), terms) == {("lost", "END-4")}


def test_a_duplicate_is_excused_where_nothing_removes_it_and_a_fault_came_between() -> None:
    """Without deduplication a retry over a lost reply may store a message twice, an undisturbed publish may not."""
    terms = Terms(dedupe=False)
    story = Story().publish("p.1", took=2.0).join("a").deliver("l1", "p.1", "a").nack("l1", delay=0.0)
    story.at(3).deliver("l2", "p.1", "a", attempt=2, position="9").ack("l2")

    assert ("duplicate-write", "PUB-3") in told(story, terms)
    assert told(story.event("fault", since=1.0, note="connection"), terms) == set()


def test_what_a_stopped_process_hands_out_after_its_lease_is_no_lending() -> None:
    """A member that was stopped hands out, when it goes on, what it had been lent before; who was not has no excuse."""

    def story(stopped: bool) -> Story:
        told = Story().publish("p.1").join("a").join("b").at(5)
        told.deliver("l1", "p.1", "b", attempt=2).ack("l1").at(8)
        if stopped:
            told.event("fault", member="a", since=1.0, note="process stopped")
        return told.deliver("l2", "p.1", "a", attempt=1, lease=-1.0).ack("l2", outcome="fail").drain()

    excused = told(story(stopped=True))
    assert {rule for _, rule in told(story(stopped=False))} - {rule for _, rule in excused} >= {"DEL-1", "DEL-9"}
    assert not {rule for _, rule in excused} & {"DEL-1", "DEL-9", "GRP-2"}


def test_an_ack_that_a_fault_may_have_swallowed_releases_the_order() -> None:
    """An older message that comes back so is no overtaking; without a fault it is."""

    def story(*, harmed: bool) -> Story:
        told = (
            two_in_order()
            .deliver("l1", "p.1", "a", key="k")
            .ack("l1", confirmed=False)
            .at(1.2)
            .deliver("l2", "p.2", "a", key="k")
        )
        told = told.at(1.4)
        if harmed:
            told.event("fault", member="a", since=1.0, note="connection lose-up")
        return told.at(2).deliver("l3", "p.1", "b", key="k", attempt=2).ack("l3").at(3)

    terms = Terms(lease_scope="connection", settle_flush=0.6)

    assert ("overtake", "ORD-2") not in told(story(harmed=True), terms)
    assert ("overtake", "ORD-2") in told(story(harmed=False), terms)


def test_an_ack_beside_a_death_is_forgotten_only_by_word() -> None:
    """Where partitions move after a death an ack that was taken meanwhile counts, unless its refusal was told."""

    def story(*, said: bool) -> Story:
        told = good_start().join("b").join("c").at(2).event("death", member="c").at(3).ack("l1", confirmed=False).at(6)
        if said:
            told.event("refuse", lending="l1")
        return told.deliver("l2", "p.1", "b", attempt=2).ack("l2").drain()

    terms = Terms(rebalances=True, recover_within=10.0, attempts_exact=False)

    assert told(story(said=True), terms) == set()
    assert told(story(said=False), terms) == {("redelivered-after-settle", "DEL-1")}


def test_who_dies_while_another_death_is_unnoticed_may_take_plain_acks_along() -> None:
    """Where partitions are shared out the group stores nothing while it waits for a dead member; elsewhere it does."""

    def story(*, beside: bool, dies: float) -> Story:
        told = good_start().join("b").join("c")
        if beside:
            told.at(2).event("death", member="c")
        told.at(3).ack("l1", confirmed=False).at(dies).event("death", member="a")
        return told.at(dies + 12).deliver("l2", "p.1", "b", attempt=2).ack("l2").drain()

    forgotten = ("redelivered-after-settle", "DEL-1")
    shared_out = Terms(rebalances=True, recover_within=10.0, attempts_exact=False)

    assert forgotten not in told(story(beside=True, dies=10), shared_out)
    assert forgotten in told(story(beside=True, dies=13), shared_out)
    assert forgotten in told(story(beside=False, dies=10), shared_out)
    assert forgotten in told(story(beside=True, dies=10), Terms(recover_within=10.0, attempts_exact=False))


def test_what_is_on_its_way_to_another_member_comes_with_its_partition() -> None:
    """Where partitions are shared out, a nacked message may take as long as a hand-over, around one and no longer."""

    def story(*, joined: float, came: float) -> Story:
        told = good_start().nack("l1", delay=2.0).at(joined).join("b").at(came)
        for member in ("a", "b"):
            told.event("idle", member=member, since=max(1.0, joined) if member == "b" else 1.0)
        return told.deliver("l2", "p.1", "b", attempt=2).ack("l2").drain()

    late, shared_out = ("late", "DEL-2"), Terms(rebalances=True)

    assert late not in told(story(joined=2.5, came=5.5), shared_out)
    assert late in told(story(joined=2.5, came=9.5), shared_out)
    assert late in told(story(joined=2.5, came=5.5), Terms())


def test_without_fencing_an_ack_that_was_held_up_may_end_the_next_loan() -> None:
    """Then the broker goes on with the key, and the message does not come again; an ack in peace ends nothing later."""

    def story(*, harmed: bool) -> Story:
        told = two_in_order().deliver("l1", "p.1", "a", key="k").at(9).ack("l1", confirmed=False)
        if harmed:
            told.event("fault", member="a", note="connection held")
        told.at(11).deliver("l2", "p.1", "b", key="k", attempt=2)
        return told.at(12).deliver("l3", "p.2", "b", key="k").ack("l3")

    unfenced = Terms(fencing=False)

    assert ("overtake", "ORD-2") not in told(story(harmed=True), unfenced)
    assert ("overtake", "ORD-2") in told(story(harmed=False), unfenced)
    assert ("overtake", "ORD-2") in told(story(harmed=True), Terms())


def test_who_is_handed_a_backlog_does_not_wait_for_the_end_of_it_in_vain() -> None:
    """A message that comes after many others is not late; one that comes after few is."""

    def story(before: int) -> Story:
        told = Story()
        for number in range(before + 1):
            told.publish(f"p.{number}")
        told.at(1).join("a")
        step = 20.0 / before
        for number in range(before):
            since = told.now
            told.at(since + step).event("idle", member="a", since=since)
            told.deliver(f"l{number}", f"p.{number}", "a").ack(f"l{number}")
        return told.deliver("last", f"p.{before}", "a").ack("last").drain()

    assert ("progress", "GRP-1") not in told(story(2500), Terms())
    assert ("progress", "GRP-1") in told(story(20), Terms())


def test_a_seek_excuses_what_it_moves() -> None:
    """After a seek settled messages come again, in any order, and none of it counts against the broker."""
    story = good_start().ack("l1").at(2).event("seek", phase="ok", topic="t", group="g")

    assert told(story.at(3).deliver("l2", "p.1", "a", attempt=1).ack("l2")) == set()


def test_violations_point_at_their_events(tmp_path: Path) -> None:
    """A violation's indices name the events that show it, in the file as in memory."""
    history = BAD["two holders"][2]().history()
    found = next(each for each in judge(history, STRICT) if each.checker == "not-exclusive")
    path = tmp_path / "history.jsonl"
    history.save(path)

    assert [history[index].lending for index in found.events] == ["l1", "l2"]
    assert [event.to_json() for event in type(history).load(path)] == [event.to_json() for event in history]
