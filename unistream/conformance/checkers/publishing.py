"""Knows what becomes of published messages: none lost, none invented, none altered, none stored twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from unistream.conformance.checkers.records import Group, Lending, Publish, Where
from unistream.conformance.checkers.run import Run, natural
from unistream.conformance.checkers.table import checker
from unistream.conformance.checkers.terms import Terms, Violation


def promised(run: Run, group: Group) -> Iterator[Publish]:
    """Yield the confirmed messages that the group must receive: those after its creation, or all of them."""
    if group.created is None:
        return
    for publish in run.publishes.values():
        if publish.topic != group.where[0] or publish.call.outcome != "ok":
            continue
        if publish.call.index > group.created_index or group.start == "earliest":
            yield publish


@checker("lost", "PUB-1", "GRP-1")
def lost(run: Run, terms: Terms) -> Iterator[Violation]:
    """Every confirmed message reaches every group created before it; judged only after a complete drain."""
    for group in run.groups.values():
        if group.drained != "ok" or group.seeks:
            continue
        missing = [publish for publish in promised(run, group) if publish.msg not in group.by_msg]
        if terms.retention and group.losses >= len(missing):
            continue
        rule = "END-4" if terms.retention else "PUB-1"
        for publish in missing:
            yield Violation(
                rule,
                "lost",
                (publish.call.index, publish.call.done_index or publish.call.index, group.drain_index or 0),
                f"{publish.msg} was confirmed, and group {_name(group.where)} never received it",
            )


@checker("lost-unsettled", "GRP-1", "GRP-4", "DEL-2")
def lost_unsettled(run: Run, terms: Terms) -> Iterator[Violation]:
    """After a complete drain every delivered message is settled or possibly settled in every group."""
    for group in run.groups.values():
        if group.drained != "ok" or group.seeks:
            continue
        for msg, lendings in group.by_msg.items():
            if any(_may_be_settled(group, lending) for lending in lendings) or terms.retention:
                continue
            last = lendings[-1]
            yield Violation(
                "GRP-1",
                "lost-unsettled",
                (*(lending.index for lending in lendings), group.drain_index or 0),
                f"{msg} was lent to {last.member} (attempt {last.attempt}) and never settled, "
                f"and group {_name(group.where)} did not receive it again",
            )


def _may_be_settled(group: Group, lending: Lending) -> bool:
    if any(call.op != "nack" and call.outcome != "fail" for call in lending.settles):
        return True
    # The nack or the lost lease of the last attempt dead-letters the message.
    return group.max_attempts is not None and lending.attempt >= group.max_attempts


@checker("phantom", "PUB-1")
def phantom(run: Run, terms: Terms) -> Iterator[Violation]:
    """Only messages that somebody tried to publish are delivered."""
    for group in run.groups.values():
        for lending in group.lendings:
            unknown = lending.msg is not None and lending.msg not in run.publishes
            if unknown and lending.error is None:
                yield Violation(
                    "PUB-1",
                    "phantom",
                    (lending.index,),
                    f"{lending.msg} was delivered to {_name(lending.where)}, and nobody published it",
                )
            if lending.error == "foreign" and lending.digest not in run.strays:
                yield Violation(
                    "PUB-1",
                    "phantom",
                    (lending.index,),
                    f"a message that is none of this run's was delivered to {_name(lending.where)}",
                )


@checker("corrupt", "GRP-1", "DEL-3")
def corrupt(run: Run, terms: Terms) -> Iterator[Violation]:
    """Value, key and headers are delivered as they were published."""
    for group in run.groups.values():
        for lending in group.lendings:
            if lending.error == "corrupt":
                yield Violation("GRP-1", "corrupt", (lending.index,), f"a body came back altered: {lending.member}")
                continue
            publish = run.publishes.get(lending.msg or "")
            if publish is None:
                continue
            if publish.key != lending.key:
                what = f"key {_key(publish.key)} became {_key(lending.key)}"
            elif publish.digest and lending.digest and publish.digest != lending.digest:
                what = "headers differ"
            else:
                continue
            yield Violation(
                "GRP-1", "corrupt", (publish.call.index, lending.index), f"{lending.msg} came back altered: {what}"
            )


@checker("aborted-read", "PUB-2")
def aborted_read(run: Run, terms: Terms) -> Iterator[Violation]:
    """A publish reported as surely not stored is never delivered."""
    for group in run.groups.values():
        for msg, lendings in group.by_msg.items():
            publish = run.publishes.get(msg)
            if publish is not None and publish.call.outcome == "fail":
                yield Violation(
                    "PUB-2",
                    "aborted-read",
                    (publish.call.done_index or publish.call.index, lendings[0].index),
                    f"{msg} was reported not stored ({publish.call.error}), and it was delivered",
                )


@checker("duplicate-write", "PUB-3")
def duplicate_write(run: Run, terms: Terms) -> Iterator[Violation]:
    """A message is stored once; twice only where nothing removes duplicates and a fault came between."""
    if not terms.positions:
        return
    for msg, lendings in _by_message(run).items():
        publish = run.publishes.get(msg)
        if publish is None:
            continue
        call = publish.call
        if not terms.dedupe and (call.outcome == "info" or _faulty(run, publish)):
            continue
        places = {(lending.partition, lending.position): lending for lending in lendings if lending.position}
        if len(places) > 1:
            yield Violation(
                "PUB-3",
                "duplicate-write",
                (call.index, *(lending.index for lending in places.values())),
                f"{msg} was stored {len(places)} times: {sorted(str(place) for place in places)}",
            )


def _faulty(run: Run, publish: Publish) -> bool:
    done = publish.call.done
    return any(f.began <= (run.ended if done is None else done) and f.ended >= publish.call.began for f in run.faults)


@checker("inconsistent-position", "PUB-1")
def inconsistent_position(run: Run, terms: Terms) -> Iterator[Violation]:
    """A receipt and every delivery of its message name one position, and no two messages share it."""
    if not terms.positions:
        return
    owners: dict[tuple[str, int | None, str], str] = {}
    for msg, lendings in _by_message(run).items():
        publish = run.publishes.get(msg)
        if publish is None:
            continue
        for lending in lendings:
            if lending.position is None:
                continue
            place = (publish.topic, lending.partition, lending.position)
            owner = owners.setdefault(place, msg)
            if owner != msg:
                yield Violation(
                    "PUB-1",
                    "inconsistent-position",
                    (lending.index,),
                    f"{owner} and {msg} were both delivered from position {lending.position}",
                )
        first = next((lending for lending in lendings if lending.position), None)
        if publish.position and first and terms.dedupe and first.position != publish.position:
            yield Violation(
                "PUB-1",
                "inconsistent-position",
                (publish.call.done_index or publish.call.index, first.index),
                f"the receipt of {msg} says {publish.position}, its delivery {first.position}",
            )


@checker("nonmonotonic-publish", "PUB-4")
def nonmonotonic_publish(run: Run, terms: Terms) -> Iterator[Violation]:
    """Messages of one producer with one key are stored in the order published, while no outcome is unknown."""
    if not terms.positions:
        return
    last: dict[tuple[str, str, str | None, int, int | None], Publish] = {}
    for publish in run.publishes.values():
        if publish.call.outcome != "ok" or publish.position is None:
            continue
        line = (publish.topic, publish.producer, publish.key, publish.segment, publish.partition)
        before = last.get(line)
        last[line] = publish
        if before is None or publish.key is None:
            continue
        if natural(before.position or "") >= natural(publish.position):
            yield Violation(
                "PUB-4",
                "nonmonotonic-publish",
                (before.call.done_index or 0, publish.call.done_index or 0),
                f"{publish.msg} was published after {before.msg} with the same key and stored before it "
                f"({publish.position} against {before.position})",
            )


def _by_message(run: Run) -> dict[str, list[Lending]]:
    """Gather the lendings of every message from the groups of the topic it was published to."""
    found: dict[str, list[Lending]] = defaultdict(list)
    for group in run.groups.values():
        for msg, lendings in group.by_msg.items():
            publish = run.publishes.get(msg)
            if publish is not None and publish.topic == group.where[0]:
                found[msg].extend(lendings)
    return found


def _name(where: Where) -> str:
    return f"{where[0]}/{where[1]}"


def _key(key: str | None) -> str:
    return "None" if key is None else repr(bytes.fromhex(key))
