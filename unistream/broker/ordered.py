"""A group in key order: one unsettled message per key at a time, whatever happens to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappush

from .group import PARKED, Group
from .lease import Session, Tag
from .log import Log
from .spec import GroupSpec

__all__ = ["OrderedGroup"]


class OrderedGroup(Group):
    """A group with `ordering="key"`.

    A key is busy from the moment its message is taken from the log until that message is settled: through nack, delay,
    lease end and loss of the member. Younger messages of a busy key are parked, in publish order, and stop nobody
    else's. A message without key is never held back.
    """

    _follows = True

    def __init__(
        self, name: str, spec: GroupSpec, log: Log, cursor: int, numbers: Iterator[int], parked_limit: int
    ) -> None:
        super().__init__(name, spec, log, cursor, numbers)
        self.parked = 0
        self._parked_limit = parked_limit
        # Busy key -> its parked offsets; None until there is one.
        self._lanes: dict[bytes, deque[int] | None] = {}
        # Keys of lent messages that the log no longer has.
        self._keys: dict[int, bytes | None] = {}

    def available(self, now: float) -> bool:
        """Whether a grant would probably find something."""
        unseen = self.cursor < self._log.end and self.parked < self._parked_limit
        return unseen or self.next_due() <= now

    def _fresh(self, room: int) -> Sequence[int]:
        """Take up to `room` messages of idle keys; park those of busy ones on the way."""
        taken: list[int] = []
        cursor, end, lanes = self.cursor, self._log.end, self._lanes
        while room > len(taken) and cursor < end:
            for entry in self._log.slice(cursor, room - len(taken))[0]:
                key = entry[2]
                if key is None:
                    taken.append(cursor)
                elif key not in lanes:
                    lanes[key] = None
                    taken.append(cursor)
                elif self.parked < self._parked_limit:
                    self._park(key, cursor)
                else:
                    end = cursor
                    break
                cursor += 1
        self.cursor = cursor
        return taken

    def _park(self, key: bytes, offset: int) -> None:
        lane = self._lanes[key]
        if lane is None:
            self._lanes[key] = deque((offset,))
        else:
            lane.append(offset)
        self.waiting[offset] = PARKED
        self.parked += 1

    def _settled(self, offsets: Sequence[int], now: float) -> None:
        """Let the next message of each key take its turn."""
        keys: Iterable[bytes | None]
        if self._keys:
            keys = [self._keys.pop(o) if o in self._keys else self._log[o][2] for o in offsets]
        else:
            keys = self._log.keys(offsets)
        for key in keys:
            if key is not None:
                self._advance(key, now)

    def _advance(self, key: bytes, now: float) -> None:
        lane = self._lanes[key]
        if lane:
            offset = lane.popleft()
            self.parked -= 1
            self.waiting[offset] = now
            heappush(self._due, (now, offset))
        else:
            del self._lanes[key]

    def before_removal(self, target: int, now: float) -> None:
        """Keep the keys of what is lent, to know later whose turn a settle ends."""
        self.expire(now)
        for offset in range(self._log.start, min(target, self.cursor)):
            if offset in self.leased:
                self._keys[offset] = self._log[offset][2]
        super().before_removal(target, now)

    def _remove_waiting(self, offset: int, now: float) -> None:
        key = self._log[offset][2]
        parked = self.waiting[offset] == PARKED
        super()._remove_waiting(offset, now)
        if parked:
            # Waiting messages are removed lowest first, so this one heads its lane.
            lane = self._lanes[key]
            if lane is None or lane.popleft() != offset:
                raise AssertionError(f"offset {offset} is parked but does not head the lane of {key!r}")
            self.parked -= 1
        elif key is not None:
            self._advance(key, now)

    def seek(self, target: int, skipped: int) -> dict[Session, list[Tag]]:
        """Start again at `target`; every turn ends with the loans."""
        ended = super().seek(target, skipped)
        self._lanes.clear()
        self._keys.clear()
        self.parked = 0
        return ended
