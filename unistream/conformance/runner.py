"""Knows how to run cases on a target, judge what they left behind, and give each its verdict."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from unistream.capabilities import Capabilities
from unistream.conformance import clock
from unistream.conformance.checkers import Run, Terms, Violation, counters, judge
from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.history import History
from unistream.conformance.registry import Case
from unistream.conformance.target import Target
from unistream.conformance.trial import CheckError, ImpossibleError, Trial, VacuousError
from unistream.conformance.verdict import Judged, Outcome, Verdict, verdict
from unistream.errors import UnistreamError, UnsupportedError

T = TypeVar("T")

RECOVERIES = 4
"""How often a case may wait for what the backend declares to take for recovery, beyond the case's own limit."""
CLEANUP_SECONDS = 60.0
"""What closing and deleting may take beyond a case's own limit."""

_log = logging.getLogger("unistream.conformance")


@dataclass(slots=True)
class Result:
    """
    What came of one case.

    Attributes:
        reason: Why, in words; empty for a pass.
        rule: The rule that was broken, or the case's first one.
        expected: What the rule demands, where a check of the case failed.
        actual: What was seen instead.
        violations: What the checkers found in the history.
        counts: How often each kind of thing happened.
        history: Everything that was recorded.
        terms: What the history was judged by.
        run: Name of the run, which the names of its topics begin with: `us-<run>-`.
        support: How what the case needs is claimed: `native`, `emulated` or `none`.
        attempts: The verdict of every attempt, where there were several.
    """

    case: Case
    claimed: bool
    outcome: Outcome
    verdict: Verdict
    seed: int
    reason: str = ""
    rule: str = ""
    expected: str = ""
    actual: str = ""
    violations: list[Violation] = field(default_factory=list)
    counts: Mapping[str, int] = field(default_factory=dict)
    history: History = field(default_factory=History)
    terms: Terms = field(default_factory=Terms)
    seconds: float = 0.0
    run: str = ""
    support: str = "native"
    attempts: list[Verdict] = field(default_factory=list)

    @property
    def judged(self) -> Judged:
        """The part that conformance is computed from."""
        return Judged(self.case, self.claimed, self.verdict)

    def __str__(self) -> str:
        return f"{self.verdict} {self.case.id}" + (f": {self.reason}" if self.reason else "")


