"""Knows which messages must be found in a dead-letter topic, and which must not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from unistream.conformance.checkers.records import Group, Lending
from unistream.conformance.checkers.run import Run, copy_name
from unistream.conformance.checkers.table import checker
from unistream.conformance.checkers.terms import Terms, Violation


@checker("dead-letter-lost", "DEL-3", "DEL-4")
def dead_letter_lost(run: Run, terms: Terms) -> Iterator[Violation]:
    """What was rejected, or failed in its last attempt, reaches the dead-letter topic; judged after complete drains."""
    for group in run.groups.values():
        watchers = _watchers(run, group)
        if group.drained != "ok" or not watchers:
            continue
        for msg, lendings in group.by_msg.items():
            cause = next((each for each in lendings if _condemned(run, terms, group, each)), None)
            cause = cause or _silent_at_last(terms, group, lendings[-1])
            if cause is None or any(copy_name(msg, "/".join(group.where)) in each.by_msg for each in watchers):
                continue
            call = cause.settle
            done = f"{call.op}ed by" if call is not None else "lost with"
            yield Violation(
                "DEL-3" if call is not None and call.op == "reject" else "DEL-4",
                "dead-letter-lost",
                (cause.index, group.drain_index or 0),
                f"{msg} was {done} {cause.member} (attempt {cause.attempt}) and never reached {group.dead_letter}",
            )


@checker("dead-letter-unjustified", "DEL-4")
def dead_letter_unjustified(run: Run, terms: Terms) -> Iterator[Violation]:
    """Nothing is dead-lettered that was neither rejected nor lent as often as the policy allows."""
    sources = [group for group in run.groups.values() if group.dead_letter is not None]
    lent = {id(group): _by_message(group) for group in sources}
    for watcher in run.groups.values():
        feeding = [group for group in sources if group.dead_letter == watcher.where[0]]
        if not feeding:
            continue
        for lendings in watcher.by_msg.values():
            msg, origin = lendings[0].msg or "", lendings[0].origin
            publish = run.publishes.get(msg)
            if publish is None or publish.topic == watcher.where[0]:
                continue
            sent = [group for group in feeding if origin is None or "/".join(group.where) == origin]
            if not any(_may_be_condemned(group, each) for group in sent for each in lent[id(group)].get(msg, ())):
                yield Violation(
                    "DEL-4",
                    "dead-letter-unjustified",
                    (publish.call.index, lendings[0].index),
                    f"{msg} is in {watcher.where[0]}, and no member rejected it or used up its attempts",
                )


def _by_message(group: Group) -> dict[str, list[Lending]]:
    """Return a group's lendings by message, those that came to it as dead letters too."""
    found: dict[str, list[Lending]] = defaultdict(list)
    for lending in group.lendings:
        found[lending.msg or ""].append(lending)
    return found


def _watchers(run: Run, group: Group) -> list[Group]:
    """Return the drained groups that were there to see every dead letter of `group`."""
    return [
        watcher
        for watcher in run.groups.values()
        if watcher.where[0] == group.dead_letter
        and watcher.drained == "ok"
        and watcher.created is not None
        and (not group.lendings or watcher.created <= group.lendings[0].at)
    ]


def _condemned(run: Run, terms: Terms, group: Group, lending: Lending) -> bool:
    call = lending.settle
    if call is None or run.held_from(lending, call, terms) is None:
        return False
    last = group.max_attempts is not None and lending.attempt >= group.max_attempts
    return call.op == "reject" or (call.op == "nack" and last)


def _silent_at_last(terms: Terms, group: Group, lending: Lending) -> Lending | None:
    """Return the lending when it was the last one allowed and ended without a settle that may have been heard."""
    if not terms.attempts_exact or group.max_attempts is None or lending.attempt < group.max_attempts:
        return None
    return None if any(call.outcome != "fail" for call in lending.settles) else lending


def _may_be_condemned(group: Group, lending: Lending) -> bool:
    if any(call.op == "reject" and call.outcome != "fail" for call in lending.settles):
        return True
    # One lending may have gone unseen: fetched by a member that died before its application had it.
    return group.max_attempts is not None and lending.attempt >= group.max_attempts - 1
