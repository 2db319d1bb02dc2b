"""Knows the kill matrix: every saboteur against every case, to prove that the suite notices what it should.

A saboteur is killed by a case that reports a violation of one of the rules that the saboteur breaks. One that lives is
a hole in the suite; so is a case that kills nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from unistream.conformance.registry import Case
from unistream.conformance.runner import Result, run_case
from unistream.conformance.saboteurs import Saboteur
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict

CAUGHT = frozenset({Verdict.VIOLATION, Verdict.UNDERCLAIMED})
"""Verdicts by which a case kills: a broken rule, or a claim that is less than the truth."""


@dataclass(slots=True)
class Fate:
    """
    What became of one saboteur.

    Attributes:
        killers: The cases that reported a violation of a rule that it breaks.
        others: The cases that failed, but named another rule.
        passed: The cases that it passed.
    """

    saboteur: Saboteur
    killers: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        """Whether some case caught it and named a rule that it breaks."""
        return bool(self.killers)

    def note(self, result: Result) -> None:
        """Take one case's result into account."""
        if result.verdict is Verdict.UNDERCLAIMED:
            self.killers[result.case.id] = "CAP: it works and is not claimed"
        elif result.verdict is Verdict.VIOLATION:
            named = {result.rule, *(violation.rule for violation in result.violations)} & set(self.saboteur.rules)
            (self.killers if named else self.others)[result.case.id] = f"{result.rule}: {result.reason}"
        elif result.verdict is Verdict.CONFORMS:
            self.passed.append(result.case.id)


def sabotage(saboteur: Saboteur, target: Target, cases: Iterable[Case], *, seed: int = 0, quick: bool = False) -> Fate:
    """
    Run the cases on the target with the saboteur over its driver.

    Args:
        saboteur: Whom to catch.
        target: A good one.
        cases: First those that are made to catch it, last those that take real time, else in this order.
        seed: Of every case.
        quick: Stop at the first case that kills it.
    """
    fate = Fate(saboteur)
    with harm(saboteur, target) as harmed:
        for case in sorted(cases, key=lambda case: (case.id not in saboteur.by, case.alone)):
            fate.note(run_case(case, harmed, seed=seed))
            if quick and fate.killed:
                break
    return fate


@contextmanager
def harm(saboteur: Saboteur, target: Target) -> Iterator[Target]:
    """Return the target with the saboteur at work in it, as long as the context lasts."""
    # What a sabotaged client logs is of no interest; a thousand lines of it would hide the table.
    loggers = [logging.getLogger(name) for name in ("unistream", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with saboteur.patch():
            yield replace(target, layers=(*target.layers, saboteur.layer))
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def matrix(
    saboteurs: Iterable[Saboteur], target: Target, cases: Iterable[Case], *, seed: int = 0, quick: bool = False
) -> Iterator[Fate]:
    """Yield every saboteur's fate."""
    chosen = list(cases)
    for saboteur in saboteurs:
        yield sabotage(saboteur, target, chosen, seed=seed, quick=quick)


def idle_cases(fates: Iterable[Fate], cases: Iterable[Case]) -> list[str]:
    """Return the cases that killed nobody: either redundant, or a saboteur is missing."""
    busy = {name for fate in fates for name in fate.killers}
    return [case.id for case in cases if case.id not in busy]
