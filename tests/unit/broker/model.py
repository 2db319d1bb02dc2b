"""A slow and obvious model of the broker, beside the broker itself: every command goes to both and is compared.

The model keeps one record per (group, offset) and looks through all of them for every question. It predicts what the
broker must answer where the contract fixes it, and checks that the answer is allowed where it leaves a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unistream.broker.core import Broker
from unistream.broker.lease import OFFSETS, Lent, Session, Tag
from unistream.broker.log import entry_bytes
from unistream.broker.spec import AtOffset, GroupSpec, Limits, TopicSpec
from unistream.broker.topic import Published

Entry = tuple[Any, ...]
START_MS = 1_700_000_000_000


@dataclass
class Loan:
    """What the model knows of one message in one group that was lent or given back."""

    token: int | None = None
    session: Session | None = None
    granted: float = 0.0
    deadline: float = 0.0
    ready_at: float = 0.0
    spent: int = 0
    suspect: bool = False
    lent: bool = False


@dataclass
class ModelGroup:
    """One group: loans of unsettled messages that were lent before, and what is settled or removed."""

    spec: GroupSpec
    first: int
    loans: dict[int, Loan] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    removed: int = 0


class Pair:
    """A broker with one topic, its model, and a clock that both share."""

    def __init__(self, topic: TopicSpec, limits: Limits) -> None:
        self.broker = Broker(limits)
        self.topic = self.broker.create_topic("t", topic)
        self.limits = limits
        self.now = 1000.0
        self.entries: list[Entry] = []
        self.times: list[int] = []
        self.ids: dict[str, tuple[int, float]] = {}
        self.groups: dict[str, ModelGroup] = {}
        self.sessions: list[Session] = []
        self.start = 0
        self.lent = 0
        self.again = 0

    @property
    def wall_ms(self) -> int:
        """Milliseconds since 1970, in step with the monotonic clock."""
        return START_MS + int(self.now * 1000)

    # Commands.

    def publish(self, entries: Sequence[Entry]) -> None:
        """Publish, and compare offsets, duplicates, refusals and everything that the publish removes."""
        spec = self.topic.spec
        self.check_removed()
        expected: list[int] = []
        duplicates: set[int] = set()
        refused: dict[int, str] = {}
        if spec.max_age is not None:
            self.expect_start(self.wall_ms)
        room = float("inf")
        if spec.max_backlog is not None and spec.overflow == "reject" and self.groups:
            room = spec.max_backlog - max(len(self.unsettled(name)) for name in self.groups)
        forgotten = self.now - self.limits.dedupe_seconds
        stored: list[Entry] = []
        ids: dict[str, tuple[int, float]] = {}
        for i, entry in enumerate(entries):
            known = ids.get(entry[0]) or self.ids.get(entry[0])
            if known is not None and known[1] > forgotten:
                duplicates.add(i)
                expected.append(known[0])
            elif entry_bytes([entry])[0] > self.limits.message_bytes:
                refused[i] = "too_large"
                expected.append(-1)
            elif len(stored) >= room:
                refused[i] = "full"
                expected.append(-1)
            else:
                ids[entry[0]] = (len(self.entries) + len(stored), self.now)
                expected.append(ids[entry[0]][0])
                stored.append(entry)
        result = self.broker.publish("t", entries, [entry[0] for entry in entries], self.now, self.wall_ms)

        if isinstance(result, int):
            result = Published(range(result, result + len(entries)), frozenset(), {})
        assert list(result.offsets) == expected
        assert result.duplicates == duplicates
        assert result.refused == refused
        self.entries += stored
        self.times += [self.wall_ms] * len(stored)
        self.ids |= ids
        if stored and spec.max_backlog is not None and spec.overflow == "drop_oldest":
            for name, group in self.groups.items():
                over = len(self.unsettled(name)) - spec.max_backlog
                free = [o for o in self.unsettled(name) if not self.is_lent(group, o)]
                for offset in free[: max(0, over)]:
                    self.remove(group, offset)
        self.check_removed()
        self.check()

    def create_group(self, name: str, spec: GroupSpec) -> None:
        """Create a group at the start its spec names."""
        self.broker.create_group("t", name, spec, self.now, self.wall_ms)
        self.check_removed()
        if name not in self.groups:
            first = len(self.entries) if spec.start == "latest" else self.topic.log.start
            self.groups[name] = ModelGroup(spec, first)
        self.check()

    def delete_group(self, name: str) -> None:
        """Delete a group; its sessions are over."""
        group = self.broker.delete_group("t", name)
        del self.groups[name]
        self.sessions = [session for session in self.sessions if session.group is not group]
        self.check()

    def join(self, name: str) -> Session:
        """A new member."""
        session = self.broker.join("t", name)
        self.sessions.append(session)
        return session

    def leave(self, session: Session, *, lost: bool) -> None:
        """A member leaves, or dies."""
        group = self.groups[session.group.name]
        self.expire()
        for offset, loan in list(group.loans.items()):
            if loan.session is session:
                self.give_back(group, offset, self.now, spent=int(lost), suspect=lost or loan.suspect)
        self.sessions.remove(session)
        (self.broker.lose if lost else self.broker.leave)(session, self.now)
        self.check()

    def grant(self, session: Session, limit: int) -> list[Tag]:
        """Lend, and check that every message may be lent now and that none is held back without cause."""
        name = session.group.name
        group = self.groups[name]
        lent = self.broker.grant(session, limit, self.now, self.wall_ms)
        self.check_removed()
        eligible = self.eligible(name)
        if lent is None:
            assert eligible == [], f"nothing was lent although {eligible} could be"
            return []
        offsets = list(lent.offsets)
        assert 0 < len(offsets) <= limit
        assert len(set(offsets)) == len(offsets)
        assert set(offsets) <= set(eligible), f"{set(offsets) - set(eligible)} were lent and must not be"
        assert lent.suspect == self.loan(group, offsets[0]).suspect
        assert len(offsets) == 1 or not any(self.loan(group, offset).suspect for offset in offsets)
        left = [self.loan(group, offset) for offset in eligible if offset not in offsets]
        if not any(loan.suspect for loan in left):
            # Where a suspect is next in line, what stands behind it waits for the next grant.
            assert lent.suspect or len(offsets) == limit or not left, f"{left} were held back"
        if group.spec.ordering == "none":
            given = [self.loan(group, offset) for offset in offsets]
            again = [(loan.ready_at, offset) for loan, offset in zip(given, offsets, strict=True) if loan.lent]
            assert again == sorted(again)
            assert [loan.lent for loan in given] == sorted([loan.lent for loan in given], reverse=True)
        for i, offset in enumerate(offsets):
            loan = group.loans.setdefault(offset, Loan())
            assert lent.entries[i] is self.entries[offset]
            assert lent.times[i] == self.times[offset]
            assert lent.attempts[i] == loan.spent + 1
            loan.token, loan.session, loan.lent = lent.token, session, True
            loan.granted, loan.deadline = self.now, self.now + group.spec.lease
            self.lent += 1
            self.again += loan.spent > 0
        assert lent.deadline == self.now + group.spec.lease
        self.check()
        return tags_of(lent)

    def settle(self, session: Session, verb: str, tags: Sequence[Tag], delay: float = 0.0) -> None:
        """Ack, nack, release or extend, and compare which tags are refused."""
        group = self.groups[session.group.name]
        self.expire()
        expected = []
        for tag in tags:
            offset = tag & OFFSETS
            loan = group.loans.get(offset)
            if loan is None or loan.token is None or loan.token + offset != tag:
                expected.append(tag)
            elif verb == "ack":
                del group.loans[offset]
                group.gone.add(offset)
            elif verb == "nack":
                self.give_back(group, offset, self.now + delay, spent=1, suspect=False)
            elif verb == "release":
                self.give_back(group, offset, self.now, spent=0, suspect=loan.suspect)
            else:
                loan.deadline = min(self.now + delay, loan.granted + group.spec.max_lease)
        command = getattr(self.broker, verb)
        extra = (delay,) if verb in ("nack", "extend") else ()
        assert command(session, tags, *extra, self.now) == expected
        self.expire()
        self.check_removed()
        self.check()

    def seek(self, name: str, target: int) -> None:
        """Move a group to an offset that is still kept."""
        group = self.groups[name]
        self.expire()
        self.broker.seek("t", name, AtOffset(target), self.now, self.wall_ms)
        self.check_removed()
        kept = max(target, self.topic.log.start)
        group.removed += kept - target
        for loan in group.loans.values():
            loan.spent += loan.token is not None
        group.loans = {o: Loan(spent=loan.spent) for o, loan in group.loans.items() if o >= kept and loan.spent > 0}
        group.first = kept
        group.gone = set()
        self.check()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    # What the model knows.

    def unsettled(self, name: str) -> list[int]:
        """Offsets that the group has not settled, in order; what is lent counts even if the log has lost it."""
        group = self.groups[name]
        return [
            offset
            for offset in range(group.first, len(self.entries))
            if offset not in group.gone and (offset >= self.start or self.is_lent(group, offset))
        ]

    def eligible(self, name: str) -> list[int]:
        """Offsets that may be lent now."""
        group = self.groups[name]
        busy: set[bytes] = set()
        offsets = []
        for offset in self.unsettled(name):
            key = self.entries[offset][2] if group.spec.ordering == "key" else None
            if key is not None and key in busy:
                continue
            if key is not None:
                busy.add(key)
            loan = self.loan(group, offset)
            if loan.token is None and loan.ready_at <= self.now:
                offsets.append(offset)
        return offsets

    def loan(self, group: ModelGroup, offset: int) -> Loan:
        """What is known of the message's lendings."""
        return group.loans.get(offset) or Loan()

    def is_lent(self, group: ModelGroup, offset: int) -> bool:
        """Whether somebody holds it."""
        return offset in group.loans and group.loans[offset].token is not None

    def give_back(self, group: ModelGroup, offset: int, ready_at: float, *, spent: int, suspect: bool) -> None:
        """End a loan; what the log has lost meanwhile is gone."""
        if offset < self.start:
            self.remove(group, offset)
            return
        loan = group.loans[offset]
        group.loans[offset] = Loan(ready_at=ready_at, spent=loan.spent + spent, suspect=suspect, lent=True)

    def remove(self, group: ModelGroup, offset: int) -> None:
        """Count an unsettled message as removed."""
        group.loans.pop(offset, None)
        group.gone.add(offset)
        group.removed += 1

    def expire(self) -> None:
        """End the leases whose time has come."""
        for group in self.groups.values():
            for offset, loan in list(group.loans.items()):
                if loan.token is not None and loan.deadline <= self.now:
                    self.give_back(group, offset, loan.deadline, spent=1, suspect=True)

    def expect_start(self, wall_ms: int) -> None:
        """Apply the declared retention to the model."""
        spec, start, end = self.topic.spec, self.start, len(self.entries)
        if spec.max_messages is not None:
            start = max(start, end - spec.max_messages)
        if spec.max_age is not None:
            while start < end and self.times[start] <= wall_ms - spec.max_age * 1000:
                start += 1
        if spec.max_bytes is not None:
            while sum(entry_bytes(self.entries[start:end])) > spec.max_bytes:
                start += 1
        self.move_start(start)

    def move_start(self, start: int) -> None:
        """Remove what is before `start` from every group that has not settled or borrowed it."""
        self.expire()
        for name, group in self.groups.items():
            for offset in self.unsettled(name):
                if self.start <= offset < start and not self.is_lent(group, offset):
                    self.remove(group, offset)
        self.start = start

    def check_removed(self) -> None:
        """Compare what the log has lost with the declared retention, or with what is settled by all."""
        self.expire()
        spec = self.topic.spec
        start = self.topic.log.start
        if spec.has_retention:
            if start > self.start or spec.max_age is None:
                self.expect_start(self.wall_ms)
                assert start == self.start
            return
        for name in self.groups:
            assert not [o for o in self.unsettled(name) if self.start <= o < start], "unsettled, yet removed"
        self.start = start

    # Invariants.

    def check(self) -> None:
        """What must hold in every state."""
        self.expire()
        log = self.topic.log
        assert log.end == len(self.entries)
        assert log.bytes == sum(entry_bytes(self.entries[log.start :]))
        for name, model in self.groups.items():
            group = self.topic.groups[name]
            group.expire(self.now)
            assert group.lag == len(self.unsettled(name))
            assert group.removed == model.removed
            assert not set(group.leased) & set(group.waiting)
            assert all(offset < group.cursor for offset in (*group.leased, *group.waiting))
            assert {o: lease.token for o, lease in group.leased.items()} == {
                o: loan.token for o, loan in model.loans.items() if loan.token is not None
            }
            kept = [offset for offset in self.unsettled(name) if offset >= log.start]
            assert group.floor() == (kept[0] if kept else group.cursor)
            held = sum(session.in_flight for session in group.sessions.values())
            assert held == len(group.leased)


def tags_of(lent: Lent) -> list[Tag]:
    """One tag per message lent."""
    return list(lent.tags)
