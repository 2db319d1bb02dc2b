"""The suite notices every broken promise, names the rule, and lets no empty backend pass."""

from __future__ import annotations

import pytest

from unistream.conformance.__main__ import main
from unistream.conformance.kill import sabotage
from unistream.conformance.registry import load_cases
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target

TARGET = Target.of("memory://saboteurs")
CASES = load_cases().select("long")
SABOTEURS = load_saboteurs()
HERE = [name for name, saboteur in SABOTEURS.items() if not set(saboteur.needs) & TARGET.lacks.keys()]
"""Those whose harm can be seen in this process; the others are caught on a real broker."""

NEED_NO_MESSAGE = {
    # What a backend that stores nothing, or delivers nothing, still gets right: names, claims, errors, empty answers.
    *("bpp.block-timeout", "bpp.fail", "cap.complete", "cap.refused", "cfg.require", "cfg.unknown-option"),
    # The program of cfg.swap finds its driver by the URL alone, so no layer can be put over it.
    *("cfg.swap", "lek.broker", "ovl.connect-storm"),
    *("con.empty-receive", "err.before-entering", "err.health", "err.max-attempts-needs-a-place", "err.taxonomy"),
    *("err.url", "grp.conflict", "ord.unordered-refused", "pub.after-close", "pub.error-says-stored", "pub.no-group"),
    *("pub.timeout-honoured", "shu.unseen-failures", "top.create-conflict", "top.create-idempotent"),
    *("top.deleted-under-member", "top.group-deleted-under-member", "top.names", "top.unknown"),
    # What costs nothing and leaves nothing behind when there is nothing.
    *("cfg.swap", "con.idle-cost", "lek.broker"),
}
"""The allow-list of the null backends."""


@pytest.mark.parametrize("name", ["null-sink", "null-source"])
@pytest.mark.timeout(300)
def test_an_empty_backend_passes_nothing_that_needs_a_message(name: str) -> None:
    """A backend that confirms and stores nothing, or never delivers, passes no case outside the allow-list."""
    # Those that take real time are left out: they would wait in vain for minutes.
    fate = sabotage(SABOTEURS[name], TARGET, [case for case in CASES if not case.alone], seed=3)

    assert set(fate.passed) <= NEED_NO_MESSAGE


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
