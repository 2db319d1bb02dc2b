"""A member's place in line for one partition of an ordered group, for the time of one connection.

Knows what of the partition is unsettled here, whose turn it is, and what the next owner must be told of it. Lends
nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from pika import BasicProperties

from unistream.core.partitions import KeyTurns
from unistream.driver.types import RawMessage
from unistream_rabbitmq.balance import now
from unistream_rabbitmq.ledger import OTHERS, Ledger, Note, identity
from unistream_rabbitmq.link import Channel, Wire
from unistream_rabbitmq.messages import arrived

__all__ = ["Item", "Place"]


class Item:
    """
    An unsettled message of a partition.

    Attributes:
        spent: Lendings that count before the next one; of a suspect, with the one that may have killed its member.
        lost: How often the broker returned it.
        origin: The last owner's note, which stands for a suspect until it is lent here: what is lost beside it
            meanwhile counts once.
        suspect: The last loan of it ended without a word.
    """

    __slots__ = ("due", "lost", "message", "native", "origin", "published_at", "spent", "suspect", "tag")

    def __init__(self, method: Any, properties: BasicProperties, body: bytes) -> None:
        said = arrived(method, properties, body)
        self.tag: int = method.delivery_tag
        self.message: RawMessage = said.message
        self.native = properties
        self.published_at = said.published_at
        self.spent = said.spent
        self.lost = said.lost
        self.suspect = False
        self.due = 0.0
        self.origin: Note | None = None

    def note(self, leaving: bool) -> Note:
        """What the next owner must know; `leaving`: the broker will count one more return."""
        return self.origin or Note(self.spent, self.due, self.lost + leaving)


class Place:
    """
    One connection's place in line.

    Args:
        number: The partition.
        wire: The connection.
        channel: The channel that consumes.
        ledger: The notes on the partition; `None` where nobody comes after.

    Attributes:
        since: Since when it stands there.
        active: Something was pushed: this member is the owner.
        leaving: It is to be left once nothing of it is lent.
        resting: It is not to be taken again before messages are asked for.
        items: What is unsettled, by delivery tag.
        turns: Whose turn it is, by key.
        open_notes: The ledger excuses returns of messages that it does not name. Before anything is lent that must be
            taken back, or the loss of this owner would be excused too.
    """

    def __init__(self, number: int, wire: Wire, channel: Channel, ledger: Ledger | None) -> None:
        self.number = number
        self.wire = wire
        self.channel = channel
        self.since = now()
        self.active = False
        self.leaving = False
        self.resting = False
        self.items: dict[int, Item] = {}
        self.turns: KeyTurns[Item] = KeyTurns()
        self.open_notes = False
        self._ledger = ledger
        # Pushed, but not looked at until the last owner's notes are read.
        self._unread: deque[Item] = deque()
        self._notes: dict[str, Note] | None = None if ledger is not None else {}

    def arrive(self, item: Item) -> None:
        """Take what the broker pushed."""
        self.active = True
        self.items[item.tag] = item
        self._unread.append(item)

    async def read(self) -> list[Item]:
        """Look at what was pushed, first at the last owner's notes; returns what can be lent, in turn."""
        if not self._unread:
            return []
        if self._notes is None and self._ledger is not None:
            notes = await self._ledger.read()
            if self._notes is None:
                self._notes = notes
                self.open_notes = OTHERS in notes
        return self._look(self._notes or {})

    def _look(self, notes: dict[str, Note]) -> list[Item]:
        ready = []
        while self._unread:
            item = self._unread.popleft()
            if item.lost:
                note = notes.pop(identity(item.message), None) or notes.get(OTHERS, Note())
                item.spent = max(item.spent, note.spent)
                item.due = note.due
                if item.lost > note.returns:
                    item.suspect = True
                    item.origin = note
                    item.spent += 1
            elif notes:
                notes.clear()  # what returned comes first, so all of it has come
            if self.turns.offer(item.message.key, item):
                ready.append(item)
        return ready

    async def write(self, *, leaving: bool = False) -> None:
        """Replace the notes: for whoever comes after a loss from now on, or, leaving, for the next owner."""
        if self._ledger is None:
            return  # nobody comes after
        if leaving:
            await self.read()
        known = self._notes or {}
        notes = {name: note for name, note in known.items() if name != OTHERS}
        if leaving:
            # What the broker pushes while this is written, too late to be named.
            notes[OTHERS] = Note(returns=known.get(OTHERS, Note()).returns + 1)
        for item in self.items.values():
            note = item.note(leaving)
            if note != Note():
                notes[identity(item.message)] = note
        await self._ledger.write(notes)
        self.open_notes = leaving

    def forget(self) -> None:
        """Its connection is gone."""
        self.items.clear()
        self._unread.clear()
