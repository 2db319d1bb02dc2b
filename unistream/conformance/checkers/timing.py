"""Knows when things must happen: no delay cut short, and nobody left waiting beside a message that is due."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from unistream.conformance.checkers.publishing import promised
from unistream.conformance.checkers.records import Group, Lending, Member
from unistream.conformance.checkers.run import Run
from unistream.conformance.checkers.table import checker
from unistream.conformance.checkers.terms import Terms, Violation
from unistream.conformance.history import NANO

HAND_OVER_SECONDS = 5.0
"""A member that leaves properly hands over within this time, and what goes to one that joins is there (GRP-4)."""
GAP = 5_000_000
"""Two waits of a member closer than this (5 ms) are one: it only went round its loop."""
SERVICE = 10_000_000
"""What a delivery may take of the wait of others (10 ms): whoever is handed a backlog waits for none of it in vain."""


@checker("delay-early", "DEL-2")
def delay_early(run: Run, terms: Terms) -> Iterator[Violation]:
    """A nacked message is never lent again before its delay, which starts when the broker has the nack."""
    slack = round(terms.resolution * NANO)
    for group in run.groups.values():
        for msg, lendings in group.by_msg.items():
            for before, again in pairwise(lendings):
                call = before.settle
                if call is None or call.op != "nack" or not call.delay:
                    continue
                if run.held_from(before, call, terms) is None or run.sought(group.where, before.at, again.at):
                    continue
                if _kept_to_the_end(run, terms, before.member, call.began):
                    continue
                # The broker cannot have had the nack before it was asked for.
                due = call.began + round(call.delay * NANO)
                if again.at < due - slack:
                    yield Violation(
                        "DEL-2",
                        "delay-early",
                        (before.index, call.index, again.index),
                        f"{msg} was nacked for {call.delay} s and came back "
                        f"after {(again.at - call.began) / NANO:.3f} s",
                    )


def _kept_to_the_end(run: Run, terms: Terms, name: str, since: int) -> bool:
    """Tell whether the member may have kept what it nacked itself, and died or was cut off with it."""
    until = since + round(terms.nack_kept_for * NANO)
    if until == since:
        return False
    member = run.members.get(name)
    died = None if member is None else member.died
    return (died is not None and since <= died <= until) or run.disturbed(name, since, until)


@checker("late", "DEL-2")
def late(run: Run, terms: Terms) -> Iterator[Violation]:
    """A nacked message comes back at most max(1 s, 10 % of the delay) after its delay while members wait for work."""
    yield from _overdue(run, terms, "late")


@checker("progress", "GRP-4", "END-3")
def progress(run: Run, terms: Terms) -> Iterator[Violation]:
    """Undisturbed, no message waits longer than its rule allows while every member of the group waits for work."""
    for group in run.groups.values():
        if group.drained == "fail":
            yield Violation(
                "END-3",
                "progress",
                (group.drain_index or 0,),
                f"draining {group.where[0]}/{group.where[1]} with fresh members came to a standstill",
            )
    yield from _overdue(run, terms, "progress")


@dataclass(frozen=True, slots=True)
class _Due:
    """A message that may be lent from `since` on, was not until `until`, and should have been after `limit` seconds."""

    since: int
    until: int
    limit: float
    rule: str
    checker: str
    events: tuple[int, ...]
    msg: str


def _overdue(run: Run, terms: Terms, name: str) -> Iterator[Violation]:
    for group in run.groups.values():
        if group.seeks or terms.retention:
            continue
        waits = _waits(run, terms, group)
        starts = [since for since, _ in waits]
        served = sorted(lending.at for lending in group.lendings)
        for due in _dues(run, terms, group):
            if due.checker != name:
                continue
            waited = _longest(waits, starts, served, due.since, due.until)
            if waited > round((due.limit + terms.grace) * NANO):
                yield Violation(
                    due.rule,
                    name,
                    due.events,
                    f"{due.msg} was due in {group.where[0]}/{group.where[1]}, and every member waited "
                    f"{waited / NANO:.3f} s for it; {due.limit:.3f} s are allowed",
                )


def _longest(waits: list[tuple[int, int]], starts: list[int], served: list[int], since: int, until: int) -> int:
    """Return the longest stretch between the two times through which all members waited, less what others took."""
    longest = 0
    for index in range(max(0, bisect_left(starts, since) - 1), len(waits)):
        start, end = waits[index]
        if start >= until:
            break
        start, end = max(start, since), min(end, until)
        if start < end:
            others = bisect_left(served, end) - bisect_left(served, start)
            longest = max(longest, end - start - others * SERVICE)
    return longest


def _waits(run: Run, terms: Terms, group: Group) -> list[tuple[int, int]]:
    """Return the stretches in which there was a member, every member waited for work, and no fault was about."""
    recovery = round(terms.recover_within * NANO)
    # One line of changes: members alive, members waiting, faults about. At equal times gains go first.
    changes: list[tuple[int, int, int, int, int]] = []
    for member in group.members:
        # In an ordered group what a member nacks stays with its partition until the member has left.
        gone = member.gone if group.ordering == "none" else member.died or member.left
        gone = run.ended if gone is None else gone
        changes += [(member.joined, 0, 1, 0, 0), (gone, 1, -1, 0, 0)]
        for since, until in _merged(member):
            changes += [(since, 0, 0, 1, 0), (min(until, gone), 1, 0, -1, 0)]
    for fault in run.faults:
        changes += [(fault.began, 0, 0, 0, 1), (fault.ended + recovery, 1, 0, 0, -1)]
    found: list[tuple[int, int]] = []
    alive = waiting = faults = 0
    idle_since: int | None = None
    for at, _, more_alive, more_waiting, more_faults in sorted(changes):
        alive, waiting, faults = alive + more_alive, waiting + more_waiting, faults + more_faults
        idle = alive > 0 and waiting >= alive and faults == 0
        if idle and idle_since is None:
            idle_since = at
        elif not idle and idle_since is not None:
            if at > idle_since:
                found.append((idle_since, at))
            idle_since = None
    return found


def _merged(member: Member) -> Iterator[tuple[int, int]]:
    current: tuple[int, int] | None = None
    for since, until in member.idle:
        if current is not None and since - current[1] <= GAP:
            current = (current[0], until)
            continue
        if current is not None:
            yield current
        current = (since, until)
    if current is not None:
        yield current


def _dues(run: Run, terms: Terms, group: Group) -> Iterator[_Due]:
    released = _Releases(run, terms, group)
    for publish in promised(run, group):
        done = publish.call.done or publish.call.began
        lendings = group.by_msg.get(publish.msg, [])
        until = lendings[0].at if lendings else run.ended
        since = released.since(publish.key, publish.partition, max(done, group.created or 0), until)
        if since is not None:
            yield _Due(since, until, patience(group, terms), "GRP-1", "progress", (publish.call.index,), publish.msg)
    for msg, lendings in group.by_msg.items():
        for before, again in zip(lendings, [*lendings[1:], None], strict=True):
            until = run.ended if again is None else again.at
            yield from _after(run, terms, group, msg, before, until)


def _after(run: Run, terms: Terms, group: Group, msg: str, before: Lending, until: int) -> list[_Due]:
    """Return from when the message must come back after this lending; nothing when it need not."""
    if group.max_attempts is not None and before.attempt >= group.max_attempts:
        return []
    if any(call.op != "nack" and call.outcome != "fail" for call in before.settles):
        return []
    if run.maybe_ended(before, terms):
        return []

    def from_(since: int) -> _Due:
        return _Due(since, until, patience(group, terms), "GRP-4", "progress", (before.index,), msg)

    call = before.settle
    if call is not None and call.op == "nack" and call.outcome == "ok" and call.done is not None:
        delay = group.backoff if call.delay is None else call.delay
        # A nack that may not have left with its member is made good by the end of the lease.
        if run.held_from(before, call, terms) is not None:
            since = call.done + round(delay * NANO)
            # Where partitions are shared out, a member that died before may have owned the message's, and still does.
            from_then = since - round(patience(group, terms) * NANO) if terms.rebalances else since
            died = [each.died for each in group.members if each.died is not None and from_then <= each.died < until]
            undisturbed = min(died, default=until)
            events = (before.index, call.index)
            limit = max(1.0, 0.1 * delay)
            if terms.rebalances and _on_its_way(run, group, since, undisturbed):
                limit = max(limit, HAND_OVER_SECONDS)
            due = _Due(since, undisturbed, limit, "DEL-2", "late", events, msg)
            # Who died may have fetched it ahead, unseen: then its lease must end first.
            return [due, *([from_(max(since, *died))] if died else [])]
    member = run.members.get(before.member)
    if member is not None and member.left is not None:
        return [replace(from_(member.left), limit=HAND_OVER_SECONDS)]
    return [] if before.until is None else [from_(max(before.until, before.expired or 0))]


def _on_its_way(run: Run, group: Group, since: int, until: int) -> bool:
    """Tell whether partitions may have been on their way to other members between the two times."""
    began = since - round(HAND_OVER_SECONDS * NANO)
    return any(began <= change < until for change in run.changes(group.where))


def patience(group: Group, terms: Terms) -> float:
    """Return how long a message may be held up by a member that died with it, in seconds."""
    return group.lease + terms.recover_within


class _Releases:
    """When the messages of an ordered group stopped being held up by older ones of their key (or partition)."""

    def __init__(self, run: Run, terms: Terms, group: Group) -> None:
        self._ordered = group.ordering == "key"
        self._by_partition = terms.blocks == "partition"
        self._lines: dict[object, list[tuple[int, int]]] = defaultdict(list)
        if not self._ordered:
            return
        for lendings in group.by_msg.values():
            first = lendings[0]
            settled = [call.began for each in lendings for call in each.settles if call.op != "nack"]
            end = max(settled) if settled else run.ended
            self._lines[self._line(first.key, first.partition)].append((first.at, end))
        for line in self._lines.values():
            line.sort()
            # Of each place the latest end so far, so that `since` need not look at all of them again.
            line[:] = zip((first for first, _ in line), accumulate((end for _, end in line), max), strict=True)

    def _line(self, key: str | None, partition: int | None) -> object:
        return partition if self._by_partition else key

    def since(self, key: str | None, partition: int | None, published: int, until: int) -> int | None:
        """Return from when a message that was first lent at `until` was free to be lent; None if it never was."""
        if not self._ordered or (key is None and not self._by_partition):
            return published
        line = self._lines[self._line(key, partition)]
        before = bisect_left(line, (until, 0))
        since = max(published, line[before - 1][1]) if before else published
        return since if since < until else None
