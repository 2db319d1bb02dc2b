"""Random workloads on the reference broker: clean, the same every time, and replayable from a file."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.command import NOT_CONFORMANT, PASSED, replay, shrink, simulate, simulations
from unistream.conformance.kill import harm
from unistream.conformance.plan import SHAPES, Plan, Shape, draw
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.shrink import least, shrunk
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


@pytest.mark.parametrize(
    ("saboteur", "shape", "messages"),
    [("overtake", "keyed", 2), ("drop-on-nack", "queue", 1), ("one-group-only", "fan-out", 1)],
)
def test_a_plan_that_breaks_a_rule_is_made_small(saboteur: str, shape: Shape, messages: int) -> None:
    """Of sixty messages as few are left as the harm needs, and no fault; the small plan still breaks the rule."""

    def accused(plan: Plan) -> set[str]:
        return {each.checker for each in simulate(plan, harmed, seed=plan.seed).violations} - {VACUOUS}

    with harm(load_saboteurs()[saboteur], TARGET) as harmed:
        plan = draw(0, shape, lease=2.0)
        wanted = accused(plan)
        small = shrunk(plan, lambda smaller: bool(wanted & accused(smaller)))
        found = accused(small)

    assert wanted & found
    assert (small.size, len(small.faults)) == (messages, 0), small


def test_shrinking_leaves_what_can_not_be_left_out() -> None:
    """Of a hundred parts the three that are needed together are left, in their order."""
    needed = {7, 42, 99}

    assert least(range(100), lambda left: needed <= set(left)) == [7, 42, 99]
    assert least(range(5), lambda left: False) == [0, 1, 2, 3, 4]
    assert least(range(5), lambda left: True) == []


def test_a_small_plan_is_kept_and_can_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes a plan that breaks the rule by itself; one that breaks none can't be shrunk."""
    path, out = tmp_path / "plan.json", tmp_path / "small.json"
    draw(0, "queue", lease=2.0).save(path)

    with harm(load_saboteurs()["drop-on-nack"], TARGET) as harmed, patch.object(Target, "of", lambda url: harmed):
        assert shrink("memory://harmed", path, out) == NOT_CONFORMANT
        assert replay("memory://harmed", out) == NOT_CONFORMANT
    assert "1 messages, 1 members, 0 faults" in capsys.readouterr().out
    assert replay(TARGET.url, out) == PASSED
    with pytest.raises(ValueError, match="breaks no rule"):
        shrink(TARGET.url, path, out)
