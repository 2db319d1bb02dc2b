"""What a member fetched and nobody has taken yet: judged, handed over, or given back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from unistream.core.partitions import partition_for
from unistream.driver.types import GroupSpec, RawDelivery, TopicSpec
from unistream_nats.entries import message_of
from unistream_nats.lane import Arrival
from unistream_nats.loans import Loan, Loans
from unistream_nats.notes import Notes

__all__ = ["Shelf"]

_KEPT_SECONDS = 1.0
"""How long a message waits here for somebody to take it, before it goes back."""
_MOST_SUBJECTS = 4096


class Shelf:
    """
    What came and is not handed over.

    Whatever the server hands over goes through here, so that nothing is lost when `receive` is cancelled.

    Attributes:
        cautious: Suspects are about: fetch one message at a time.
    """

    def __init__(self, group: GroupSpec, topic: TopicSpec, loans: Loans, notes: Notes) -> None:
        self._group = group
        self._topic = topic
        self._loans = loans
        self._notes = notes
        self._loop = asyncio.get_running_loop()
        # Lent before, so the notes must be looked at; and ready to be handed over.
        self._fresh: list[Arrival] = []
        self._held: deque[Loan] = deque()
        self._handling = asyncio.Lock()
        self._partitions: dict[bytes, int] = {}
        self.cautious = False

    def __len__(self) -> int:
        """How many messages there are."""
        return len(self._fresh) + len(self._held)

    def put(self, arrival: Arrival) -> None:
        """Take up a message that came."""
        if arrival.lending == 1:
            self._held.append(Loan(arrival, None, False))
        else:
            self._fresh.append(arrival)

    def clear(self) -> None:
        """Forget everything: it is not lent to this member any more."""
        self._held.clear()
        self._fresh.clear()

    async def take(self, limit: int, started: float) -> list[RawDelivery]:
        """
        What may be handed over: a suspect alone, and nothing else is kept here beside it.

        Args:
            limit: The most messages.
            started: When the call began that asks for them: their leases count from there.
        """
        async with self._handling:
            await self._judge()
            ended = self._loop.time() - self._group.lease
            self._held = held = deque(loan for loan in self._held if loan.arrival.asked > ended)
            if not held:
                return []
            if held[0].suspect:
                taken = [held[0]]
                if len(held) > 1:
                    await self._return(list(held)[1:])
                self.cautious = True
            else:
                taken = []
                for loan in held:
                    if loan.suspect or len(taken) == limit:
                        break
                    taken.append(loan)
                self.cautious = self.cautious and any(loan.suspect for loan in held)
            early = [loan for loan in taken if loan.arrival.asked < started]
            if early:
                await self._loans.refresh(early)
            for _ in taken:
                held.popleft()
            return [self._deliver(loan, started) for loan in taken]

    async def return_stale(self) -> None:
        """Give back what waited too long for somebody to take it."""
        before = self._loop.time() - min(_KEPT_SECONDS, self._group.lease / 3)
        async with self._handling:
            if self._fresh and self._fresh[0].at < before:
                await self._judge()
            stale = [loan for loan in self._held if loan.arrival.at < before]
            if stale:
                await self._return(stale)

    async def return_all(self) -> None:
        """Give back everything."""
        async with self._handling:
            await self._judge()
            if self._held:
                await self._return(list(self._held))

    async def _judge(self) -> None:
        """Find out how the loans before ended; what came before its delay was over goes back for the rest of it."""
        fresh = list(self._fresh)
        if not fresh:
            return
        notes = await self._notes.read([(arrival.lane.name, arrival.sequence) for arrival in fresh])
        early: list[tuple[Loan, float]] = []
        for arrival, note in zip(fresh, notes, strict=True):
            ended = note is not None and note.lending == arrival.lending - 1
            suspect = note is None or note.suspect or not ended
            loan = Loan(arrival, note, suspect)
            rest = self._loans.early(note) if note is not None and ended else 0.0
            if rest:
                early.append((loan, rest))
            else:
                self._held.append(loan)
        del self._fresh[: len(fresh)]
        if early:
            await asyncio.shield(asyncio.ensure_future(self._loans.give_back(early)))

    async def _return(self, loans: Sequence[Loan]) -> None:
        """Give back, untouched; goes on when the caller is cancelled."""
        for loan in loans:
            self._held.remove(loan)
        await asyncio.shield(asyncio.ensure_future(self._loans.give_back([(loan, 0.0) for loan in loans])))

    def _deliver(self, loan: Loan, started: float) -> RawDelivery:
        arrival = loan.arrival
        subject, _, head, body = arrival.native
        partition = self._partitions.get(subject)
        if partition is None:
            partition = self._partition_of(subject)
        message = message_of(head, body, partition)
        if partition < 0:
            key = message.key
            at = 0 if key is None else partition_for(key, self._topic.partitions)
            message = message._replace(partition=at)
        untouched = 0 if loan.note is None else loan.note.untouched
        return RawDelivery(
            message,
            self._loans.lend(loan, started),
            str(arrival.sequence),
            arrival.nanoseconds // 1000 / 1e6,  # not rounded up: a start at this time includes the message
            max(1, arrival.lending - untouched),
            loan.suspect,
            arrival.native,
        )

    def _partition_of(self, subject: bytes) -> int:
        """The partition that a subject names; -1 where a foreign program used another."""
        words = subject.split(b".")
        number = int(words[2]) if len(words) > 2 and words[2].isdigit() else -1
        if number >= self._topic.partitions:
            number = -1
        if len(self._partitions) < _MOST_SUBJECTS:
            self._partitions[subject] = number
        return number
