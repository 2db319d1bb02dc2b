"""Knows in which order, how often and how many at once cases are run; what each is worth is the runner's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from unistream.conformance.exclusions import Exclusion, excuse
from unistream.conformance.registry import Case
from unistream.conformance.runner import Result, run_case
from unistream.conformance.target import Target
from unistream.conformance.verdict import FAILURES, Outcome, Verdict, settle_attempts

JOBS = 8
"""So many cases at once on a real broker: they mostly wait, so two cores carry them without haste."""

FOUNDATIONS = ("pub.confirm-means-stored", "con.all-and-only")
"""What every case that publishes builds on: where one of them fails, the others would only repeat it."""

INDEPENDENT = frozenset({"cap", "cfg", "err", "top"})
"""Groups of cases that show something even where nothing can be published."""


def run_cases(
    cases: Iterable[Case],
    target: Target,
    *,
    seed: int = 0,
    jobs: int = 1,
    rounds: int = 1,
    exclusions: Iterable[Exclusion] = (),
) -> Iterator[Result]:
    """
    Run cases and yield their results as they come: the foundations first, what must be alone last.

    The others run in their order, and on a real broker those that may take longest before the rest.

    Args:
        cases: What to run.
        target: The same for all; no two cases share a topic.
        seed: The same for all.
        jobs: So many at once, each with an event loop and a thread of its own. Most of a case on a real broker is
            waiting. On a virtual clock nothing waits, and cases follow one another.
        rounds: How often each is run. One that passes in one round and fails in another is UNSTABLE.
        exclusions: Cases that are known to fail. They run all the same.
    """
    excluded = {each.case: each for each in exclusions}

    def judge(case: Case) -> Result:
        result = run_rounds(case, target, seed=seed, rounds=rounds)
        return excuse(result, excluded[case.id]) if case.id in excluded else result

    first, beside, alone = _ordered(cases)
    failed = []
    for case in first:
        result = judge(case)
        if result.verdict in FAILURES:
            failed.append(case.id)
        yield result
    if failed:
        blocked = [case for case in (*beside, *alone) if case.group not in INDEPENDENT]
        yield from (_blocked(case, failed[0], seed) for case in blocked)
        beside = [case for case in (*beside, *alone) if case.group in INDEPENDENT]
        alone = []
    if jobs > 1 and not target.virtual:
        with ThreadPoolExecutor(jobs, thread_name_prefix="conformance") as pool:
            running = [pool.submit(judge, case) for case in sorted(beside, key=lambda case: -case.limit)]
            yield from (done.result() for done in as_completed(running))
    else:
        yield from map(judge, beside)
    yield from map(judge, alone)


def run_rounds(case: Case, target: Target, *, seed: int = 0, rounds: int = 1) -> Result:
    """Run a case `rounds` times; the evidence returned is that of the first attempt that failed, never erased."""
    results = [run_case(case, target, seed=seed) for _ in range(rounds)]
    attempts = [result.verdict for result in results]
    shown = next((each for each in results if each.verdict is not Verdict.CONFORMS), results[0])
    settled = settle_attempts(attempts)
    passes = sum(each in (Verdict.CONFORMS, Verdict.UNDERCLAIMED) for each in attempts)
    reason = f"passed {passes} of {rounds} attempts; a failure: {shown.reason}"
    return replace(
        shown,
        verdict=settled,
        attempts=attempts if rounds > 1 else [],
        reason=reason if settled is Verdict.UNSTABLE else shown.reason,
        seconds=sum(each.seconds for each in results),
    )


def _ordered(cases: Iterable[Case]) -> tuple[list[Case], list[Case], list[Case]]:
    chosen = list(cases)
    first = [case for case in chosen if case.id in FOUNDATIONS]
    rest = [case for case in chosen if case.id not in FOUNDATIONS]
    return first, [case for case in rest if not _solitary(case)], [case for case in rest if _solitary(case)]


def _solitary(case: Case) -> bool:
    """Tell whether nothing may run beside a case: it measures the process, or strikes the broker of all others."""
    return case.alone or any(need.startswith("hook:") for need in case.facilities)


def _blocked(case: Case, by: str, seed: int) -> Result:
    reason = f"not run, because {by} failed"
    return Result(case, True, Outcome.NOT_RUN, Verdict.BLOCKED, seed, reason, case.rules[0])


def in_order(results: Iterable[Result], cases: Sequence[Case]) -> list[Result]:
    """Return the results in the order of the cases, for a report."""
    place = {case.id: index for index, case in enumerate(cases)}
    return sorted(results, key=lambda result: place[result.case.id])
