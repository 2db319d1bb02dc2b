"""Random workloads on the reference broker: clean, the same every time, and replayable from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from unistream.conformance.command import simulate, simulations
from unistream.conformance.plan import SHAPES, Plan, Shape, draw
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict

TARGET = Target.of("memory://simulations")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.timeout(300)
def test_a_hundred_seeds_break_no_rule(shape: Shape) -> None:
    """Every checker is satisfied with what the reference broker does under members that die, leave and stall."""
    failed = [
        f"seed {plan.seed}: {result.reason}"
        for plan, result in simulations(TARGET, range(100), [shape])
        if result.verdict is not Verdict.CONFORMS
    ]

    assert failed == []


@pytest.mark.parametrize("shape", SHAPES)
def test_the_faults_happen(shape: Shape) -> None:
    """Over thirty seeds every kind of fault took place, and every kind of settle."""
    seen = {name for _, result in simulations(TARGET, range(30), [shape]) for name in result.counts}

    assert seen >= {"died", "left", "stall", "cancel", "hit", "nacked", "rejected", "acked", "expired", "redelivered"}


def test_a_seed_gives_the_same_history_twice() -> None:
    """On the virtual clock a run repeats exactly: the same events in the same order at the same times."""
    runs = [
        [
            (event.at, event.op, event.phase, event.msg, event.member, event.attempt)
            for event in simulate(draw(7, "keyed"), TARGET, seed=7).history
        ]
        for _ in range(2)
    ]

    assert len(runs[0]) > 100
    assert runs[0] == runs[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_survives_its_file(shape: Shape, tmp_path: Path) -> None:
    """A plan that was kept is the plan that was drawn."""
    plan = draw(11, shape)
    path = tmp_path / "plan.json"
    plan.save(path)

    assert Plan.load(path) == plan
    assert draw(11, shape) == plan
    assert draw(12, shape) != plan