def on_loop(target: Target, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` on the kind of loop that the target needs."""
    return clock.run(main()) if target.virtual else asyncio.run(main())


def claimed(case: Case, claims: Capabilities) -> bool:
    """Tell whether the target offers everything that the case needs."""
    offered = dict(claims)
    return all(offered[name].satisfies(need) for name, need in case.level.needs.items())


def run_case(case: Case, target: Target, *, seed: int = 0) -> Result:
    """Run one case once, on a loop of its own, and return its verdict with the evidence."""
    began = time.perf_counter()
    missing = sorted(name for name in case.facilities if name in target.lacks)
    if missing:
        return _result(case, True, Outcome.CANNOT_EXIST, seed, reason=target.lacks[missing[0]])
    hooks = sorted(name for name in case.facilities if name.startswith("hook:") and name[5:] not in target.hooks)
    if hooks:
        return _result(case, True, Outcome.NOT_RUN, seed, reason=f"no {hooks[0]} was given")
    target = target.fresh()
    attempt = _Attempt(case, replace(target, virtual=False) if case.alone else target, seed)
    try:
        on_loop(attempt.target, attempt.run)
    except clock.StuckError as error:
        attempt.fail(f"it hangs: {error}")
    except asyncio.CancelledError:
        # A wait that swallowed the limit's cancellation, and was cancelled once more when the loop was closed.
        attempt.fail("it did not end when it was cancelled")
    except Exception:
        # A defect of the suite or of its surroundings: the verdict is ERROR, with the traceback as the reason.
        attempt.broken(traceback.format_exc())
    finally:
        target.forget()
    result = attempt.result()
    result.seconds = time.perf_counter() - began
    return result


def support_of(case: Case, claims: Capabilities) -> str:
    """Return the weakest level at which what the case needs is claimed; `native` where it needs nothing."""
    offered = dict(claims)
    levels = [str(offered[name].level) for name in case.level.needs]
    return next((level for level in ("none", "emulated") if level in levels), "native")


class _Attempt:
    """One run of one case, from connecting to the verdict."""

    def __init__(self, case: Case, target: Target, seed: int) -> None:
        self.case = case
        self.target = target
        self.seed = seed
        self.claimed = True
        self.missing: list[str] = []
        self.support = "native"
        self.outcome = Outcome.PASSED
        self.reason = self.expected = self.actual = ""
        self.rule = case.rules[0]
        self.trial: Trial | None = None

    async def run(self) -> None:
        """Run the body within its limit; whatever it raises becomes the outcome."""
        try:
            async with asyncio.timeout(self.case.limit + CLEANUP_SECONDS) as whole:
                await self._open_and_run(whole)
        except TimeoutError:
            self.fail(f"closing did not end within {CLEANUP_SECONDS} s")
        except UnistreamError as error:
            self.fail(f"{type(error).__name__}: {error}")
        except BaseExceptionGroup as group:
            self.fail("; ".join(f"{type(error).__name__}: {error}" for error in group.exceptions))

    async def _open_and_run(self, whole: asyncio.Timeout) -> None:
        name = self.case.id.replace(".", "-")
        trial = self.trial = Trial(
            self.target, name, seed=self.seed, run=f"{self.seed:08x}" if self.target.virtual else None
        )
        async with trial:
            self.claimed = claimed(self.case, trial.claims)
            # A capability that is offered, only not as the case needs it, has nothing to refuse.
            self.missing = [name for name in self.case.level.needs if not dict(trial.claims)[name]]
            self.support = support_of(self.case, trial.claims)
            # Cases are written for quick recovery; a backend that declares a slow one is not cut off while it waits.
            limit = self.case.limit + RECOVERIES * trial.recovery
            whole.reschedule(asyncio.get_running_loop().time() + limit + CLEANUP_SECONDS)
            try:
                async with asyncio.timeout(limit):
                    await self.case.body(trial)
            except CheckError as error:
                self.rule, self.expected, self.actual = error.rule, error.expected, error.actual
                self.fail(str(error))
            except VacuousError as error:
                self._end(Outcome.NOT_RUN, str(error))
            except ImpossibleError as error:
                self._end(Outcome.CANNOT_EXIST, str(error))
            except UnsupportedError as error:
                self._end(Outcome.FAILED if self.claimed else Outcome.REFUSED, f"{type(error).__name__}: {error}")
            except TimeoutError:
                self.fail(f"it did not end within {limit:.0f} s")

    def fail(self, reason: str) -> None:
        """Let the first failure stand."""
        self._end(Outcome.FAILED, reason)

    def broken(self, reason: str) -> None:
        """Let a defect of the suite outdo everything."""
        self.outcome, self.reason = Outcome.BROKEN, reason

    def _end(self, outcome: Outcome, reason: str) -> None:
        if self.outcome is Outcome.PASSED:
            self.outcome, self.reason = outcome, reason

    def result(self) -> Result:
        """Judge the history and return the whole."""
        if self.trial is None:
            return _result(self.case, self.claimed, self.outcome, self.seed, self.missing, reason=self.reason)
        history = self.trial.recorder.history()
        found: list[Violation] = []
        terms = replace(self.trial.terms, sometimes=self.case.sometimes)
        try:
            found = judge(history, terms)
            counts = counters(Run(history))
        except Exception:  # a checker that fails judges nobody: ERROR, with the traceback
            self.broken(traceback.format_exc())
            counts = {}
        broken_rules = [violation for violation in found if violation.checker != VACUOUS]
        if broken_rules and self.outcome in (Outcome.PASSED, Outcome.NOT_RUN):
            self.outcome, self.reason, self.rule = Outcome.FAILED, str(broken_rules[0]), broken_rules[0].rule
        elif found and self.outcome is Outcome.PASSED:
            self.outcome, self.reason = Outcome.NOT_RUN, found[0].message
        return replace(
            _result(self.case, self.claimed, self.outcome, self.seed, self.missing, reason=self.reason),
            rule=self.rule,
            expected=self.expected,
            actual=self.actual,
            violations=found,
            counts=counts,
            history=history,
            terms=terms,
            run=self.trial.run,
            support=self.support,
        )


def _result(
    case: Case, claims: bool, outcome: Outcome, seed: int, missing: Iterable[str] = (), *, reason: str
) -> Result:
    judged = verdict(claimed=claims, outcome=outcome, needs=missing)
    return Result(case, claims, outcome, judged, seed, reason, case.rules[0])
