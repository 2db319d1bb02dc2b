"""Every case of the tier `faults` catches a driver that breaks its promise on a real Redis, and names the rule."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest

from tests.urls import url_of
from unistream.conformance.kill import accusations, harm
from unistream.conformance.registry import Tier, load_cases
from unistream.conformance.runner import Result, run_case
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.saboteurs.wires import RoundTheWire
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict

pytestmark = [pytest.mark.redis, pytest.mark.timeout(400)]

SIDE_BY_SIDE = 4
"""Cases that run at once: they mostly wait."""

CASES = load_cases()
SABOTEURS = load_saboteurs()
BY_CHANCE = {("short-timeouts", "net.one-byte-segments")}
"""On a quiet machine the slices can arrive before even a short timeout; other cases catch it for sure."""
FAULTS = {case.id for case in CASES if case.tier is Tier.FAULTS and case.group != "sim"}
"""Storms are long and of chance: `unistream conform kill --on URL` tries them."""
PAIRS = [
    (name, by)
    for name, each in SABOTEURS.items()
    for by in each.by
    if by in FAULTS and "dedupe" not in {*each.needs, *CASES[by].level.needs} and (name, by) not in BY_CHANCE
]


@pytest.fixture(scope="module")
def target() -> Target:
    """The shared Redis, whose dead connections are noticed soon."""
    return Target.of(f"{url_of('UNISTREAM_REDIS_URL')}?dead_peer_after=2")


@pytest.fixture(scope="module")
def results(target: Target) -> dict[tuple[str, str], Future[Result]]:
    """All runs, side by side; those that harm the library itself afterwards, one by one."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = {
            (name, by): pool.submit(run_case, CASES[by], replace(target, layers=(SABOTEURS[name].layer,)), seed=5)
            for name, by in PAIRS
            if SABOTEURS[name].patch is nullcontext
        }
    for name, by in set(PAIRS) - found.keys():
        with harm(SABOTEURS[name], target) as harmed:
            found[name, by] = Future()
            found[name, by].set_result(run_case(CASES[by], harmed, seed=5))
    return found


@pytest.mark.parametrize(("name", "by"), PAIRS)
def test_a_broken_promise_is_noticed(name: str, by: str, results: dict[tuple[str, str], Future[Result]]) -> None:
    """The case reports a violation of a rule that the saboteur breaks."""
    result = results[name, by].result()

    assert result.verdict is Verdict.VIOLATION, f"{name} lives: {result}"
    assert list(accusations(result, SABOTEURS[name].rules)), f"{result}"


@pytest.mark.parametrize("case_id", ["net.latency", "net.half-open", "net.ephemeral-gap", "net.one-byte-segments"])
def test_a_wire_that_nobody_uses_is_no_pass(case_id: str, target: Target) -> None:
    """With a driver that goes round the proxy a case of the wire shows nothing, and does not pass."""
    result = run_case(CASES[case_id], replace(target, layers=(RoundTheWire,)), seed=5)

    assert result.verdict is not Verdict.CONFORMS, f"{result}"
