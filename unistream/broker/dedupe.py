"""Which ids a topic has taken lately; knows nothing of messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

__all__ = ["Window"]

# An id is forgotten between one window and this much more than one window after it was taken.
_RESOLUTION = 0.01


class Window:
    """Ids -> offsets, remembered for `seconds`, or for the last `ids` ids if those come faster.

    Two generations: the younger one takes new ids; when it is old or full it becomes the elder one and the elder
    one is forgotten. So nothing is ever evicted one by one, and at most twice the promised is held. What is past
    its time inside a generation is told by offset: each of `_marks` says that what is below this offset was taken at
    this time or before.
    """

    __slots__ = ("_elder", "_ids", "_last", "_marks", "_next_turn", "_seconds", "_since", "_valid_from", "_younger")

    def __init__(self, seconds: float, ids: int) -> None:
        self._seconds = seconds
        self._ids = ids
        self._since = self._next_turn = self._last = float("-inf")
        self._younger: dict[str, int] = {}
        self._elder: dict[str, int] = {}
        self._marks: deque[tuple[float, int]] = deque()
        self._valid_from = 0

    def turn(self, now: float, end: int) -> None:
        """Forget what is past its time; call it before asking, with the offset that the next message will have."""
        last, self._last = self._last, now
        if now < self._next_turn and len(self._younger) < self._ids:
            return
        age = now - self._since
        if age >= self._seconds or len(self._younger) >= self._ids:
            # Ids come in only while their generation is younger than the window: twice that, and all are past it.
            self._elder = self._younger if age < 2 * self._seconds else {}
            self._younger = {}
            self._since = now
        marks = self._marks
        marks.append((last, end))
        while marks and marks[0][0] <= now - self._seconds:
            self._valid_from = marks.popleft()[1]
        self._next_turn = now + self._seconds * _RESOLUTION

    def claim(self, ids: Sequence[str], first: int) -> bool:
        """
        Remember a batch as stored at `first` and following, if every id of it is new and differs from the others.

        Returns:
            False if some may not be new: nothing is remembered then, and `offset` tells of each.
        """
        younger = self._younger
        if len(ids) == 1:
            if ids[0] in younger or ids[0] in self._elder:
                return False
            younger[ids[0]] = first
            return True
        if not (younger.keys().isdisjoint(ids) and self._elder.keys().isdisjoint(ids)):
            return False
        expected = len(younger) + len(ids)
        younger.update(zip(ids, range(first, first + len(ids)), strict=True))
        if len(younger) == expected:
            return True
        for id_ in set(ids):
            del younger[id_]
        return False

    def offset(self, id_: str) -> int | None:
        """Where the message with this id was stored, or `None` if it is not remembered."""
        offset = self._younger.get(id_)
        if offset is None:
            offset = self._elder.get(id_)
        return offset if offset is not None and offset >= self._valid_from else None

    def add(self, ids: dict[str, int]) -> None:
        """Remember these."""
        self._younger.update(ids)
