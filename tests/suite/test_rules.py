"""Rules, cases and saboteurs belong together: no promise without a case, and no case that nobody can fail."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from unistream.conformance.checkers import CHECKERS
from unistream.conformance.registry import load_cases
from unistream.conformance.saboteurs import load_saboteurs

SEMANTICS = Path(__file__).parents[2] / "docs" / "semantics.md"
RULES = re.findall(r"^\*\*([A-Z]+-\d+)\*\*", SEMANTICS.read_text(encoding="utf-8"), re.MULTILINE)

NO_CASE: dict[str, str] = {}
"""Rules of the text that no case tests, and why not."""

NO_SABOTEUR: dict[str, str] = {
    "ORD-1": "it permits: nobody can break a promise that messages may be reordered",
}
"""Rules that no saboteur breaks, and why not."""


def _by_rule(named: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, rules in named.items():
        for rule in rules:
            found[rule].append(name)
    return found


CASES = _by_rule({case.id: case.rules for case in load_cases()})
SABOTEURS = _by_rule({name: saboteur.rules for name, saboteur in load_saboteurs().items()})


def test_every_rule_has_a_case_or_a_reason() -> None:
    """What the text promises is tested; a rule that has a case needs no reason."""
    assert {rule for rule in RULES if not CASES[rule]} == set(NO_CASE)


def test_every_rule_has_a_saboteur_or_a_reason() -> None:
    """Every promise can be broken, and the suite has seen it broken."""
    assert {rule for rule in RULES if not SABOTEURS[rule]} == set(NO_SABOTEUR)


def test_cases_saboteurs_and_checkers_name_only_rules_of_the_text() -> None:
    """No case tests what was never promised."""
    named = {*CASES, *SABOTEURS, *(rule for checker in CHECKERS.values() for rule in checker.rules)}
    known = {rule for rule in named if CASES[rule] or SABOTEURS[rule]} | {
        rule for checker in CHECKERS.values() for rule in checker.rules
    }

    assert known <= set(RULES)


def test_rules_are_numbered_without_gaps_or_repetitions() -> None:
    """Every family of rules counts from one."""
    families: dict[str, list[int]] = defaultdict(list)
    for rule in RULES:
        family, _, number = rule.partition("-")
        families[family].append(int(number))

    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in families.values())
    assert len(RULES) > 40
