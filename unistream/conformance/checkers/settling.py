"""Knows what a settle is worth: a held one ends the matter, a refusal needs a reason, a stranger's is void."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from unistream.conformance.checkers.records import Lending
from unistream.conformance.checkers.run import Run
from unistream.conformance.checkers.table import checker
from unistream.conformance.checkers.terms import Terms, Violation
from unistream.conformance.history import NANO

MISUSE = frozenset({"AlreadySettledError", "UnsupportedError", "ConfigError"})
"""Refusals that say nothing about the lease."""


@checker("redelivered-after-settle", "DEL-1", "DEL-3")
def redelivered_after_settle(run: Run, terms: Terms) -> Iterator[Violation]:
    """Once the broker holds an ack or a reject, the message is never lent to that group again."""
    for group in run.groups.values():
        for msg, lendings in group.by_msg.items():
            excused = 0
            for before, again in pairwise(lendings):
                held = _settled_from(run, terms, before)
                if held is None or again.at <= held or run.sought(group.where, before.at, again.at):
                    continue
                if not terms.durable and run.broker_failed(held, again.at):
                    continue
                if excused < run.left_twice(lendings, again, terms):
                    excused += 1  # the other one of two
                    continue
                call = before.settles[0]
                yield Violation(
                    "DEL-1" if call.op == "ack" else "DEL-3",
                    "redelivered-after-settle",
                    (before.index, call.done_index or call.index, again.index),
                    f"{msg} was lent to {again.member} {(again.at - held) / NANO:.3f} s after the broker "
                    f"held the {call.op} of {before.member}",
                )


def _settled_from(run: Run, terms: Terms, lending: Lending) -> int | None:
    """Return from when the lending's ack or reject surely stood, or None."""
    call = lending.settles[0] if lending.settles else None
    if call is None or call.op == "nack":
        return None
    late = lending.until is not None and lending.until <= call.began
    # Without fencing an ack after the lease may be taken for another member's loan.
    return None if late and not terms.fencing else run.held_from(lending, call, terms)


@checker("stale-settle-accepted", "DEL-7")
def stale_settle_accepted(run: Run, terms: Terms) -> Iterator[Violation]:
    """With fencing, a settle or an extend by a member that no longer holds the message is refused."""
    if not terms.fencing:
        return
    for group in run.groups.values():
        pairs = [pair for lendings in group.by_msg.values() for pair in pairwise(lendings)]
        # What a process slept through had been lent to it before all who had the message since then.
        pairs += [
            (slept, other)
            for slept in group.stale
            for other in group.by_msg.get(slept.msg or "", ())
            if other.at >= (slept.until or 0)
        ]
        for before, again in pairs:
            for call in (*before.settles, *before.extends):
                answered = call.op == "extend" or call.confirmed
                if answered and call.outcome == "ok" and call.index > again.index:
                    if any((earlier.done_index or call.index) < again.index for earlier in before.settles):
                        continue  # an idempotent second settle repeats what was held before
                    yield Violation(
                        "DEL-7",
                        "stale-settle-accepted",
                        (before.index, again.index, call.done_index or call.index),
                        f"{before.member} could {call.op} {before.msg} although it had been lent to {again.member}",
                    )


@checker("settle-refused-in-lease", "DEL-6", "DEL-7")
def settle_refused_in_lease(run: Run, terms: Terms) -> Iterator[Violation]:
    """A member whose lease has not ended can settle."""
    for group in run.groups.values():
        for lending in group.lendings:
            for call in (*lending.settles, *lending.extends):
                late = lending.refused and call is lending.settle
                if not late and (call.outcome != "fail" or call.error in MISUSE):
                    continue
                until = call.done or call.began
                if late:  # it was refused when it arrived; where partitions move, nobody can say when that was
                    until = run.ended if terms.rebalances else until + round(terms.settle_flush * NANO)
                if _had_cause_to_refuse(run, terms, lending, call.began, until):
                    continue
                yield Violation(
                    "DEL-7",
                    "settle-refused-in-lease",
                    (lending.index, call.done_index or call.index),
                    f"{lending.member} could not {call.op} {lending.msg} with lease left: {call.error or 'told later'}",
                )


def _had_cause_to_refuse(run: Run, terms: Terms, lending: Lending, began: int, done: int) -> bool:
    slack = round(terms.resolution * NANO)
    if lending.until is None or lending.until <= done + slack:
        return True
    if any(call.began < began and call.outcome != "fail" for call in lending.settles):
        return True
    member = run.members.get(lending.member)
    if member is None or (member.gone is not None and member.gone <= done):
        return True
    if run.disturbed(lending.member, lending.at, done) or run.sought(lending.where, lending.at, done):
        return True
    return terms.rebalances and any(lending.at <= change <= done for change in run.changes(lending.where))
