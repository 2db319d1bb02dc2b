"""One topic: what a publish does, what may be forgotten, and which groups it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from .dedupe import Window
from .errors import BrokerError, GroupMissing, InvalidRequest, PositionOutOfRange, TopicMissing
from .group import Group
from .log import Log, entry_bytes
from .ordered import OrderedGroup
from .spec import AtOffset, AtTime, Entry, GroupSpec, Limits, Start, TopicSpec

__all__ = ["Published", "Refusal", "Topic"]

Refusal = Literal["full", "too_large"]


class Published(NamedTuple):
    """What became of a batch of which not every message was stored.

    Attributes:
        offsets: Where each message is stored; of a duplicate, where the first one was; -1 if refused.
        duplicates: Indices of messages whose id was stored before; nothing was stored for them.
        refused: Index -> why it was not stored.
    """

    offsets: Sequence[int]
    duplicates: frozenset[int]
    refused: Mapping[int, Refusal]


class Topic:
    """The log of one topic, its recent ids, and its groups.

    Attributes:
        groups: By name.
        ages: Whether messages are removed by their age, so that time alone changes something.
        lossy: Whether a group may lose messages that it has not settled.
    """

    def __init__(self, name: str, spec: TopicSpec, limits: Limits, numbers: Iterator[int]) -> None:
        self.name = name
        self.spec = spec
        self.log = Log()
        self.groups: dict[str, Group] = {}
        self.lossy = spec.has_retention or (spec.max_backlog is not None and spec.overflow == "drop_oldest")
        self.ages = spec.max_age is not None
        self._limits = limits
        self._numbers = numbers
        self._retains = spec.has_retention
        self._max_backlog = spec.max_backlog
        self._most_message_bytes = limits.message_bytes
        # Messages beyond the history, and messages published or settled between two looks at what can be forgotten.
        self._slack = limits.history_messages >> 4
        self._most_messages = limits.history_messages + self._slack
        self._most_bytes = limits.history_bytes + (limits.history_bytes >> 4)
        self._unlooked = 0
        self._recent = Window(limits.dedupe_seconds, limits.dedupe_ids)

    # Publishing.

    def publish(self, entries: Sequence[Entry], ids: Sequence[str], now: float, wall_ms: int) -> int | Published:
        """Store a batch, in order; see `Broker.publish`."""
        if self.ages:
            self.trim(now, wall_ms)
        first = self.log.end
        recent = self._recent
        recent.turn(now, first)
        sizes = entry_bytes(entries)
        if (
            (sizes[0] if len(sizes) == 1 else max(sizes)) <= self._most_message_bytes
            and (self._max_backlog is None or len(entries) <= self._room())
            and recent.claim(ids, first)
        ):
            self._store(entries, sizes, now, wall_ms)
            return first
        return self._publish_some(entries, sizes, ids, now, wall_ms)

    def _publish_some(
        self, entries: Sequence[Entry], sizes: Sequence[int], ids: Sequence[str], now: float, wall_ms: int
    ) -> Published:
        """Publish a batch of which some messages may not be stored."""
        room = self._room()
        end = self.log.end
        stored: list[int] = []
        fresh: dict[str, int] = {}
        offsets: list[int] = []
        duplicates: list[int] = []
        refused: dict[int, Refusal] = {}
        for i, id_ in enumerate(ids):
            known = fresh.get(id_)
            if known is None:
                known = self._recent.offset(id_)
            if known is not None:
                duplicates.append(i)
                offsets.append(known)
            elif sizes[i] > self._limits.message_bytes:
                refused[i] = "too_large"
                offsets.append(-1)
            elif len(stored) >= room:
                refused[i] = "full"
                offsets.append(-1)
            else:
                fresh[id_] = end + len(stored)
                offsets.append(fresh[id_])
                stored.append(i)
        if stored:
            self._recent.add(fresh)
            self._store([entries[i] for i in stored], [sizes[i] for i in stored], now, wall_ms)
        return Published(offsets, frozenset(duplicates), refused)

    def _store(self, entries: Sequence[Entry], sizes: Sequence[int], now: float, wall_ms: int) -> None:
        log = self.log
        log.append(entries, sizes, wall_ms)
        if self._max_backlog is not None and self.spec.overflow == "drop_oldest":
            for group in self.groups.values():
                if group.lag > self._max_backlog:
                    group.drop_oldest(group.lag - self._max_backlog, now)
        if self._retains:
            self._remove_to(self._retained_from(wall_ms), now)
        elif log.bytes > self._most_bytes or log.end - log.start > self._most_messages:
            self._forget_settled(len(entries), now)

    def _room(self) -> float:
        """How many more messages the backlog takes before a publish is refused."""
        if self._max_backlog is None or self.spec.overflow != "reject" or not self.groups:
            return float("inf")
        return self._max_backlog - self.backlog

    @property
    def backlog(self) -> int:
        """Messages not settled by the slowest group."""
        return max([group.lag for group in self.groups.values()], default=0)

    # Forgetting.

    def trim(self, now: float, wall_ms: int) -> None:
        """Remove what the declared retention no longer keeps."""
        if self._retains:
            self._remove_to(self._retained_from(wall_ms), now)

    def after_settle(self, count: int, now: float) -> None:
        """`count` messages were settled, so that some may be forgotten."""
        log = self.log
        if not self._retains and (log.bytes > self._most_bytes or log.end - log.start > self._most_messages):
            self._forget_settled(count, now)

    def _forget_settled(self, count: int, now: float) -> None:
        """Without a declared retention: forget settled messages beyond the history, some more than needed at a time."""
        log = self.log
        if log.bytes <= self._most_bytes:
            # A few settled messages too many do no harm, and looking for them each time would cost more.
            self._unlooked += count
            if self._unlooked < self._slack:
                return
        self._unlooked = 0
        floor = log.end
        for group in self.groups.values():
            floor = min(floor, group.floor())
            if floor <= log.start:
                return
        target = min(floor, max(log.start, log.end - self._limits.history_messages))
        self._remove_to(log.within_bytes(target, floor, self._limits.history_bytes), now)

    def _retained_from(self, wall_ms: int) -> int:
        log, spec = self.log, self.spec
        target = log.start
        if spec.max_messages is not None:
            target = max(target, log.end - spec.max_messages)
        if spec.max_age is not None:
            # A message is gone when its age has reached the bound.
            target = max(target, log.at_time(wall_ms - int(spec.max_age * 1000) + 1))
        if spec.max_bytes is not None:
            target = log.within_bytes(target, log.end, spec.max_bytes)
        return target

    def _remove_to(self, target: int, now: float) -> None:
        if target > self.log.start:
            for group in self.groups.values():
                group.before_removal(target, now)
            self.log.remove_to(target)

    # Groups.

    def create_group(self, name: str, spec: GroupSpec) -> Group:
        """
        The group of that name, created now where there was none.

        Raises:
            InvalidRequest: Key order on a topic that was not declared for it.
            PositionOutOfRange: It would start beyond the end.
        """
        group = self.groups.get(name)
        if group is None:
            cursor, skipped = self.resolve(spec.start)
            if spec.ordering == "none":
                group = Group(name, spec, self.log, cursor, self._numbers)
            elif self.spec.ordering == "key":
                parked = self._limits.parked_messages
                group = OrderedGroup(name, spec, self.log, cursor, self._numbers, parked)
            else:
                raise InvalidRequest(f"topic {self.name!r} has no key order, so group {name!r} can't have it")
            group.removed = group.unreported = skipped
            self.groups[name] = group
        return group

    def resolve(self, start: Start) -> tuple[int, int]:
        """The offset that a start means now, and how many messages before it were asked for but are gone."""
        log = self.log
        if start == "latest":
            return log.end, 0
        if start == "earliest":
            return log.start, 0
        if isinstance(start, AtTime):
            return log.at_time(-(-start.microseconds // 1000)), 0
        if not isinstance(start, AtOffset) or not 0 <= start.offset <= log.end:
            raise PositionOutOfRange(f"topic {self.name!r} ends at {log.end}; there is no position {start!r}")
        return max(start.offset, log.start), max(0, log.start - start.offset)

    def delete_group(self, name: str) -> None:
        """End the group and the sessions of its members; none of that name is fine."""
        group = self.groups.pop(name, None)
        if group is not None:
            _end(group, GroupMissing, f"group {name!r} of topic {self.name!r} was deleted")

    def delete(self) -> None:
        """End every group."""
        for group in self.groups.values():
            _end(group, TopicMissing, f"topic {self.name!r} was deleted")
        self.groups.clear()


def _end(group: Group, kind: type[BrokerError], text: str) -> None:
    group.seek(group.cursor, 0)
    for session in group.sessions.values():
        session.ended = (kind, text)
    group.sessions.clear()
