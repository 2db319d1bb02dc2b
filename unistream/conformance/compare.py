"""Knows what changed between two reports, such as before and after an upgrade of the broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unistream.conformance.report import SCHEMA
from unistream.conformance.terminal import Report
from unistream.conformance.verdict import FAILURES

WORSE, BETTER, OTHER, NEW, GONE = "worse", "better", "other", "new", "gone"


def compare(before: Report, after: Report) -> list[dict[str, str]]:
    """
    Return the cases whose verdict changed, worst first: `case`, `before`, `after` and `change`.

    A case that only one report has is `new` or `gone`; so a run of fewer cases never looks like a better one.
    """
    old = {case["id"]: case["verdict"] for case in before["cases"]}
    new = {case["id"]: case["verdict"] for case in after["cases"]}
    rows = [
        {"case": name, "before": old.get(name, ""), "after": new.get(name, ""), "change": _change(name, old, new)}
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    order = (WORSE, GONE, OTHER, NEW, BETTER)
    return sorted(rows, key=lambda row: order.index(row["change"]))


def _change(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    if name not in old:
        return WORSE if new[name] in FAILURES else NEW
    if name not in new:
        return GONE
    failed, fails = old[name] in FAILURES, new[name] in FAILURES
    if failed == fails:
        return OTHER
    return WORSE if fails else BETTER


def is_worse(rows: list[dict[str, str]]) -> bool:
    """Tell whether something was lost: a case fails that did not, or is not run any more."""
    return any(row["change"] in (WORSE, GONE) for row in rows)


def told(before: Report, after: Report) -> Iterator[str]:
    """Yield the lines of a comparison."""
    for name, report in (("before", before), ("after", after)):
        word = "conformant" if report["conformant"] else "not conformant"
        what = f"{report['target']} {report['product']}"
        yield f"{name:<7} {what} · {report['at']} · {len(report['cases'])} cases · {word}"
    claims = [
        f"  claim {name}: {before['claims'].get(name, '-')} → {after['claims'].get(name, '-')}"
        for name in dict.fromkeys([*before["claims"], *after["claims"]])
        if before["claims"].get(name) != after["claims"].get(name)
    ]
    yield from claims
    rows = compare(before, after)
    for row in rows:
        yield f"  {row['change']:<6} {row['case']}: {row['before'] or 'not run'} → {row['after'] or 'not run'}"
    if not rows and not claims:
        yield "no difference"


def checked(report: object, name: str) -> Report:
    """
    Return a report that was read from a file.

    Raises:
        ValueError: It is not one, or of another schema.
    """
    if not isinstance(report, dict) or "schema" not in report or "cases" not in report:
        raise ValueError(f"{name} is no report of the suite")
    if report["schema"] != SCHEMA:
        raise ValueError(f"{name} has schema {report['schema']}, this suite reads {SCHEMA}")
    return report
