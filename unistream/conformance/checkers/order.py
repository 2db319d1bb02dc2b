"""Knows the order in which a group sees messages: first deliveries in publish order, and no key overtaken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from unistream.conformance.checkers.records import Group, Lending, Publish
from unistream.conformance.checkers.run import Run
from unistream.conformance.checkers.table import checker
from unistream.conformance.checkers.terms import Terms, Violation
from unistream.conformance.history import NANO


@checker("order-first", "ORD-2", "ORD-5")
def order_first(run: Run, terms: Terms) -> Iterator[Violation]:
    """First deliveries follow the publish order: per key in an ordered group, altogether for a lone member."""
    for group in run.groups.values():
        if group.seeks or (group.ordering != "key" and not terms.fifo):
            continue
        latest: dict[tuple[str, str | None, int], tuple[Publish, Lending]] = {}
        for msg, lendings in group.by_msg.items():
            publish = run.publishes.get(msg)
            if publish is None or publish.call.outcome != "ok" or publish.topic != group.where[0]:
                continue
            if publish.key is None and not terms.fifo:
                continue
            line = (publish.producer, None if terms.fifo else publish.key, publish.segment)
            before = latest.get(line)
            if before is None or before[0].number < publish.number:
                latest[line] = (publish, lendings[0])
                continue
            yield Violation(
                "ORD-5" if terms.fifo and group.ordering != "key" else "ORD-2",
                "order-first",
                (before[1].index, lendings[0].index),
                f"{msg} was published before {before[0].msg} and first delivered after it",
            )


@checker("overtake", "ORD-2")
def overtake(run: Run, terms: Terms) -> Iterator[Violation]:
    """In an ordered group nothing is lent while another message of its key is unsettled; an ack sent frees it."""
    ordered = {where: group for where, group in run.groups.items() if group.ordering == "key" and not group.seeks}
    unsettled: dict[tuple[str, str, str], dict[str, Lending]] = defaultdict(dict)
    for event in run.history:
        if event.op == "deliver":
            lending = run.lendings.get(event.lending or "")
            group = ordered.get(lending.where) if lending else None
            if lending is None or group is None or lending.key is None or lending.msg is None:
                continue
            waiting = unsettled[(*lending.where, lending.key)]
            for other in waiting.values():
                excused = (
                    _dead_lettered(run, terms, group, other, lending.at)
                    or _returned(run, terms, group, lending, other)
                    or run.maybe_ended(other, terms)
                )
                if other.msg != lending.msg and not excused:
                    yield Violation(
                        "ORD-2",
                        "overtake",
                        (other.index, lending.index),
                        f"{lending.msg} was lent to {lending.member} while {other.msg} of the same key, "
                        f"lent to {other.member} before, was unsettled",
                    )
            waiting[lending.msg] = lending
        elif event.op in ("ack", "reject", "nack"):
            lending = run.lendings[event.lending or ""]
            group = ordered.get(lending.where)
            if group is None or lending.key is None or lending.msg is None:
                continue
            waiting = unsettled[(*lending.where, lending.key)]
            if event.op != "nack" and event.phase == "invoke":
                waiting.pop(lending.msg, None)
            elif event.op != "nack" and event.phase == "fail" and _still_the_last(run, group, lending):
                waiting.setdefault(lending.msg, lending)


def _dead_lettered(run: Run, terms: Terms, group: Group, lending: Lending, by: int) -> bool:
    """Tell whether it was the last attempt and has ended, which dead-letters the message and frees its key, unseen."""
    last = group.max_attempts is not None and lending.attempt >= group.max_attempts
    return last and run.hold_end(lending, terms) <= by + round(terms.resolution * NANO)


def _returned(run: Run, terms: Terms, group: Group, lending: Lending, other: Lending) -> bool:
    """
    Tell whether this is an older message, which comes again because its ack may not have reached the broker.

    The ack released the order when it was sent (DEL-7), so `other` could be lent after it; nothing newer is overtaking.
    """
    before = [each for each in group.by_msg[lending.msg or ""] if each.at < other.at]
    acks = [call for call in before[-1].settles if call.op == "ack" and call.began <= other.at] if before else []
    return bool(acks) and all(run.held_from(before[-1], call, terms) is None for call in acks)


def _still_the_last(run: Run, group: Group, lending: Lending) -> bool:
    """Tell whether a refused settle leaves the message unsettled: nobody else had it, and nothing else settled it."""
    lendings = group.by_msg[lending.msg or ""]
    return lendings[-1] is lending and not any(
        call.op != "nack" and call.outcome != "fail" for each in lendings for call in each.settles
    )
