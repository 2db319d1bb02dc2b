"""Knows what becomes of a saboteur: which cases catch it, and whether they say which promise it broke.

A saboteur is killed by a case that fails with a message naming one of the rules that the saboteur breaks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.registry import Case
from unistream.conformance.runner import Result, run_case
from unistream.conformance.saboteurs import Saboteur
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict

UNDERCLAIMED = "CAP-1"
"""The rule that a claim breaks which is less than the truth."""


@dataclass(slots=True)
class Fate:
    """
    What became of one saboteur.

    Attributes:
        name: The saboteur's.
        rules: The rules that it breaks.
        killers: The cases that failed and named a rule that it breaks, each with its message.
        others: The cases that failed, but named another rule, or none: they ran out of time, or an error got through.
        passed: The cases that it passed.
        silent: The cases that showed nothing with it.
        seconds: How long it took.
    """

    name: str
    rules: tuple[str, ...]
    killers: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether some case caught it and named a rule that it breaks."""
        return bool(self.killers)

    def join(self, other: Fate) -> None:
        """Take into account what became of the same saboteur elsewhere."""
        self.killers.update(other.killers)
        self.others.update(other.others)
        self.passed += other.passed
        self.silent.update(other.silent)
        self.seconds += other.seconds

    @property
    def tried(self) -> int:
        """How many cases were tried on it."""
        return len(self.killers) + len(self.others) + len(self.passed) + len(self.silent)

    def note(self, result: Result) -> None:
        """Take one case's result into account."""
        if result.verdict is Verdict.UNDERCLAIMED and UNDERCLAIMED in self.rules:
            self.killers[result.case.id] = f"{UNDERCLAIMED}: it works and is not claimed"
        elif result.verdict is Verdict.VIOLATION:
            message = next(accusations(result, self.rules), None)
            (self.others if message is None else self.killers)[result.case.id] = message or result.reason
        elif result.verdict is Verdict.CONFORMS:
            self.passed.append(result.case.id)
        else:
            self.silent[result.case.id] = f"{result.verdict}: {result.reason}"


def accusations(result: Result, rules: Sequence[str]) -> Iterator[str]:
    """Yield what a failed case says of these rules: by its own check, and by the checkers."""
    if result.expected and result.rule in rules:
        yield f"{result.rule}: expected {result.expected}; actual: {result.actual}"
    yield from (str(each) for each in result.violations if each.rule in rules and each.checker != VACUOUS)


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
    began = time.perf_counter()
    fate = Fate(saboteur.name, saboteur.rules)
    with harm(saboteur, target) as harmed:
        for case in sorted(cases, key=lambda case: (case.id not in saboteur.by, case.alone)):
            fate.note(run_case(case, harmed, seed=seed))
            if quick and fate.killed:
                break
    fate.seconds = time.perf_counter() - began
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
