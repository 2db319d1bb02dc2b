"""Hypothesis explores the public API on the virtual clock, and shrinks what breaks a rule to a few steps."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from unistream.conformance import clock
from unistream.conformance.checkers import judge
from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.line import Line
from unistream.conformance.recorded import Lent, RecordedMember
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target
from unistream.conformance.trial import Trial
from unistream.errors import SettleError

GOOD = Target.of("memory://machine")
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


@dataclass(frozen=True)
class Publish:
    """Publish a message."""

    key: bytes | None


@dataclass(frozen=True)
class Join:
    """Let a member join, of three at most."""


@dataclass(frozen=True)
class Receive:
    """Let a member receive what is there, or comes in half a second."""

    whose: int


@dataclass(frozen=True)
class Settle:
    """Settle something that was received, in time or too late."""

    which: int
    verb: Literal["ack", "confirm", "nack", "later", "reject"]


@dataclass(frozen=True)
class Go:
    """Let a member leave, or die with what it holds."""

    whose: int
    kill: bool


@dataclass(frozen=True)
class Wait:
    """Let time pass."""

    seconds: float


Step = Publish | Join | Receive | Settle | Go | Wait
STEP: st.SearchStrategy[Step] = st.one_of(
    st.builds(Publish, st.sampled_from([None, b"a", b"b"])),
    st.builds(Join),
    st.builds(Receive, st.integers(0, 2)),
    st.builds(Settle, st.integers(0, 9), st.sampled_from(["ack", "confirm", "nack", "later", "reject"])),
    st.builds(Go, st.integers(0, 2), st.booleans()),
    st.builds(Wait, st.sampled_from([0.1, 1.0, 2.5])),
)
# A list of lists is longer on average than a list; what breaks a rule is shrunk all the same.
STEPS = st.lists(st.lists(STEP, max_size=10), max_size=8).map(lambda parts: list(chain(*parts)))


class Machine:
    """Producers, members and their deliveries in any order; after every step no checker finds anything."""

    def __init__(self, trial: Trial, ordering: str) -> None:
        self.trial = trial
        self.ordering = ordering
        self.members: list[tuple[RecordedMember, Line]] = []
        self.held: list[Lent] = []

    async def run(self, steps: list[Step]) -> None:
        """Take the steps, consume what is left with a fresh member, and judge the whole."""
        topic = await self.trial.topic(partitions=2, ordering=self.ordering)
        self.group = await self.trial.group(topic, ordering=self.ordering, max_lease=self.trial.lease)
        self.producer = await self.trial.producer(topic)
        for step in steps:
            await self.take(step)
            self.no_rule_is_broken()
        for member, _ in self.members:
            await member.leave()
        await self.trial.drain(self.group)
        self.no_rule_is_broken()

    async def take(self, step: Step) -> None:
        """Take one step; one that needs a member or a delivery does nothing where there is none."""
        match step:
            case Publish(key):
                await self.producer.publish(key=key)
            case Join() if len(self.members) < 3:
                self.members.append(await self.trial.doomed(self.group, max_in_flight=4))
            case Receive(whose) if self.members:
                lent = await self.members[whose % len(self.members)][0].receive(0.5)
                self.held += [lent] if lent is not None else []
            case Settle(which, verb) if self.held:
                await _settle(self.held.pop(which % len(self.held)), verb)
            case Go(whose, kill) if self.members:
                member, line = self.members.pop(whose % len(self.members))
                self.held = [lent for lent in self.held if lent.member is not member]
                if kill:
                    self.trial.kill(member, line)
                else:
                    await member.leave()
            case Wait(seconds):
                await asyncio.sleep(seconds)

    def no_rule_is_broken(self) -> None:
        """Every checker is satisfied with what has happened so far."""
        found = judge(self.trial.recorder.history(), self.trial.terms)
        assert not [each for each in found if each.checker != VACUOUS], found


async def _settle(lent: Lent, verb: str) -> None:
    # A settle that is refused is recorded, and the checkers say whether it may have been.
    with suppress(SettleError):
        if verb in ("ack", "confirm"):
            await lent.ack(confirm=verb == "confirm")
        elif verb == "reject":
            await lent.reject("no")
        else:
            await lent.nack(2.0 if verb == "later" else 0.0, "no")


def explore(steps: list[Step], ordering: str, target: Target = GOOD) -> None:
    """Take the steps on a broker of their own."""
    target = target.fresh()

    async def main() -> None:
        async with Trial(target, "machine", run="0000cafe") as trial:
            await Machine(trial, ordering).run(steps)

    try:
        clock.run(main())
    finally:
        target.forget()


@pytest.mark.parametrize("ordering", ["none", "key"])
@pytest.mark.timeout(300)
def test_no_sequence_of_calls_breaks_a_rule(ordering: str) -> None:
    """A hundred and fifty runs of up to eighty steps on the reference broker: nothing for any checker."""

    @SETTINGS
    @given(steps=STEPS)
    def check(steps: list[Step]) -> None:
        explore(steps, ordering)

    check()


@pytest.mark.parametrize(
    ("saboteur", "ordering", "fewest"),
    [
        ("overtake", "key", [Publish, Publish]),
        ("drop-on-nack", "none", [Join, Publish, Receive, Settle]),
        ("lose-on-close", "none", [Join, Publish, Receive]),
    ],
)
# What a harmed run leaves unawaited when it is cut short is of no interest.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(300)
def test_what_breaks_a_rule_is_shrunk(saboteur: str, ordering: str, fewest: list[type[Step]]) -> None:
    """A saboteur is found, and the smallest sequence of calls that shows it has as few steps as there can be."""
    harmed = replace(GOOD, layers=(load_saboteurs()[saboteur].layer,))
    failed: list[list[Step]] = []

    @settings(SETTINGS, max_examples=200)
    @given(steps=STEPS)
    def check(steps: list[Step]) -> None:
        try:
            explore(steps, ordering, harmed)
        except AssertionError:
            failed.append(steps)
            raise

    with pytest.raises(AssertionError, match="Violation"):
        check()

    names = [type(step).__name__ for step in failed[-1]]
    assert sorted(names) == [step.__name__ for step in fewest], failed[-1]
