"""Every case catches a saboteur: `kills.json` says which, and the ones that run in memory are tried again here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unistream.conformance.kill import sabotage
from unistream.conformance.matrix import lacking
from unistream.conformance.registry import load_cases
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target

pytestmark = pytest.mark.filterwarnings(
    # What a harmed run leaves unawaited when it is cut short is of no interest.
    "ignore::RuntimeWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)

TARGET = Target.of("memory://kills")
CASES = load_cases()
SABOTEURS = load_saboteurs()
KILLS: dict[str, str] = json.loads((Path(__file__).parent / "kills.json").read_text(encoding="utf-8"))
"""By case one saboteur that it kills, as `unistream conform kill --json` found it; the more particular the better."""
HERE = [(case, name) for case, name in KILLS.items() if case in {c.id for c in CASES if not lacking(c, TARGET)}]


def test_every_case_kills_somebody() -> None:
    """A case that nobody can fail shows nothing, and the list names no case or saboteur that is gone."""
    assert set(KILLS) == {case.id for case in CASES}
    assert set(KILLS.values()) <= SABOTEURS.keys()


def test_what_can_not_be_tried_here_is_made_for_its_case() -> None:
    """The saboteurs of sockets and processes name the cases that are made to kill them; a real broker tries those."""
    here = {case for case, _ in HERE}

    assert all(case in SABOTEURS[name].by for case, name in KILLS.items() if case not in here)


@pytest.mark.parametrize(("case", "name"), HERE)
@pytest.mark.timeout(120)
def test_the_case_names_the_broken_rule(case: str, name: str) -> None:
    """The case fails, and its message names a rule that the saboteur breaks."""
    fate = sabotage(SABOTEURS[name], TARGET, [CASES[case]], seed=1)

    assert fate.killed, f"{name} lives: {fate.others} {fate.silent}"
