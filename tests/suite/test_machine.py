"""Hypothesis explores the public API on the virtual clock, and shrinks what breaks a rule to a few steps."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from unistream.conformance.checkers import judge
from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.clock import VirtualLoop
from unistream.conformance.line import Line
from unistream.conformance.recorded import Lent, RecordedMember
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target
from unistream.conformance.trial import Trial
from unistream.errors import SettleError

T = TypeVar("T")

GOOD = Target.of("memory://machine")
SETTINGS = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


class Machine(RuleBasedStateMachine):
    """Producers, members and their deliveries in any order; after every step no checker finds anything."""

    target: ClassVar[Target] = GOOD
    ordering: ClassVar[str] = "none"

    @initialize()
    def begin(self) -> None:
        """Open a trial with one topic, one group and one producer."""
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.members: list[tuple[RecordedMember, Line]] = []
        self.held: list[Lent] = []
        self.trial = self.run(self._open())

    async def _open(self) -> Trial:
        trial = Trial(self.target.fresh(), "machine", run="0000cafe")
        await trial.__aenter__()
        topic = await trial.topic(partitions=2, ordering=self.ordering)
        self.group = await trial.group(topic, ordering=self.ordering, max_lease=trial.lease)
        self.producer = await trial.producer(topic)
        return trial

    def run(self, doing: Coroutine[Any, Any, T]) -> T:
        """Let the loop run until this is done, and no longer."""
        return self.runner.run(doing)

    @rule(key=st.sampled_from([None, b"a", b"b"]))
    def publish(self, key: bytes | None) -> None:
        """Publish a message."""
        self.run(self.producer.publish(key=key))

    @precondition(lambda self: len(self.members) < 3)
    @rule()
    def join(self) -> None:
        """Let a member join."""
        self.members.append(self.run(self.trial.doomed(self.group, max_in_flight=4)))

    @precondition(lambda self: self.members)
    @rule(data=st.data(), wait=st.sampled_from([0.0, 0.5]))
    def receive(self, data: st.DataObject, wait: float) -> None:
        """Receive what is there."""
        member, _ = data.draw(st.sampled_from(self.members))
        lent = self.run(member.receive(wait))
        if lent is not None:
            self.held.append(lent)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), verb=st.sampled_from(["ack", "confirm", "nack", "later", "reject"]))
    def settle(self, data: st.DataObject, verb: str) -> None:
        """Settle something that was received, in time or too late."""
        lent = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.run(_settle(lent, verb))

    @precondition(lambda self: self.members)
    @rule(data=st.data(), kill=st.booleans())
    def go(self, data: st.DataObject, kill: bool) -> None:
        """Let a member leave, or die with what it holds."""
        member, line = self.members.pop(data.draw(st.integers(0, len(self.members) - 1)))
        self.held = [lent for lent in self.held if lent.member is not member]
        if kill:
            self.run(self._kill(member, line))
        else:
            self.run(member.leave())

    async def _kill(self, member: RecordedMember, line: Line) -> None:
        self.trial.kill(member, line)

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.5]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.run(asyncio.sleep(seconds))

    @invariant()
    def no_rule_is_broken(self) -> None:
        """Every checker is satisfied with what has happened so far."""
        if hasattr(self, "trial"):
            found = judge(self.trial.recorder.history(), self.trial.terms)
            assert not [each for each in found if each.checker != VACUOUS], found

    def teardown(self) -> None:
        """Consume what is left with a fresh member, judge the whole, and close."""
        if not hasattr(self, "trial"):
            return
        try:
            self.run(self._end())
            self.no_rule_is_broken()
        finally:
            self.run(self.trial.__aexit__(None, None, None))
            self.trial.target.forget()
            self.runner.close()

    async def _end(self) -> None:
        for member, _ in self.members:
            await member.leave()
        await self.trial.drain(self.group)


async def _settle(lent: Lent, verb: str) -> None:
    # A settle that is refused is recorded, and the checkers say whether it may have been.
    with suppress(SettleError):
        if verb in ("ack", "confirm"):
            await lent.ack(confirm=verb == "confirm")
        elif verb == "reject":
            await lent.reject("no")
        else:
            await lent.nack(2.0 if verb == "later" else 0.0, "no")


def _machine(ordering: str, target: Target = GOOD) -> type[Machine]:
    return type(f"{ordering.title()}Machine", (Machine,), {"ordering": ordering, "target": target})


@pytest.mark.parametrize("ordering", ["none", "key"])
@pytest.mark.timeout(300)
def test_no_sequence_of_calls_breaks_a_rule(ordering: str) -> None:
    """Twenty-five runs of up to thirty steps on the reference broker: nothing for any checker."""
    run_state_machine_as_test(_machine(ordering), settings=SETTINGS)


@pytest.mark.parametrize(
    ("saboteur", "ordering", "most"),
    [("overtake", "key", 15), ("drop-on-nack", "none", 15)],
)
@pytest.mark.timeout(300)
def test_what_breaks_a_rule_is_shrunk(saboteur: str, ordering: str, most: int) -> None:
    """A saboteur is found, and the smallest sequence of calls that shows it is short."""
    harmed = replace(GOOD, layers=(load_saboteurs()[saboteur].layer,))
    machine = _machine(ordering, harmed)

    with pytest.raises(AssertionError, match="Violation") as caught:
        run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=60))

    notes = "\n".join(getattr(caught.value, "__notes__", ()))
    steps = [line for line in notes.splitlines() if re.match(r"state\.(publish|join|receive|settle|go|wait)\(", line)]
    assert 0 < len(steps) <= most, notes
