"""Knows how to make a plan small that breaks a rule: parts are taken away for as long as it still breaks one of them.

A plan is drawn whole and in advance, so it can be taken apart: every part is left out for a try, larger pieces first
(delta debugging), until nothing can be left out any more. On a virtual clock a run repeats itself; on a real broker it
may not, so there every plan gets several tries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from unistream.conformance.plan import GroupPlan, Plan, ProducerPlan

T = TypeVar("T")
Breaks = Callable[[Plan], bool]


def shrunk(plan: Plan, breaks: Breaks) -> Plan:
    """
    Return the smallest plan that was found by leaving out parts of one that breaks a rule.

    Args:
        plan: Breaks a rule.
        breaks: Carries out a plan and tells whether it breaks that rule, too.
    """
    before = None
    while plan != before:
        before = plan
        for part in (_fewer_faults, _fewer_groups, _fewer_messages, _plainer):
            plan = part(plan, breaks)
    return plan


def least(parts: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """Return as few of the parts, in their order, as still fail; none of them can be left out alone."""
    kept = list(parts)
    size = len(kept)
    while size:
        start, shorter = 0, False
        while start < len(kept):
            left = [*kept[:start], *kept[start + size :]]
            if fails(left):
                kept, shorter = left, True
            else:
                start += size
        size = min(size, len(kept)) if shorter and size == 1 else size // 2
    return kept


def _fewer_faults(plan: Plan, breaks: Breaks) -> Plan:
    faults = least(plan.faults, lambda left: breaks(replace(plan, faults=tuple(left))))
    return replace(plan, faults=tuple(faults))


def _fewer_groups(plan: Plan, breaks: Breaks) -> Plan:
    members = least(list(plan.members), lambda left: bool(left) and breaks(_staffed(plan, left)))
    return _staffed(plan, members)


def _staffed(plan: Plan, members: Sequence[tuple[GroupPlan, str]]) -> Plan:
    """Return the plan with so many members of each group as are left; faults of members that are gone go with them."""
    groups = tuple(
        replace(group, members=sum(each is group for each, _ in members))
        for group in plan.groups
        if any(each is group for each, _ in members)
    )
    plan = replace(plan, groups=groups)
    there = {name for _, name in plan.members} | {producer.name for producer in plan.producers}
    return replace(plan, faults=tuple(fault for fault in plan.faults if fault.whom in there))


def _fewer_messages(plan: Plan, breaks: Breaks) -> Plan:
    places = [
        (number, place)
        for number, producer in enumerate(plan.producers)
        for place, message in enumerate(producer.messages)
        if message is not None
    ]

    def with_only(left: Sequence[tuple[int, int]]) -> Plan:
        there = set(left)
        producers = tuple(
            replace(
                producer,
                messages=_without_end(
                    [message if (number, place) in there else None for place, message in enumerate(producer.messages)]
                ),
            )
            for number, producer in enumerate(plan.producers)
        )
        return replace(plan, producers=producers)

    return with_only(least(places, lambda left: breaks(with_only(left))))


def _without_end(messages: list[tuple[float, int | None] | None]) -> tuple[tuple[float, int | None] | None, ...]:
    """Return the messages up to the last that is there."""
    while messages and messages[-1] is None:
        messages.pop()
    return tuple(messages)


def _plainer(plan: Plan, breaks: Breaks) -> Plan:
    """Return the plan without what it does not need: moods of the handlers, pauses, partitions, attempts, room."""

    def calm(mood: str, share: object) -> Callable[[Plan], Plan]:
        return lambda plan: replace(plan, handling=replace(plan.handling, **{mood: share}))  # type: ignore[arg-type]

    changes: list[Callable[[Plan], Plan]] = [
        *(calm(mood, 0.0) for mood in ("confirm", "nack", "reject", "extend", "overstay")),
        calm("hold", (0.0, 0.0)),
        calm("delay", (0.0, 0.0)),
        lambda plan: replace(plan, producers=tuple(_at_once(each) for each in plan.producers)),
        lambda plan: replace(plan, partitions=1),
        lambda plan: replace(plan, max_attempts=None),
        lambda plan: replace(plan, dead_letters=plan.max_attempts is not None),
        lambda plan: replace(plan, groups=tuple(replace(group, max_in_flight=1) for group in plan.groups)),
    ]
    for change in changes:
        plainer = change(plan)
        if plainer != plan and breaks(plainer):
            plan = plainer
    return plan


def _at_once(producer: ProducerPlan) -> ProducerPlan:
    return replace(producer, messages=tuple(message and (0.0, message[1]) for message in producer.messages))
