"""Knows how a report is told on a terminal: a line for each group, the failures at length, and the verdict."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from unistream.conformance.verdict import Verdict

SIGNS = {
    Verdict.CONFORMS: "✔",
    Verdict.VIOLATION: "✘",
    Verdict.UNVERIFIED: "unverified",
    Verdict.UNDERCLAIMED: "underclaimed",
    Verdict.ABSENT: "absent",
    Verdict.INAPPLICABLE: "inapplicable",
    Verdict.ERROR: "error",
    Verdict.UNSTABLE: "unstable",
    Verdict.BLOCKED: "blocked",
    Verdict.EXCLUDED: "excluded",
    Verdict.STALE: "stale",
}
SHORT = frozenset({Verdict.INAPPLICABLE, Verdict.ABSENT, Verdict.UNDERCLAIMED, Verdict.BLOCKED})
"""Verdicts that one line explains."""

Report = Mapping[str, Any]


def lines(report: Report) -> Iterator[str]:
    """Yield the lines of a report."""
    clock = "virtual clock" if report["virtual_clock"] else f"{report['jobs']} at once"
    parts = (
        f"{report['target']} {report['product']}".rstrip(),
        f"suite {report['suite']}",
        f"seed {report['seed']}",
        clock,
        duration(report["seconds"]),
    )
    yield " · ".join(parts)
    groups: dict[str, list[Report]] = defaultdict(list)
    for case in report["cases"]:
        groups[case["id"].partition(".")[0]].append(case)
    for group, members in groups.items():
        counts = Counter(Verdict(case["verdict"]) for case in members)
        yield f" {group:<6}" + "".join(f" {counts[each]:>3} {SIGNS[each]}" for each in Verdict if counts[each])
        for case in members:
            if case["verdict"] != Verdict.CONFORMS:
                yield from _told(case, report["target"])
    yield from headline(report)


def headline(report: Report) -> Iterator[str]:
    """Yield the last lines: how many of each tier, what was left behind, and the verdict."""
    if report["leftovers"]:
        yield f" left behind on the broker: {', '.join(report['leftovers'])}"
        yield f" remove it: unistream conform cleanup {report['target']} --prefix us-"
    tiers = []
    for name, tier in report["tiers"].items():
        unverified = f" ({tier['unverified']} unverified)" if tier["unverified"] else ""
        tiers.append(f"{name.upper()} {tier['kept']}/{tier['asked']}{unverified}")
    if report["conformant"]:
        word = "CONFORMANT"
    elif report["conformant_except"]:
        word = f"CONFORMANT EXCEPT {', '.join(report['conformant_except'])}"
    else:
        word = f"NOT CONFORMANT: {', '.join(report['obstacles']) or 'nothing was shown'}"
    yield " " + "   ".join([*tiers, word])


def duration(seconds: float) -> str:
    """Return a time in words: 41 s, 2 m 11 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} m {int(seconds % 60):02} s"


def level(case: Report) -> str:
    """Return how binding a case is, and how what it needs is claimed."""
    if not case["needs"]:
        return str(case["level"])
    needs = ", ".join(name if need == "True" else f"{name}={need}" for name, need in case["needs"].items())
    return f"{case['level']} if {needs} (claimed: {case['support'] if case['claimed'] else 'none'})"


def _told(case: Report, target: str) -> Iterator[str]:
    verdict = Verdict(case["verdict"])
    yield f"  {SIGNS[verdict]} {case['id']}  {level(case)}  [{', '.join(case['rules'])}]"
    if verdict in SHORT:
        yield f"     {case['reason'] or case['promise']}"
        return
    yield f"     {case['promise']}"
    if case["expected"]:
        yield f"     {case['rule']}  Expected: {case['expected']}     Actual: {case['actual']}"
    elif not case["violations"]:
        yield f"     {case['reason']}"
    for violation in case["violations"]:
        yield f"     {violation['rule']}  {violation['message']}  ({violation['checker']})"
        if violation["events"]:
            yield f"      {' | '.join(map(words, violation['events']))}   ← here"
    yield f"     replay: unistream conform {target} --only {case['id']} --seed {case['seed']}"


def words(event: Report) -> str:
    """Return an event in a few words."""
    parts = [f"+{event['at']:.3f}", event["who"], event["op"], event.get("msg") or event.get("group") or ""]
    if event["phase"] != "event":
        parts.append("…" if event["phase"] == "invoke" else f"→ {event['phase']}")
    if "attempt" in event:
        parts.append(f"attempt {event['attempt']}")
    if "until" in event:
        parts.append(f"lease until +{event['until']:.3f}")
    if "error" in event:
        parts.append(event["error"])
    return " ".join(part for part in parts if part)
