"""Knows who may hold a message when: one member at a time, within its bound, and again only for a cause."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import pairwise
from operator import itemgetter

from unistream.conformance.checkers.records import Group, Lending, Operation
from unistream.conformance.checkers.run import Run
from unistream.conformance.checkers.table import checker
from unistream.conformance.checkers.terms import Terms, Violation
from unistream.conformance.history import NANO


@checker("not-exclusive", "GRP-2")
def not_exclusive(run: Run, terms: Terms) -> Iterator[Violation]:
    """Inside a group, while leases are kept, a message is lent to at most one member at a time."""
    for group in run.groups.values():
        for msg, lendings in group.by_msg.items():
            if len(lendings) < 2 or group.seeks:
                continue
            holds: list[tuple[int, Lending]] = []
            for lending in lendings:
                held = [(end, each) for end, each in holds if lending.at < end - round(terms.resolution * NANO)]
                if len(held) > run.left_twice(lendings, lending, terms):
                    holder = max(held, key=itemgetter(0))[1]
                    yield Violation(
                        "GRP-2",
                        "not-exclusive",
                        (holder.index, lending.index),
                        f"{msg} was lent to {lending.member} while {holder.member} held it",
                    )
                holds = [*held, (run.hold_end(lending, terms), lending)]


@checker("inflight", "BPC-1")
def inflight(run: Run, terms: Terms) -> Iterator[Violation]:
    """A member never has more unsettled deliveries than its `max_in_flight`; an expired lease no longer counts."""
    for group in run.groups.values():
        held: dict[str, list[int]] = {}
        slack = round(terms.resolution * NANO)
        for lending in group.lendings:
            member = run.members.get(lending.member)
            if member is None or member.limit is None:
                continue
            ends = held.setdefault(member.name, [])
            while ends and ends[0] <= lending.at + slack:
                heapq.heappop(ends)
            heapq.heappush(ends, run.hold_end(lending, terms))
            if len(ends) > member.limit:
                yield Violation(
                    "BPC-1",
                    "inflight",
                    (lending.index,),
                    f"{member.name} holds {len(ends)} unsettled deliveries, its bound is {member.limit}",
                )


@checker("unjustified-redelivery", "DEL-9")
def unjustified_redelivery(run: Run, terms: Terms) -> Iterator[Violation]:
    """A message is lent again only for a cause."""
    for group in run.groups.values():
        for msg, lendings in group.by_msg.items():
            excused = 0
            for before, again in pairwise(lendings):
                if not _justified(run, terms, group, before, again.at):
                    if excused < run.left_twice(lendings, again, terms):
                        excused += 1  # the other one of two
                        continue
                    yield Violation(
                        "DEL-9",
                        "unjustified-redelivery",
                        (before.index, again.index),
                        f"{msg} was lent to {again.member} although {before.member} had "
                        f"{_what_it_did(before, again.at)} and nothing else had happened",
                    )


def _justified(run: Run, terms: Terms, group: Group, before: Lending, again: int) -> bool:
    slack = round(terms.resolution * NANO)
    settles = [call for call in before.settles if call.began <= again]
    if any(call.op == "nack" and call.outcome != "fail" for call in settles):
        return True
    if any(_unknown(run, terms, before, call) for call in settles):
        return True
    if before.expired is not None and before.expired <= again + slack:
        return True
    # A lease that ended counts only if nothing had been settled in it: otherwise the ack was in time.
    if before.until is not None and before.until <= again + slack and not _in_time(before, terms):
        return True
    member = run.members.get(before.member)
    if member is None or (member.gone is not None and member.gone <= again and not _in_time(before, terms)):
        return True
    if run.disturbed(before.member, before.at, again) or run.sought(before.where, before.at, again):
        return True
    return terms.rebalances and any(before.at <= change <= again for change in run.changes(group.where))


def _unknown(run: Run, terms: Terms, before: Lending, call: Operation) -> bool:
    """Tell whether nobody can say if the broker had the ack or reject: no answer, or lost with its member."""
    if call.op == "nack" or call.outcome == "fail":
        return False
    return call.outcome == "info" or run.held_from(before, call, terms) is None


def _in_time(lending: Lending, terms: Terms) -> bool:
    """Tell whether the lending was acked or rejected, answered, and well before its lease ended."""
    flush = round(terms.settle_flush * NANO)
    return any(
        call.op != "nack"
        and call.outcome == "ok"
        and call.done is not None
        and (lending.until is None or call.done + flush <= lending.until)
        for call in lending.settles
    )


def _what_it_did(lending: Lending, again: int) -> str:
    done = [call.op for call in lending.settles if call.began <= again]
    return f"answered with {done[0]}" if done else "it in hand, with lease left"


@checker("count", "DEL-4")
def count(run: Run, terms: Terms) -> Iterator[Violation]:
    """`attempt` starts at 1 in every group and, where exact, rises with every redelivery that spends an attempt."""
    for group in run.groups.values():
        for msg, lendings in group.by_msg.items():
            first = lendings[0]
            if first.attempt < 1:
                yield _count(first, f"attempt of {msg} is {first.attempt}; it starts at 1")
            elif first.attempt > 1 and not _lent_unseen(run, terms, group, first):
                yield _count(first, f"the first delivery of {msg} in its group says attempt {first.attempt}")
            for before, again in pairwise(lendings):
                if not terms.durable and run.broker_failed(before.at, again.at):
                    continue  # it may have forgotten a lending, or made two at once, which were seen in any order
                if run.left_twice(lendings, again, terms):
                    continue  # it may be the other one of two, which count for themselves
                if _spends(run, terms, before) and again.attempt <= before.attempt:
                    yield _count(again, f"attempt of {msg} went from {before.attempt} to {again.attempt}", before)
                elif terms.attempts_exact and again.attempt < before.attempt:
                    yield _count(again, f"attempt of {msg} fell from {before.attempt} to {again.attempt}", before)


def _count(lending: Lending, message: str, before: Lending | None = None) -> Violation:
    events = (lending.index,) if before is None else (before.index, lending.index)
    return Violation("DEL-4", "count", events, message)


def _spends(run: Run, terms: Terms, lending: Lending) -> bool:
    """Tell whether the way this lending ended surely spent an attempt that the backend surely counts."""
    nacked = any(call.op == "nack" and call.outcome == "ok" for call in lending.settles[:1])
    if terms.attempts_exact:
        return nacked and run.held_from(lending, lending.settles[0], terms) is not None
    member = run.members.get(lending.member)
    return nacked and member is not None and member.gone is None and not run.faults


def _lent_unseen(run: Run, terms: Terms, group: Group, first: Lending) -> bool:
    """
    Tell whether the message may have been lent before without reaching the application.

    It may have been prefetched by a member that went, that a fault cut off, or that kept it beyond its lease.
    """
    publish = run.publishes.get(first.msg or "")
    since = publish.call.began if publish else 0
    if any(member.gone is not None and since <= member.gone <= first.at for member in group.members):
        return True
    if terms.rebalances and any(since <= change <= first.at for change in run.changes(group.where)):
        return True
    # Until the broker has noticed, it goes on lending to a connection that is gone.
    unnoticed = round(terms.recover_within * NANO)
    if any(fault.ended + unnoticed >= since and fault.began <= first.at for fault in run.faults) or group.seeks:
        return True
    return first.at - since >= round(group.lease * NANO)
