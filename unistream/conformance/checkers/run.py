"""Knows how to read a history once, in order, into what the checkers ask about: publishes, groups, lendings, members.

It draws no conclusion about right and wrong. Where a history leaves room (a lease that may have been renewed unseen,
an ack that may not have left), the reading is the one that accuses nobody: a hold never lasts longer here than it
lasted in truth, and a settle counts as held by the broker only when it surely was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from unistream.conformance.checkers.records import Fault, Group, Lending, Member, Operation, Publish, Where
from unistream.conformance.checkers.terms import Terms
from unistream.conformance.history import NANO, Event, History

FOREVER = 1 << 62
"""Later than any time of a history."""


class Run:
    """A history, read."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.publishes: dict[str, Publish] = {}
        self.groups: dict[Where, Group] = {}
        self.members: dict[str, Member] = {}
        self.lendings: dict[str, Lending] = {}
        self.faults: list[Fault] = []
        self.strays: set[str | None] = set()
        """Fingerprints of bodies that are none of this run's and were published on purpose."""
        self.tallies: dict[str, int] = defaultdict(int)
        self.ended = history[len(history) - 1].at if len(history) else 0
        self._calls: dict[tuple[str, int, int], Operation] = {}
        self._segments: dict[tuple[str, str | None], int] = defaultdict(int)
        self._stale: list[Lending] = []
        for index, event in enumerate(history):
            self._read(index, event)
        for lending in self._stale:
            self._forget_stale(lending)

    def group(self, where: Where) -> Group:
        """Return the group, making a record of it when it was not known before."""
        if where not in self.groups:
            self.groups[where] = Group(where)
        return self.groups[where]

    def hold_end(self, lending: Lending, terms: Terms) -> int:
        """Return the earliest time at which the member may have stopped holding it; FOREVER if nothing ended it."""
        member = self.members.get(lending.member)
        ends = [FOREVER, lending.until, lending.expired, member.gone if member else None]
        if lending.settles:
            ends.append(lending.settles[0].began)
        for fault in self.faults:
            ends_lease = fault.note.startswith("broker") or terms.lease_scope != "message"
            if ends_lease and fault.ended >= lending.at and fault.touches(lending.member):
                ends.append(max(fault.began, lending.at))
        if terms.rebalances:
            ends.extend(change for change in self.changes(lending.where) if change >= lending.at)
        return min(end for end in ends if end is not None)

    def changes(self, where: Where) -> Iterator[int]:
        """Yield the times at which the group's membership changed."""
        for member in self.group(where).members:
            yield member.joined
            if member.gone is not None:
                yield member.gone

    def held_from(self, lending: Lending, call: Operation, terms: Terms) -> int | None:
        """
        Return from when the broker surely holds the settle, or None when that is not sure.

        A confirmed one counts from its answer. A plain one counts when its lease had time left and the member
        lived on, undisturbed, for as long as a coalesced ack takes, or left properly, and the library never said that
        the broker had refused it after all.
        """
        if call.outcome != "ok" or call.done is None or lending.refused:
            return None
        if call.confirmed:
            return call.done
        flushed = call.done + round(terms.settle_flush * NANO)
        member = self.members.get(lending.member)
        if member is not None and member.left is not None and member.left < flushed:
            flushed = member.left
        elif member is None or flushed > self.ended:
            return None
        if member.died is not None and member.died < self._stored_by(lending.where, flushed, terms):
            return None
        if lending.expired is not None or (lending.until is not None and lending.until < flushed):
            return None
        if self.disturbed(lending.member, call.began, flushed):
            return None
        return flushed

    def _stored_by(self, where: Where, flushed: int, terms: Terms) -> int:
        """Return when a plain ack is surely stored: where partitions are shared out, not while a death is unnoticed."""
        if not terms.rebalances:
            return flushed
        died = [each.died for each in self.group(where).members if each.died is not None and each.died <= flushed]
        return max([flushed, *(at + round(terms.recover_within * NANO) for at in died)])

    def maybe_ended(self, lending: Lending, terms: Terms) -> bool:
        """Tell whether an ack of an earlier loan, held up on its way, may have ended this one: there is no fencing."""
        if terms.fencing or lending.msg is None:
            return False
        lendings = self.group(lending.where).by_msg.get(copy_name(lending.msg, lending.origin), [])
        earlier = [each for each in lendings if each.index < lending.index]
        return any(
            call.op in ("ack", "reject") and call.outcome != "fail" and self.held_from(each, call, terms) is None
            for each in earlier
            for call in each.settles
        )

    def left_twice(self, lendings: Sequence[Lending], again: Lending, terms: Terms) -> int:
        """Return how many more than one there may be of a message: one for each nack that a fault was around."""
        if not terms.nacks_twice:
            return 0
        earlier = [call for each in lendings if each.index < again.index for call in self._unsure_nacks(each, terms)]
        return sum(call.began <= again.at for call in earlier)

    def _unsure_nacks(self, lending: Lending, terms: Terms) -> list[Operation]:
        member, flush = self.members.get(lending.member), round(terms.settle_flush * NANO)
        died = None if member is None else member.died
        return [
            call
            for call in lending.settles[:1]
            for end in [(self.ended if call.done is None else call.done) + flush]
            if call.op == "nack"
            and (self.disturbed(lending.member, call.began, end) or (died is not None and call.began <= died <= end))
        ]

    def disturbed(self, member: str, since: int, until: int) -> bool:
        """Tell whether a fault reached `member` between the two times."""
        return any(f.touches(member) and f.began <= until and f.ended >= since for f in self.faults)

    def broker_failed(self, since: int, until: int) -> bool:
        """Tell whether the broker itself was restarted, killed or paused between the two times."""
        return any(f.note.startswith("broker") and f.began <= until and f.ended >= since for f in self.faults)

    def sought(self, where: Where, since: int, until: int) -> bool:
        """Tell whether the group was moved by a seek between the two times."""
        return any(since <= at <= until for at in self.group(where).seeks)

    def _read(self, index: int, event: Event) -> None:
        match event.op:
            case "publish":
                self._read_publish(index, event)
            case "deliver":
                self._read_deliver(index, event)
            case "ack" | "nack" | "reject" | "extend":
                self._read_settle(index, event)
            case "renew" | "expire" | "refuse":
                self._read_lease(event)
            case "join" | "leave" | "death" | "idle":
                self._read_member(event)
            case "create" | "seek" | "drain" | "loss":
                self._read_group(index, event)
            case "stray":
                self.strays.add(event.digest)
            case "tally":
                self.tallies[event.note or ""] += 1 if event.count is None else event.count
            case "fault":
                since = event.at if event.since is None else event.since
                self.faults.append(Fault(since, event.at, event.member, event.note or ""))

    def _complete(self, index: int, event: Event) -> Operation | None:
        call = self._calls.get((event.proc, event.life, event.call or 0))
        if call is not None:
            call.outcome, call.done, call.done_index = event.phase, event.at, index
            call.confirmed, call.error = bool(event.confirmed), event.error
        return call

    def _begin(self, index: int, event: Event) -> Operation:
        call = Operation(event.op, index, event.at, delay=event.delay)
        self._calls[(event.proc, event.life, event.call or 0)] = call
        return call

    def _read_publish(self, index: int, event: Event) -> None:
        if event.msg is None or event.topic is None:
            raise ValueError(f"event {index}: a publish names its message and its topic")
        producer, _, number = event.msg.rpartition(".")
        if event.phase == "invoke":
            segment = self._segments[(producer, event.key)]
            call = self._begin(index, event)
            self.publishes[event.msg] = Publish(
                event.msg, event.topic, event.key, call, event.digest, producer, int(number), segment
            )
            return
        self._complete(index, event)
        publish = self.publishes[event.msg]
        publish.partition, publish.position = event.partition, event.position
        if event.phase == "info":
            self._segments[(producer, event.key)] += 1

    def _read_deliver(self, index: int, event: Event) -> None:
        where = (event.topic or "", event.group or "")
        lending = Lending(
            index=index,
            at=event.at,
            name=event.lending or f"#{index}",
            where=where,
            member=event.member or "",
            msg=event.msg,
            key=event.key,
            attempt=0 if event.attempt is None else event.attempt,
            until=event.until,
            partition=event.partition,
            position=event.position,
            digest=event.digest,
            error=event.error,
            origin=event.origin,
        )
        group = self.group(where)
        group.lendings.append(lending)
        member = self.members.get(lending.member)
        if member is not None and event.since is not None:
            member.idle.append((event.since, event.at))
        self.lendings[lending.name] = lending
        if event.until is not None and event.until <= event.at:
            self._stale.append(lending)
        if event.msg is not None:
            group.by_msg[copy_name(event.msg, event.origin)].append(lending)

    def _forget_stale(self, lending: Lending) -> None:
        """
        Leave out a lending whose lease was over when it was handed out, if its process was stopped meanwhile.

        The broker had lent it before the stop, perhaps before others were lent the message that the history has first.
        """
        if lending.msg is None or not self.disturbed(lending.member, lending.until or lending.at, lending.at):
            return
        group = self.group(lending.where)
        group.lendings.remove(lending)
        group.stale.append(lending)
        copies = group.by_msg[copy_name(lending.msg, lending.origin)]
        copies.remove(lending)
        if not copies:
            del group.by_msg[copy_name(lending.msg, lending.origin)]

    def _read_settle(self, index: int, event: Event) -> None:
        lending = self.lendings[event.lending or ""]
        # A settle carries when the lease ended by the delivery's own word: it may have been renewed since.
        if event.until is not None and (event.phase == "invoke" or event.op == "extend"):
            lending.until = event.until
        if event.phase != "invoke":
            self._complete(index, event)
            return
        calls = lending.extends if event.op == "extend" else lending.settles
        calls.append(self._begin(index, event))

    def _read_lease(self, event: Event) -> None:
        lending = self.lendings[event.lending or ""]
        if event.op == "refuse":
            lending.refused = True
        elif event.op == "expire":
            lending.expired = event.at if lending.expired is None else lending.expired
        elif event.until is not None:
            lending.until = event.until

    def _read_member(self, event: Event) -> None:
        name = event.member or ""
        if event.op == "join":
            where = (event.topic or "", event.group or "")
            member = Member(name, where, event.at, event.limit)
            self.members[name] = member
            self.group(where).members.append(member)
            return
        known = self.members.get(name)
        if known is None:
            raise ValueError(f"{event.op} of member {name!r}, who never joined")
        match event.op, event.phase:
            case "death", _:
                known.died = event.at
            case "leave", "invoke":
                known.leaving = event.at
            case "leave", "ok":
                known.left = event.at
            case "idle", _:
                known.idle.append((event.at if event.since is None else event.since, event.at))

    def _read_group(self, index: int, event: Event) -> None:
        group = self.group((event.topic or "", event.group or ""))
        match event.op, event.phase:
            case "create", "ok":
                if group.created is None:
                    group.created, group.created_index = event.at, index
                config = event.config or {}
                group.ordering = config.get("ordering", group.ordering)
                group.start = config.get("start", group.start)
                group.lease = config.get("lease", group.lease)
                group.backoff = config.get("backoff", group.backoff)
                group.max_attempts = config.get("max_attempts", group.max_attempts)
                group.dead_letter = config.get("dead_letter", group.dead_letter)
            case "seek", "invoke" | "ok":
                group.seeks.append(event.at)
            case "drain", phase:
                group.drained, group.drain_index = phase, index
            case "loss", _:
                group.losses += event.count or 0


def copy_name(msg: str, origin: str | None) -> str:
    """Return the name of a message, or of the dead letter that a group (`topic/group`) made of it."""
    return msg if origin is None else f"{msg} from {origin}"


def natural(position: str) -> tuple[int, ...]:
    """Return a position's numbers, by which positions of one partition sort (`1700-12` as 1700, 12)."""
    numbers, digits = [], ""
    for sign in position + " ":
        if sign.isdigit():
            digits += sign
        elif digits:
            numbers.append(int(digits))
            digits = ""
    return tuple(numbers)
