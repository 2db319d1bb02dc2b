"""The tier `broker` on a Redis of the tests' own: restarted, killed by SIGKILL and frozen by the hooks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.brokers import local
from unistream.conformance.kill import accusations
from unistream.conformance.registry import Case, Tier, load_cases
from unistream.conformance.runner import run_case
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]

CASES = [case for case in load_cases() if case.tier is Tier.BROKER and not case.id.startswith("sim.")]
"""The random workload is long and of chance: `unistream conform storm URL --hook …` runs it."""
SABOTAGED = [(name, by) for name, each in load_saboteurs().items() for by in each.by if by.startswith("dur.")]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A private Redis and the commands that act on it."""
    directory: Path = tmp_path_factory.mktemp("redis")
    tool = f"UNISTREAM_BROKERS_DIR={directory} {sys.executable} -m tests.brokers"
    hooks = {
        "restart": f"{tool} restart redis",
        "kill9": f"{tool} kill9 redis && {tool} restart redis",
        "pause": f"{tool} pause redis",
        "resume": f"{tool} resume redis",
    }
    with local("redis", directory) as server:
        yield Target.of(f"{server.url}?dead_peer_after=2", hooks=hooks)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_durable_redis_keeps_its_promises(case: Case, target: Target) -> None:
    """What was confirmed survives, and producers and members come back by themselves."""
    result = run_case(case, target, seed=5)

    assert result.verdict is Verdict.CONFORMS, f"{result}\n{result.violations[:3]}\n{result.counts}"


@pytest.mark.parametrize(("name", "by"), SABOTAGED)
def test_broken_durability_is_noticed(name: str, by: str, target: Target) -> None:
    """A driver that confirms too early, or never comes back, is caught by the case made for it."""
    saboteur = load_saboteurs()[name]
    result = run_case(load_cases()[by], replace(target, layers=(saboteur.layer,)), seed=5)

    assert result.verdict is Verdict.VIOLATION, f"{name} lives: {result}"
    assert list(accusations(result, saboteur.rules)), f"{result}"


@pytest.mark.parametrize("hook", ["restart", "pause"])
def test_a_hook_that_does_nothing_is_no_pass(hook: str, target: Target) -> None:
    """A command that ends well and leaves the broker as it was makes the case UNVERIFIED."""
    case = load_cases()["dur.clean-restart" if hook == "restart" else "dur.pause"]
    result = run_case(case, replace(target, hooks={**target.hooks, hook: "true"}), seed=5)

    assert result.verdict is Verdict.UNVERIFIED, f"{result}"
