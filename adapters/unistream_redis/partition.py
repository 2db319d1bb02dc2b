"""One partition of an ordered group as its owner sees it: whose turn it is, what waits, what is lent. No I/O.

Entries come in the order of the stream. One entry per key is out at a time; it keeps the turn of its key through
nacks, delays and lost leases, until it is done.
"""

from __future__ import annotations

import heapq
from collections import deque

from unistream.core.partitions import KeyTurns

__all__ = ["Item", "Partition"]

WAITING_MOST = 1000
"""Entries that wait behind others of their key before the partition is read no further; each is an id and a key."""


class Item:
    """
    An entry that the group has been given and that is not settled.

    Attributes:
        entry: Its id.
        key: Its key.
        count: How often it was lent.
        suspect: Its last loan ended without a word.
        until: When its loan ends, by the loop's clock.
    """

    __slots__ = ("count", "entry", "key", "suspect", "until")

    def __init__(self, entry: bytes, key: bytes | None, count: int, suspect: bool = False) -> None:
        self.entry = entry
        self.key = key
        self.count = count
        self.suspect = suspect
        self.until = 0.0


class Partition:
    """
    What the owner knows.

    Attributes:
        index: Its number.
        fence: Proof of ownership, unlike any before.
        valid_until: When the ownership ends unless it is renewed, by the loop's clock.
        surplus: It is to be given away as soon as nothing is lent.
        leaving: It stands still until then.
        stay_until: Until when it is not asked to leave again, by the loop's clock: it had stood still for too long.
        doubtful: A reply was lost: something after `last` may be pending that is not known here.
        last: The id of the last entry read.
        loaded: What the owner before left has been taken over.
        lent: Items by entry id that are lent.
    """

    def __init__(self, index: int, fence: bytes, valid_until: float) -> None:
        self.index = index
        self.fence = fence
        self.valid_until = valid_until
        self.surplus = False
        self.leaving = False
        self.stay_until = 0.0
        self.doubtful = False
        self.loaded = False
        self.last = b"0-0"
        self.lent: dict[bytes, Item] = {}
        self._turns: KeyTurns[tuple[Item, float]] = KeyTurns()
        self._ready: deque[Item] = deque()
        self._delayed: list[tuple[float, int, Item]] = []
        self._order = 0

    @property
    def readable(self) -> bool:
        """Whether more may be read from the stream."""
        return self.loaded and not self.leaving and self._turns.waiting + len(self._ready) < WAITING_MOST

    @property
    def ready(self) -> bool:
        """Whether something can be lent now."""
        return bool(self._ready) and not self.leaving

    @property
    def suspicious(self) -> bool:
        """Whether what can be lent next is a suspect, which is lent alone."""
        return bool(self._ready) and self._ready[0].suspect

    @property
    def next_due(self) -> float | None:
        """When the next delay is over."""
        return self._delayed[0][0] if self._delayed else None

    def offer(self, item: Item, due: float = 0.0) -> bool:
        """Take up an entry in the order of the stream; True if it has its turn now, to be queued until `due`."""
        return self._turns.offer(item.key, (item, due))

    def put_back(self, item: Item, due: float = 0.0) -> None:
        """Lend an entry that has its turn again, not before `due`; before what came later."""
        if due > 0:
            self._order += 1
            heapq.heappush(self._delayed, (due, self._order, item))
        else:
            self._ready.appendleft(item)

    def queue(self, item: Item, due: float = 0.0) -> None:
        """Lend an entry that has its turn when there is room, after the others, and not before `due`."""
        if due > 0:
            self.put_back(item, due)
        else:
            self._ready.append(item)

    def done(self, item: Item) -> None:
        """The entry is settled for good: the next one of its key has its turn."""
        following = self._turns.done(item.key)
        if following is not None:
            self.queue(*following)

    def wake(self, now: float) -> None:
        """Make ready what was delayed until now."""
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])

    def expired(self, now: float) -> list[Item]:
        """Loans whose time is up."""
        return [item for item in self.lent.values() if item.until <= now]

    def next_ready(self, most: int) -> list[Item]:
        """Take what can be lent now, up to `most`; a suspect alone."""
        ready = self._ready
        if ready and ready[0].suspect:
            return [ready.popleft()]
        items: list[Item] = []
        while ready and len(items) < most and not ready[0].suspect:
            items.append(ready.popleft())
        return items
