"""Knows every rule that a history alone can prove broken; each checker is a pure function of a run and its terms.

`judge(history, terms)` runs them all. A checker yields one violation for each thing that went wrong, naming the rule
of the contract and the events that show it; it never looks at a clock, a broker or another checker's findings.
"""

from __future__ import annotations

from collections.abc import Iterable

from unistream.conformance.checkers import dead_letters, effort, lending, order, publishing, settling, timing
from unistream.conformance.checkers.effort import counters
from unistream.conformance.checkers.run import Run
from unistream.conformance.checkers.table import CHECKERS
from unistream.conformance.checkers.terms import Terms, Violation
from unistream.conformance.history import History

__all__ = ["CHECKERS", "THEMES", "History", "Run", "Terms", "Violation", "counters", "judge"]

THEMES = (publishing, lending, settling, order, timing, dead_letters, effort)


def judge(history: History, terms: Terms | None = None, only: Iterable[str] | None = None) -> list[Violation]:
    """
    Return everything in `history` that breaks a rule, in the order in which it went wrong.

    Args:
        history: One run, whole.
        terms: What the target claims; the strictest claims when left out.
        only: Names of checkers; all of them when left out.
    """
    run = Run(history)
    terms = Terms() if terms is None else terms
    found = [
        violation for name in (CHECKERS if only is None else only) for violation in CHECKERS[name].find(run, terms)
    ]
    return sorted(found, key=lambda violation: violation.events[-1:])
