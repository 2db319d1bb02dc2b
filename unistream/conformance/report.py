"""Knows the canonical form of a report: one JSON object, from which every other form is rendered."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from unistream.conformance.checkers import Violation
from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.history import NANO, Event
from unistream.conformance.housekeeping import Identity
from unistream.conformance.redaction import redacted, scrub
from unistream.conformance.registry import Tier
from unistream.conformance.runner import Result
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict, conformant, obstacles

SCHEMA = 1
SHOWN_EVENTS = 8
SHOWN_VIOLATIONS = 5
TIMELINE_EVENTS = 240
"""So many events of a failed case are in the report; the history file has them all."""
TOLD = frozenset({Verdict.VIOLATION, Verdict.UNSTABLE, Verdict.ERROR, Verdict.UNVERIFIED, Verdict.EXCLUDED})
"""Verdicts whose evidence is in the report."""
DULL = frozenset({"renew", "idle"})


def suite_version() -> str:
    """Return the version of the distribution that the suite came with."""
    try:
        return version("unistream-mq")
    except PackageNotFoundError:
        return "unknown"


def as_json(
    results: Sequence[Result],
    target: Target,
    *,
    seed: int,
    seconds: float | None = None,
    identity: Identity | None = None,
    left: Sequence[str] = (),
    profile: str = "",
    jobs: int = 1,
) -> dict[str, Any]:
    """
    Return the whole report as one JSON object, without any secret of the target's URL.

    Args:
        results: In the order in which they shall be told.
        target: What was judged.
        seed: Of the run.
        seconds: How long the run took; the sum of the cases when left out.
        identity: What the target says of itself.
        left: Topics that were left behind.
        profile: Which tiers were asked for.
        jobs: How many cases ran at once.
    """
    judged = [result.judged for result in results]
    standing = obstacles(judged)
    whole = {
        "schema": SCHEMA,
        "suite": suite_version(),
        "target": redacted(target.url),
        "product": identity.product if identity else "",
        "driver": identity.driver if identity else "",
        "claims": identity.claims if identity else {},
        "profile": profile,
        "virtual_clock": target.virtual,
        "seed": seed,
        "jobs": jobs,
        "seconds": round(sum(each.seconds for each in results) if seconds is None else seconds, 1),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": {"python": platform.python_version(), "system": platform.system(), "cores": os.cpu_count()},
        "conformant": conformant(judged),
        "conformant_except": _excused(results),
        "obstacles": [each.case.id for each in standing],
        "counts": dict(Counter(str(result.verdict) for result in results)),
        "tiers": {str(tier): _tier(results, tier) for tier in Tier if any(r.case.tier is tier for r in results)},
        "leftovers": list(left),
        "cases": [_case(result) for result in results],
    }
    cleaned: dict[str, Any] = scrub(whole, target.url)
    return cleaned


def _excused(results: Sequence[Result]) -> list[str]:
    """Return the excluded cases if nothing else stands in the way, else nothing."""
    judged = [result.judged for result in results]
    standing = obstacles(judged)
    only = all(each.verdict is Verdict.EXCLUDED for each in standing)
    shown = any(each.binding and each.verdict is Verdict.CONFORMS for each in judged)
    return [each.case.id for each in standing] if shown and only else []


def _tier(results: Sequence[Result], tier: Tier) -> dict[str, int]:
    members = [result.verdict for result in results if result.case.tier is tier]
    nobody = (Verdict.ABSENT, Verdict.INAPPLICABLE)
    return {
        "kept": members.count(Verdict.CONFORMS) + members.count(Verdict.UNDERCLAIMED),
        "asked": sum(each not in nobody for each in members),
        "unverified": members.count(Verdict.UNVERIFIED) + members.count(Verdict.BLOCKED),
    }


def _case(result: Result) -> dict[str, Any]:
    told = result.verdict in TOLD
    return {
        "id": result.case.id,
        "rule": result.rule,
        "rules": list(result.case.rules),
        "level": result.case.level.word,
        "needs": {name: str(need) for name, need in result.case.level.needs.items()},
        "tier": str(result.case.tier),
        "promise": result.case.sentence,
        "claimed": result.claimed,
        "support": result.support,
        "verdict": str(result.verdict),
        "reason": result.reason,
        "expected": result.expected,
        "actual": result.actual,
        "seed": result.seed,
        "attempts": [str(each) for each in result.attempts],
        "seconds": round(result.seconds, 3),
        "happened": dict(result.counts),
        "violations": [
            {
                "rule": each.rule,
                "checker": each.checker,
                "message": each.message,
                "events": [_event(result, index) for index in each.events[-SHOWN_EVENTS:]],
            }
            for each in _shown(result)
        ],
        "timeline": _timeline(result) if told else [],
        "lasted": _lasted(result),
    }


def _shown(result: Result) -> list[Violation]:
    """Return the violations to tell; that a run ended before it had shown all is no news where it failed."""
    telling = [each for each in result.violations if each.checker != VACUOUS or result.verdict is Verdict.UNVERIFIED]
    return telling[:SHOWN_VIOLATIONS]


def _lasted(result: Result) -> float:
    """Return the time from the first event of the history to the last, in seconds."""
    history = result.history
    return round((history[len(history) - 1].at - history[0].at) / NANO, 4) if len(history) else 0.0


def _timeline(result: Result) -> list[dict[str, Any]]:
    """Return the events that tell the story of a failure: around what the checkers point at, or the last ones."""
    marked = {index for each in _shown(result) for index in each.events}
    telling = [index for index, event in enumerate(result.history) if event.op not in DULL and event.phase != "invoke"]
    # An operation that never came back is told by its invocation.
    telling += [index for index, event in enumerate(result.history) if event.phase == "invoke" and index in marked]
    telling = sorted({*telling, *marked})
    if len(telling) > TIMELINE_EVENTS:
        last = max(marked, default=telling[-1])
        end = min(len(telling), sum(index <= last for index in telling) + TIMELINE_EVENTS // 10)
        telling = sorted({*telling[max(0, end - TIMELINE_EVENTS) : end], *marked})
    return [{**_event(result, index), **({"marked": True} if index in marked else {})} for index in telling]


def _event(result: Result, index: int) -> dict[str, Any]:
    """Return one event with its times in seconds from the first event of the run."""
    history = result.history
    start = history[0].at
    event: Event = history[index]
    told = {
        "at": round((event.at - start) / NANO, 4),
        "who": event.member or ("everybody" if event.op == "fault" else event.proc),
        "op": event.op,
        "phase": event.phase,
        "msg": event.msg,
        "group": event.group,
        "attempt": event.attempt,
        "until": None if event.until is None else round((event.until - start) / NANO, 4),
        "since": None if event.since is None else round((event.since - start) / NANO, 4),
        "error": event.error,
        "note": event.note,
        "delay": event.delay,
    }
    return {name: value for name, value in told.items() if value is not None}
