"""Knows whether a run did anything: a run in which nothing could have gone wrong proves nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from unistream.conformance.checkers.run import Run
from unistream.conformance.checkers.table import checker
from unistream.conformance.checkers.terms import Terms, Violation

VACUOUS = "sometimes"
"""The checker whose findings make a verdict UNVERIFIED instead of VIOLATION."""


def counters(run: Run) -> dict[str, int]:
    """
    Return how often each kind of thing happened in the run; what never happened is missing.

    `published confirmed unpublished unknown delivered redelivered acked nacked rejected extended refused expired died
    left faults under-fault drained`, and what the case tallied itself.
    """
    found: Counter[str] = Counter(run.tallies)
    names = {"ok": "confirmed", "fail": "unpublished", "info": "unknown"}
    for publish in run.publishes.values():
        found["published"] += 1
        found[names[publish.call.outcome]] += 1
        done = run.ended if publish.call.done is None else publish.call.done
        if any(fault.began <= done and fault.ended >= publish.call.began for fault in run.faults):
            found["under-fault"] += 1
    settled = {"ack": "acked", "nack": "nacked", "reject": "rejected", "extend": "extended"}
    for group in run.groups.values():
        found["drained"] += group.drained == "ok"
        for lendings in group.by_msg.values():
            found["delivered"] += len(lendings)
            found["redelivered"] += sum(1 for _ in pairwise(lendings))
        for lending in group.lendings:
            found["expired"] += lending.expired is not None
            for call in (*lending.settles, *lending.extends):
                found["refused" if call.outcome == "fail" else settled[call.op]] += 1
    for member in run.members.values():
        found["died"] += member.died is not None
        found["left"] += member.left is not None
    found["faults"] = len(run.faults)
    return {name: number for name, number in found.items() if number}


@checker(VACUOUS, "PUB-1")
def sometimes(run: Run, terms: Terms) -> Iterator[Violation]:
    """What the case is about must have happened at least once."""
    seen = counters(run)
    for name in terms.sometimes:
        if not seen.get(name):
            yield Violation("PUB-1", VACUOUS, (), f"nothing was {name}: the run shows nothing")
