"""The suite notices every broken promise, names the rule, and lets no empty backend pass."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest

from unistream._registry import find_driver
from unistream.conformance import target
from unistream.conformance.__main__ import main
from unistream.conformance.command import WRONG_CALL
from unistream.conformance.kill import sabotage
from unistream.conformance.registry import load_cases
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.saboteurs.wires import NullConnect
from unistream.conformance.target import Pace, Target
from unistream.conformance.wrap import DriverLayer, stack

TARGET = Target.of("memory://saboteurs")
CASES = load_cases().select("long")
SABOTEURS = load_saboteurs()
HERE = [name for name, saboteur in SABOTEURS.items() if not set(saboteur.needs) & TARGET.lacks.keys()]
"""Those whose harm can be seen in this process; the others are caught on a real broker."""

NEED_NO_MESSAGE = {
    # What a backend that stores nothing, or delivers nothing, still gets right: names, claims, errors, empty answers.
    *("bpp.block-timeout", "bpp.fail", "cap.complete", "cap.refused", "cfg.require", "cfg.unknown-option"),
    # A hundred clients that only connect.
    "ovl.connect-storm",
    *("con.empty-receive", "err.before-entering", "err.health", "err.max-attempts-needs-a-place", "err.taxonomy"),
    *("err.url", "grp.conflict", "ord.unordered-refused", "pub.after-close", "pub.error-says-stored", "pub.no-group"),
    *("pub.timeout-honoured", "shu.unseen-failures", "top.create-conflict", "top.create-idempotent"),
    *("top.deleted-under-member", "top.group-deleted-under-member", "top.names", "top.unknown"),
}
"""The allow-list of the null backends."""


@pytest.mark.parametrize("name", ["null-sink", "null-source"])
@pytest.mark.timeout(300)
def test_an_empty_backend_passes_nothing_that_needs_a_message(name: str) -> None:
    """A backend that confirms and stores nothing, or never delivers, passes no case outside the allow-list."""
    # Of those that take real time only the quick ones: the others would wait in vain for minutes.
    cases = [case for case in CASES if not case.alone or case.id == "con.idle-cost"]
    fate = sabotage(SABOTEURS[name], replace(TARGET, pace=Pace(patience=3.0)), cases, seed=3)

    assert set(fate.passed) <= NEED_NO_MESSAGE


@pytest.mark.parametrize("layer", [NullConnect, SABOTEURS["null-sink"].layer, SABOTEURS["null-source"].layer])
def test_an_empty_backend_is_not_judged_at_all(layer: type[DriverLayer], capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends with exit code 2 before any case: who can't connect, store or deliver has shown nothing."""
    with patch.object(target, "find_driver", lambda scheme: stack(find_driver(scheme), layer)):
        code = main(["run", "--url", "memory://null", "--profile", "smoke"])

    said = capsys.readouterr()
    assert code == WRONG_CALL
    assert said.out == ""
    assert "preflight" in said.err


@pytest.mark.parametrize("name", HERE)
@pytest.mark.timeout(300)
def test_every_saboteur_is_killed(name: str) -> None:
    """Some case reports a violation of a rule that the saboteur breaks."""
    fate = sabotage(SABOTEURS[name], TARGET, CASES, seed=3, quick=True)

    assert fate.killed, f"{name} lives; other rules named: {fate.others}"


def test_every_saboteur_names_rules_and_says_what_it_does() -> None:
    """A saboteur without a rule proves nothing."""
    assert all(saboteur.rules and saboteur.sentence for saboteur in SABOTEURS.values())


def test_the_reference_broker_conforms(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole core profile on the reference broker: no violation, nothing unverified."""
    code = main(["run", "--url", "memory://reference", "--profile", "faults"])

    assert code == 0, capsys.readouterr().out
