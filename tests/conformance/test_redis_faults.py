"""The tier `faults` on a real Redis: no promise broken, and every case shows that its fault took place."""

from __future__ import annotations

import pytest

from tests.urls import url_of
from unistream.conformance.registry import Case, Tier, load_cases
from unistream.conformance.runner import run_case
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]

CASES = [case for case in load_cases() if case.tier is Tier.FAULTS and not case.id.startswith("sim.")]
"""Storms are long and of chance: `unistream conform storm URL` runs them."""


@pytest.fixture(scope="module")
def target() -> Target:
    """The shared Redis, whose dead connections are noticed soon."""
    return Target.of(f"{url_of('UNISTREAM_REDIS_URL')}?dead_peer_after=2")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_faults(case: Case, target: Target) -> None:
    """Under faults of the wire and of processes every rule holds; what Redis does not claim is absent, not broken."""
    result = run_case(case, target, seed=5)

    assert result.verdict in (Verdict.CONFORMS, Verdict.ABSENT), f"{result}\n{result.violations[:3]}\n{result.counts}"
    assert result.verdict is Verdict.CONFORMS or not result.claimed
