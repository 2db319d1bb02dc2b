"""One partition in the hands of one member: what is settled, what may be lent, what rests, and how it is written down.

Kafka stores a cursor per group and partition, and with it a text of at most 4096 bytes. The text holds what the cursor
can't: what is settled beyond it, how often the rest was lent (`Frontier`), and until when nacked messages rest. So a
new owner goes on where the old one stopped, however that one ended. Touched by the event loop alone; no clock.
"""

from __future__ import annotations

import json
import zlib
from base64 import b85decode, b85encode
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from unistream.core.frontier import Frontier
from unistream.core.partitions import KeyTurns

__all__ = ["Progress", "settled_beyond"]

_SEPARATOR = " "  # not in the alphabet of base 85
_RESTS_BYTES = 1500
_MOST_JSON = 1 << 16
_LONG_AGO = 1.0
"""Until when what may be lent at once rests."""


def settled_beyond(cursor: int, text: str) -> int:
    """How many messages after a stored cursor are settled."""
    return Frontier.restore(cursor, text.partition(_SEPARATOR)[0]).settled_ahead


class Progress:
    """
    The messages of one owned partition.

    A message is in one of these states: waiting in `fresh` or, if its last member ended without a word of it, in
    `suspects`; waiting behind another of its key (ordered groups); lent; resting after a nack, in `rests`; settled.

    Args:
        partition: Its number.
        cursor: The offset that Kafka holds for the group.
        text: The text that is stored with it.
        ordered: Whether messages of one key are lent one at a time.

    Attributes:
        fresh: Messages that may be lent.
        suspects: Messages that may be lent, each alone.
        rests: Offset -> seconds since the epoch until which it rests. It stays here until it is lent again, so that
            the next owner knows that nobody was lost over it.
        dirty: Whether something changed since it was last written down.
    """

    __slots__ = (
        "_known",
        "_messages",
        "_old_rests",
        "_suspected",
        "_turns",
        "dirty",
        "fresh",
        "frontier",
        "partition",
        "rests",
        "suspects",
    )

    def __init__(self, partition: int, cursor: int, text: str, *, ordered: bool) -> None:
        known, _, rests = text.partition(_SEPARATOR)
        self.partition = partition
        self.frontier = Frontier.restore(cursor, known)
        self.fresh: deque[Any] = deque()
        self.suspects: deque[Any] = deque()
        self.rests: dict[int, float] = {}
        self.dirty = False
        self._known = bool(known)
        self._old_rests = _read_rests(rests)
        self._messages: dict[int, Any] = {}
        # Offsets over which a member was lost, until somebody settles or nacks them.
        self._suspected: set[int] = set()
        self._turns: KeyTurns[Any] | None = KeyTurns() if ordered else None

    @property
    def unsettled(self) -> int:
        """Messages at hand that are not settled."""
        return len(self._messages)

    def arrive(self, messages: Iterable[Any], now: float) -> list[int]:
        """
        Take note of messages that Kafka handed over, in order.

        Args:
            messages: ConsumerRecords.
            now: Seconds since the epoch.

        Returns:
            Offsets that rest: they may be lent at `rests[offset]`.
        """
        resting = []
        frontier, turns, kept = self.frontier, self._turns, self._messages
        for message in messages:
            offset = message.offset
            if not frontier.register(offset):
                continue
            kept[offset] = message
            due = self._old_rests.pop(offset, 0.0) if self._old_rests else 0.0
            if due > now:
                self.rests[offset] = due
                resting.append(offset)
                if turns is not None and not turns.offer(message.key, message):
                    # Cannot be: a message rests only while it has the turn of its key. Metadata that someone wrote
                    # by hand may say so; the key then decides.
                    del self.rests[offset]
                    resting.pop()
                continue
            if due > 0:
                self.rests[offset] = due
            if turns is None or turns.offer(message.key, message):
                self._offer(message)
        return resting

    def _offer(self, message: Any) -> None:
        if self._known and message.offset not in self.rests:
            lent_before = self.frontier.lend(message.offset) > 1
            self.frontier.give_back(message.offset)
            if lent_before:
                self._suspected.add(message.offset)
                self.suspects.append(message)
                return
        self.fresh.append(message)

    def lend(self, message: Any) -> int:
        """Count a lending; returns the attempt that it is."""
        self.dirty = True
        if self.rests:
            self.rests.pop(message.offset, None)
        return self.frontier.lend(message.offset)

    def settle(self, message: Any) -> None:
        """It is done; the next of its key may be lent."""
        self.dirty = True
        offset = message.offset
        self._suspected.discard(offset)
        self.frontier.settle(offset)
        del self._messages[offset]
        if self._turns is not None:
            following = self._turns.done(message.key)
            if following is not None:
                self._offer(following)

    def rest(self, message: Any, until: float) -> None:
        """It was nacked and rests until then."""
        self.dirty = True
        self._suspected.discard(message.offset)
        self.rests[message.offset] = until

    def wake(self, offset: int) -> None:
        """Its rest is over: it may be lent."""
        self.fresh.append(self._messages[offset])

    def nack(self, message: Any) -> None:
        """It was nacked without a delay: it may be lent."""
        self.rest(message, _LONG_AGO)
        self.fresh.append(message)

    def give_back(self, messages: Iterable[Any]) -> None:
        """They were lent and come back untouched, in this order: the lending does not count."""
        self.dirty = True
        for message in reversed(list(messages)):
            offset = message.offset
            lent_before = self.frontier.give_back(offset) > 0
            if offset in self._suspected:
                self.suspects.appendleft(message)
                continue
            if lent_before:
                self.rests[offset] = _LONG_AGO
            self.fresh.appendleft(message)

    def expire(self, message: Any) -> None:
        """Its lease ended, or the contact with Kafka did, while its member lives: the lending counts."""
        self.fresh.append(message)

    def text(self, most_bytes: int) -> str:
        """What is stored with the cursor `frontier.frontier`; what does not fit is left out, the farthest first."""
        rests = _write_rests(self.rests) if self.rests else ""
        if len(rests) > most_bytes:
            rests = ""
        return self.frontier.encode_beyond(most_bytes - len(rests)) + rests


def _write_rests(rests: dict[int, float]) -> str:
    soonest = sorted(rests.items(), key=lambda item: item[1])
    while soonest:
        text = (
            _SEPARATOR
            + b85encode(zlib.compress(json.dumps([[at, round(due, 2)] for at, due in soonest]).encode(), 9)).decode()
        )
        if len(text) <= _RESTS_BYTES:
            return text
        del soonest[len(soonest) * _RESTS_BYTES // len(text) :]
    return ""


def _read_rests(text: str) -> dict[int, float]:
    # Anybody may have written the text; nonsense is as good as none.
    try:
        plain = zlib.decompressobj().decompress(b85decode(text), _MOST_JSON)
        return {int(at): float(due) for at, due in _pairs(json.loads(plain or b"[]"))}
    except (ValueError, TypeError, zlib.error):
        return {}


def _pairs(value: Any) -> Iterator[Any]:
    if not isinstance(value, list):
        raise TypeError("no list of pairs")
    return iter(value)
