"""The messages of one topic in publish order; knows offsets, bytes and times, nothing of groups."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import itemgetter
from typing import Any

from .spec import Entry

__all__ = ["Log", "entry_bytes"]

_VALUE, _KEY, _HEADERS = itemgetter(1), itemgetter(2), itemgetter(3)


def entry_bytes(entries: Sequence[Entry]) -> list[int]:
    """The size of each entry: value, key and headers together."""
    if not any(map(_KEY, entries)) and not any(map(_HEADERS, entries)):
        return list(map(len, map(_VALUE, entries)))
    return [
        len(e[1]) + len(e[2] or b"") + (sum([len(name) + len(value) for name, value in e[3]]) if e[3] else 0)
        for e in entries
    ]


class Log:
    """An array of entries: `start` is the oldest offset kept, `end` the next one to come.

    Removed entries let go of their memory at once; the slots they leave at the front are closed in large
    steps, so that removing costs the same per message however long the log is.
    """

    __slots__ = ("_base", "_entries", "_sizes", "_times", "bytes", "end", "start")

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._times: list[int] = []
        self._sizes = array("Q")
        self._base = 0
        self.start = 0
        self.end = 0
        self.bytes = 0

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, offset: int) -> Entry:
        """The entry at an offset in `[start, end)`."""
        entry: Entry = self._entries[offset - self._base]
        return entry

    def append(self, entries: Sequence[Entry], sizes: Sequence[int], wall_ms: int) -> None:
        """Add entries taken at `wall_ms`. Times never fall, so a clock that is set back does not spoil searches."""
        times = self._times
        if times and times[-1] > wall_ms:
            wall_ms = times[-1]
        if len(entries) == 1:
            self._entries.append(entries[0])
            times.append(wall_ms)
            self._sizes.append(sizes[0])
            self.end += 1
            self.bytes += sizes[0]
            return
        self._entries += entries
        times.extend(repeat(wall_ms, len(entries)))
        self._sizes.extend(sizes)
        self.end += len(entries)
        self.bytes += sum(sizes)

    def slice(self, first: int, count: int) -> tuple[list[Entry], list[int]]:
        """Entries and times of `count` consecutive offsets."""
        i = first - self._base
        return self._entries[i : i + count], self._times[i : i + count]

    def pick(self, offsets: Iterable[int]) -> tuple[list[Entry], list[int]]:
        """Entries and times of these offsets."""
        entries, times, base = self._entries, self._times, self._base
        indices = [offset - base for offset in offsets]
        return [entries[i] for i in indices], [times[i] for i in indices]

    def keys(self, offsets: Iterable[int]) -> list[bytes | None]:
        """The keys of these offsets."""
        entries, base = self._entries, self._base
        return [entries[offset - base][2] for offset in offsets]

    def at_time(self, wall_ms: int) -> int:
        """The first offset kept whose time is at or after `wall_ms`; `end` where there is none."""
        return bisect_left(self._times, wall_ms, self.start - self._base) + self._base

    def within_bytes(self, first: int, last: int, most: int) -> int:
        """The least offset in `[first, last]` from which on at most `most` bytes are kept; `last` if none is."""
        sizes, base = self._sizes, self._base
        left = self.bytes - sum(sizes[self.start - base : first - base])
        while left > most and first < last:
            left -= sizes[first - base]
            first += 1
        return first

    def remove_to(self, offset: int) -> None:
        """Remove everything before `offset`."""
        i, j = self.start - self._base, offset - self._base
        self.bytes -= sum(self._sizes[i:j])
        self.start = offset
        if j > 1024 + (len(self._entries) >> 3):
            del self._entries[:j]
            del self._times[:j]
            del self._sizes[:j]
            self._base = offset
        else:
            self._entries[i:j] = [None] * (j - i)
