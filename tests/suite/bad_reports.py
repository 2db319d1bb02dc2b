"""Reports of targets that break promises, for the tests of what is made of reports."""

from __future__ import annotations

from functools import cache
from typing import Any

from unistream.conformance.housekeeping import preflight
from unistream.conformance.kill import harm
from unistream.conformance.registry import load_cases
from unistream.conformance.report import as_json
from unistream.conformance.rounds import in_order, run_cases
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target

SOME = ("ord.per-key", "ord.m3-m4-crash", "nack.delay", "red.max-attempts", "err.redacted", "sim.keyed", "sim.queue")


@cache
def report_of(saboteur: str | None = None) -> dict[str, Any]:
    """Return the report of some cases on the reference broker, with a saboteur at work in it."""
    target = Target.of("memory://reports")
    cases = load_cases().select(only=SOME)
    identity = preflight(target)
    if saboteur is None:
        results = list(run_cases(cases, target, seed=5))
    else:
        with harm(load_saboteurs()[saboteur], target) as harmed:
            results = list(run_cases(cases, harmed, seed=5))
    return as_json(in_order(results, cases), target, seed=5, identity=identity, profile="core")
