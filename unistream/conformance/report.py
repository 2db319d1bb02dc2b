"""Knows how results are told: as JSON, which is the canonical form, and as lines for a terminal."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from unistream.conformance.history import NANO, Event
from unistream.conformance.runner import Result
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict, conformant, obstacles

SCHEMA = 1
SIGNS = {
    Verdict.CONFORMS: "✔",
    Verdict.VIOLATION: "✘",
    Verdict.UNVERIFIED: "?",
    Verdict.UNDERCLAIMED: "+",
    Verdict.ABSENT: "-",
    Verdict.INAPPLICABLE: "/",
    Verdict.ERROR: "!",
    Verdict.UNSTABLE: "~",
}
SHOWN_EVENTS = 8
SHOWN_VIOLATIONS = 5


def suite_version() -> str:
    """Return the version of the distribution that the suite came with."""
    try:
        return version("unistream-mq")
    except PackageNotFoundError:
        return "unknown"


def as_json(results: Sequence[Result], target: Target, *, seed: int, seconds: float) -> dict[str, Any]:
    """Return the whole report as one JSON object; every other form is rendered from the same results."""
    judged = [result.judged for result in results]
    return {
        "schema": SCHEMA,
        "suite": suite_version(),
        "target": redacted(target.url),
        "virtual_clock": target.virtual,
        "seed": seed,
        "seconds": round(seconds, 1),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": {"python": platform.python_version(), "system": platform.system()},
        "conformant": conformant(judged),
        "obstacles": [each.case.id for each in obstacles(judged)],
        "counts": dict(Counter(str(result.verdict) for result in results)),
        "cases": [_case(result) for result in results],
    }


def _case(result: Result) -> dict[str, Any]:
    return {
        "id": result.case.id,
        "rules": list(result.case.rules),
        "level": result.case.level.word,
        "needs": {name: str(need) for name, need in result.case.level.needs.items()},
        "tier": str(result.case.tier),
        "promise": result.case.sentence,
        "claimed": result.claimed,
        "verdict": str(result.verdict),
        "rule": result.rule,
        "reason": result.reason,
        "expected": result.expected,
        "actual": result.actual,
        "seconds": round(result.seconds, 3),
        "happened": dict(result.counts),
        "violations": [
            {
                "rule": each.rule,
                "checker": each.checker,
                "message": each.message,
                "events": [result.history[index].to_json() for index in each.events[-SHOWN_EVENTS:]],
            }
            for each in result.violations[:SHOWN_VIOLATIONS]
        ],
    }


def redacted(url: str) -> str:
    """Return the URL without its password."""
    scheme, separator, rest = url.partition("://")
    login, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{login.partition(':')[0]}:***@{host}" if at and ":" in login else f"{url}"


def lines(results: Sequence[Result], target: Target, *, seed: int, seconds: float | None = None) -> Iterator[str]:
    """Yield the report for a terminal: a line for each group, the failures at length, and the verdict."""
    groups: Mapping[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.case.group].append(result)
    seconds = sum(result.seconds for result in results) if seconds is None else seconds
    clock = "virtual clock" if target.virtual else "real time"
    yield f"{redacted(target.url)} · suite {suite_version()} · seed {seed} · {clock} · {seconds:.1f} s"
    for group, members in groups.items():
        counts = Counter(result.verdict for result in members)
        yield f" {group:<5}" + "".join(f" {counts[each]:>3} {SIGNS[each]}" for each in Verdict if counts[each])
        for result in members:
            if result.verdict is not Verdict.CONFORMS:
                yield from _failure(result, target)
    judged = [result.judged for result in results]
    totals = Counter(str(result.verdict) for result in results)
    yield " · ".join(f"{number} {name}" for name, number in sorted(totals.items()))
    yield "CONFORMANT" if conformant(judged) else f"NOT CONFORMANT: {', '.join(j.case.id for j in obstacles(judged))}"


def _failure(result: Result, target: Target) -> Iterator[str]:
    case = result.case
    yield f"  {SIGNS[result.verdict]} {case.id}  {result.verdict}  {case.level}  [{', '.join(case.rules)}]"
    if result.verdict in (Verdict.INAPPLICABLE, Verdict.ABSENT, Verdict.UNDERCLAIMED):
        yield f"      {result.reason or case.sentence}"
        return
    yield f"      {case.sentence}"
    if result.expected:
        yield f"      {result.rule} expected: {result.expected}"
        yield f"      {' ' * len(result.rule)}   actual: {result.actual}"
    elif result.reason:
        yield f"      {result.reason}"
    for violation in result.violations[:SHOWN_VIOLATIONS]:
        yield f"      {violation}"
        yield f"        {' | '.join(timeline(result, violation.events))}"
    yield f"      again: unistream conform {redacted(target.url)} --only {case.id} --seed {result.seed}"


def timeline(result: Result, indices: Iterable[int]) -> list[str]:
    """Return events in a few words each, their times counted from the first event of the run."""
    history = result.history
    start = history[0].at if len(history) else 0
    return [_words(history[index], start) for index in list(indices)[-SHOWN_EVENTS:]]


def _words(event: Event, start: int) -> str:
    parts = [f"+{(event.at - start) / NANO:.3f}", event.member or event.proc, event.op, event.msg or event.group or ""]
    if event.phase != "event":
        parts.append(f"→ {event.phase}" if event.phase != "invoke" else "…")
    if event.attempt is not None:
        parts.append(f"attempt {event.attempt}")
    if event.until is not None:
        parts.append(f"lease until +{(event.until - start) / NANO:.3f}")
    if event.error:
        parts.append(event.error)
    return " ".join(part for part in parts if part)
