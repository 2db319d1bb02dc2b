"""Knows the list of cases that an adapter is known to fail, and holds it to its word in both directions.

An excluded case runs all the same. It must fail: one that passes is STALE, and so the list shrinks. An entry of an
unknown case, or one whose date has passed, is an error, and nothing runs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from unistream.conformance.registry import Case
from unistream.conformance.runner import Result
from unistream.conformance.verdict import FAILURES, Verdict

REASONS = {
    "cannot": "the backend cannot",
    "wont": "it will not be offered",
    "bug": "a known defect",
    "env": "this environment does not allow it",
}


@dataclass(frozen=True, slots=True)
class Exclusion:
    """
    One entry.

    Attributes:
        case: Its id.
        reason: One of `REASONS`.
        issue: Where it is written down.
        expires: The last day on which the entry holds.
    """

    case: str
    reason: str
    issue: str
    expires: date


def load_exclusions(path: Path, cases: Iterable[Case], today: date) -> list[Exclusion]:
    """
    Return the entries of a TOML file: tables `[[exclude]]` with `case`, `reason`, `issue` and `expires`.

    Raises:
        ValueError: The file is no such list, or an entry is incomplete, names no case, or has expired.
    """
    known = {case.id for case in cases}
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if set(document) - {"exclude"}:
        raise ValueError(f"{path}: only tables [[exclude]] are known, not {', '.join(set(document) - {'exclude'})}")
    found = [_entry(path, table) for table in document.get("exclude", [])]
    wrong = [f"{each.case}: there is no such case" for each in found if each.case not in known]
    wrong += [f"{each.case}: expired on {each.expires}" for each in found if each.expires < today]
    if wrong:
        raise ValueError(f"{path}: " + "; ".join(wrong))
    return found


def _entry(path: Path, table: object) -> Exclusion:
    wanted = {"case": str, "reason": str, "issue": str, "expires": date}
    if not isinstance(table, dict) or set(table) != set(wanted):
        raise ValueError(f"{path}: each [[exclude]] has exactly {', '.join(wanted)}; one has {table}")
    for name, kind in wanted.items():
        if not isinstance(table[name], kind) or not table[name]:
            raise ValueError(f"{path}: {name} of {table['case']} must be a {kind.__name__}, not {table[name]!r}")
    if table["reason"] not in REASONS:
        raise ValueError(f"{path}: reason of {table['case']} must be one of {', '.join(REASONS)}")
    return Exclusion(**table)


def excuse(result: Result, entry: Exclusion) -> Result:
    """Return the result of an excluded case: EXCLUDED where it failed, STALE where it did not."""
    words = f"excluded ({REASONS[entry.reason]}, {entry.issue}, until {entry.expires})"
    if result.verdict in FAILURES:
        return replace(result, verdict=Verdict.EXCLUDED, reason=f"{words}: {result.reason}")
    return replace(
        result, verdict=Verdict.STALE, reason=f"{words}, and yet it is {result.verdict}: take it off the list"
    )
