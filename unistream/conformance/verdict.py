"""Knows what an outcome means beside a claim: the table of verdicts, and when a target is conformant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from unistream.conformance.registry import MUST, Case


class Outcome(StrEnum):
    """What came of running a case once."""

    PASSED = "passed"
    FAILED = "failed"
    REFUSED = "refused"
    """It needed a capability and was told so by UnsupportedError."""
    NOT_RUN = "not run"
    """Not run, or run without showing anything."""
    CANNOT_EXIST = "cannot exist"
    """The driver declares that what the case needs can't exist for it."""
    BROKEN = "broken"
    """The suite or its environment failed."""


class Verdict(StrEnum):
    """What a report says of a case."""

    CONFORMS = "CONFORMS"
    VIOLATION = "VIOLATION"
    UNVERIFIED = "UNVERIFIED"
    """Nobody knows: not run, or nothing happened in it. Never a pass."""
    UNDERCLAIMED = "UNDERCLAIMED"
    """It works and is not claimed."""
    ABSENT = "ABSENT"
    """Not claimed, and refused as it must be."""
    INAPPLICABLE = "INAPPLICABLE"
    """What it needs can't exist for this target, and the driver says why. Never a pass."""
    ERROR = "ERROR"
    """The suite or its environment failed."""
    UNSTABLE = "UNSTABLE"
    """Passed and failed under the same seed. Counts as a failure."""
    BLOCKED = "BLOCKED"
    """Not run, because a case that everything else builds on failed. Never a pass."""
    EXCLUDED = "EXCLUDED"
    """It ran and failed, as a list of exclusions says it would. Never a pass."""
    STALE = "STALE"
    """It is excluded, and yet it passes: the list is wrong. Counts as a failure."""


REFUSABLE = frozenset({"ordering", "start", "seek", "nack_delay", "ack_confirm", "retention", "max_backlog", "lag"})
"""Capabilities that are asked for by a call or an argument, which must be refused where they are not offered.
The others (`fencing`, `attempts`, `dedupe`, …) are qualities: where unclaimed, there is nothing to refuse."""

FAILURES = frozenset(
    {
        *(Verdict.VIOLATION, Verdict.UNVERIFIED, Verdict.ERROR, Verdict.UNSTABLE),
        *(Verdict.BLOCKED, Verdict.EXCLUDED, Verdict.STALE),
    }
)
"""A mandatory case with one of these keeps a target from being conformant."""


def verdict(*, claimed: bool, outcome: Outcome, needs: Iterable[str] = ()) -> Verdict:
    """
    Return the verdict on one case.

    Args:
        claimed: The target offers every capability that the case needs; True for cases that need none.
        outcome: What came of running it.
        needs: Names of those capabilities.
    """
    match outcome:
        case Outcome.BROKEN:
            return Verdict.ERROR
        case Outcome.NOT_RUN:
            return Verdict.UNVERIFIED
        case Outcome.CANNOT_EXIST:
            return Verdict.INAPPLICABLE
        case Outcome.PASSED:
            return Verdict.CONFORMS if claimed else Verdict.UNDERCLAIMED
        case Outcome.REFUSED:
            return Verdict.VIOLATION if claimed else Verdict.ABSENT
    # It failed. Unclaimed, that is what was said, unless a call was accepted that had to be refused.
    return Verdict.VIOLATION if claimed or REFUSABLE & set(needs) else Verdict.ABSENT


def settle_attempts(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict over several attempts: one failure among passes is UNSTABLE, never erased."""
    seen = list(dict.fromkeys(verdicts))
    if not seen:
        return Verdict.UNVERIFIED
    if len(seen) == 1:
        return seen[0]
    if Verdict.ERROR in seen:
        return Verdict.ERROR
    return Verdict.UNSTABLE if {Verdict.VIOLATION, Verdict.UNSTABLE} & set(seen) else Verdict.UNVERIFIED


@dataclass(frozen=True, slots=True)
class Judged:
    """A case, whether the target claims what it needs, and the verdict."""

    case: Case
    claimed: bool
    verdict: Verdict

    @property
    def binding(self) -> bool:
        """Whether the target must keep this promise: a MUST that needs nothing, or whose needs it claims."""
        return self.case.level.word == MUST.word and self.claimed


def obstacles(judged: Iterable[Judged]) -> list[Judged]:
    """Return what keeps a target from being conformant: binding cases that failed or were not verified."""
    return [
        each
        for each in judged
        if (each.binding and each.verdict in FAILURES)
        # A call that had to be refused and was not is a broken promise although nothing was claimed.
        or (each.case.level.word == MUST.word and each.verdict in (Verdict.VIOLATION, Verdict.ERROR, Verdict.UNSTABLE))
        or each.verdict is Verdict.STALE
    ]


def conformant(judged: Iterable[Judged]) -> bool:
    """Tell whether nothing stands in the way; a suite that judged no case has shown nothing."""
    found = list(judged)
    shown = any(each.binding and each.verdict is Verdict.CONFORMS for each in found)
    return shown and not obstacles(found)
