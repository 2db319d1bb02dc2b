"""The state machine of one group: what is unseen, lent, waiting or settled, and every way from one to the next.

Only unsettled messages below the cursor cost memory. One lease object and one timer entry stand for a whole granted
batch. Time comes in as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from heapq import heapify, heappop, heappush

from .lease import OFFSETS, Lease, Lent, Session, Tag
from .log import Log
from .spec import GroupSpec

__all__ = ["PARKED", "Group"]

PARKED = -1.0
"""In `waiting`, in place of a due time: held back until an older message of the key is settled."""

# Makes the named tuple without a Python frame.
_lent: Callable[[tuple[object, ...]], Lent] = partial(tuple.__new__, Lent)

# A heap is rebuilt when more than half of it, and more than this, are entries of what has gone.
_SLACK = 1024


class Group:
    """A group that promises no order (`ordering="none"`), and the base of the one that does.

    For every offset of the log exactly one holds: settled; lent (in `leased`); waiting, ready at a time (in `waiting`);
    unseen (at or beyond `cursor`); removed under the group (counted in `removed`).

    Attributes:
        cursor: The first offset never looked at.
        leased: Offset -> its lease.
        waiting: Offset -> when it is ready, or `PARKED`.
        removed: Messages that were removed before this group settled them.
        unreported: Those of them that nobody has been told of.
        sessions: The members, by name.
    """

    _follows = False
    """Whether `_settled` does anything."""

    def __init__(self, name: str, spec: GroupSpec, log: Log, cursor: int, numbers: Iterator[int]) -> None:
        self.name = name
        self.spec = spec
        self.cursor = cursor
        self.leased: dict[int, Lease] = {}
        self.waiting: dict[int, float] = {}
        self.removed = 0
        self.unreported = 0
        self.sessions: dict[str, Session] = {}
        self._log = log
        self._numbers = numbers
        self._lease_seconds = spec.lease
        self._floor = cursor
        # No waiting offset is below this.
        self._low = cursor
        # Lendings spent, and whether the last one was lost; only for unsettled messages that have any.
        self._attempts: dict[int, int] = {}
        self._suspects: set[int] = set()
        # (ready at, offset) and (deadline, serial, lease); entries may outlive what they stand for.
        self._due: list[tuple[float, int]] = []
        self._ends: list[tuple[float, int, Lease]] = []
        self._open = 0

    # What is.

    @property
    def lag(self) -> int:
        """Messages published and not settled, exactly."""
        return self._log.end - self.cursor + len(self.leased) + len(self.waiting)

    def floor(self) -> int:
        """The lowest offset kept that this group has not settled; everything below may be forgotten."""
        floor, cursor, leased, waiting = max(self._floor, self._log.start), self.cursor, self.leased, self.waiting
        if not leased and not waiting:
            floor = cursor
        while floor < cursor and floor not in leased and floor not in waiting:
            floor += 1
        self._floor = floor
        return floor

    def available(self, now: float) -> bool:
        """Whether a grant would probably find something."""
        return self.cursor < self._log.end or self.next_due() <= now

    def next_due(self) -> float:
        """The next time at which something may become ready by itself; infinity if nothing will."""
        due, ends = self._due, self._ends
        while due and self.waiting.get(due[0][1]) != due[0][0]:
            heappop(due)
        while ends and not ends[0][2].open:
            heappop(ends)
        ready = due[0][0] if due else float("inf")
        return min(ready, ends[0][0]) if ends else ready

    # Lending.

    def grant(self, session: Session, limit: int, now: float) -> Lent | None:
        """
        Lend up to `limit` messages, those that wait for redelivery first; a suspect is lent alone.

        `None` if there is nothing to lend now.
        """
        ends = self._ends
        if ends and ends[0][0] <= now:
            self.expire(now)
        again = self._ready(limit, now) if self._due else None
        suspect = False
        offsets: Sequence[int]
        if not again:
            offsets = self._fresh(limit)
            if not offsets:
                return None
        elif again[0] in self._suspects:
            suspect = True
            offsets = again
        else:
            offsets = [*again, *self._fresh(limit - len(again))]
        # Messages that were lent before a seek are unseen again, with their attempts.
        spent = self._attempts
        attempts = [spent.get(offset, 0) + 1 for offset in offsets] if spent else [1] * len(offsets)
        if isinstance(offsets, range):
            entries, times = self._log.slice(offsets.start, len(offsets))
        else:
            entries, times = self._log.pick(offsets)
        token = next(self._numbers) * (OFFSETS + 1)
        deadline = now + self._lease_seconds
        self._lend(Lease(token, session, now, deadline, offsets), token)
        return _lent((token, deadline, offsets, entries, times, attempts, suspect))

    def _ready(self, limit: int, now: float) -> list[int]:
        """Take the waiting messages that are due, lowest (due, offset) first, a suspect only by itself."""
        taken: list[int] = []
        due, waiting, suspects = self._due, self.waiting, self._suspects
        while due and due[0][0] <= now and len(taken) < limit:
            at, offset = due[0]
            if waiting.get(offset) == at:
                if offset in suspects:
                    if not taken:
                        heappop(due)
                        del waiting[offset]
                        taken.append(offset)
                    break
                del waiting[offset]
                taken.append(offset)
            heappop(due)
        return taken

    def _fresh(self, room: int) -> Sequence[int]:
        """Take up to `room` messages never looked at before."""
        first = self.cursor
        end = self._log.end
        self.cursor = last = first + room if first + room < end else end
        return range(first, last)

    def _lend(self, lease: Lease, serial: int) -> None:
        offsets = lease.offsets
        if len(offsets) == 1:
            self.leased[offsets[0]] = lease
        else:
            self.leased.update(dict.fromkeys(offsets, lease))
        lease.session.leases.add(lease)
        self._open += 1
        ends = self._ends
        if len(ends) > 2 * self._open + _SLACK:
            ends[:] = [entry for entry in ends if entry[2].open]
            heapify(ends)
        heappush(ends, (lease.deadline, serial, lease))

    # Ending loans. Each takes tags and returns those refused, because the loan had ended or was never one.

    def ack(self, tags: Iterable[Tag], now: float) -> list[Tag]:
        """Settle: never lent to this group again."""
        done, refused = self._take(tags, now)
        if self._attempts:
            for offset in done:
                self._attempts.pop(offset, None)
                self._suspects.discard(offset)
        if self._follows:
            self._settled(done, now)
        return refused

    def nack(self, tags: Iterable[Tag], delay: float, now: float) -> list[Tag]:
        """Not done: ready again `delay` seconds from now, one attempt spent."""
        back, refused = self._take(tags, now)
        for offset in back:
            self._attempts[offset] = self._attempts.get(offset, 0) + 1
        self._suspects.difference_update(back)
        self._wait(back, now + delay, now)
        return refused

    def release(self, tags: Iterable[Tag], now: float) -> list[Tag]:
        """Given back untouched: ready again at once, as if it had not been lent."""
        back, refused = self._take(tags, now)
        self._wait(back, now, now)
        return refused

    def extend(self, tags: Iterable[Tag], seconds: float, now: float) -> list[Tag]:
        """Let loans last `seconds` from now, but not beyond `max_lease` since they were lent."""
        self.expire(now)
        refused: list[Tag] = []
        stand: dict[Lease, set[int]] = {}
        for tag in tags:
            offset = tag & OFFSETS
            lease = self.leased.get(offset)
            if lease is None or lease.token + offset != tag:
                refused.append(tag)
            else:
                stand.setdefault(lease, set()).add(offset)
        for lease, offsets in stand.items():
            deadline = min(now + seconds, lease.granted + self.spec.max_lease)
            if len(offsets) == lease.open:
                sooner = deadline < lease.deadline
                lease.deadline = deadline
                if sooner:
                    heappush(self._ends, (deadline, next(self._numbers), lease))
            else:
                # Part of a batch gets a lease object of its own, under the same token.
                self._close(lease, len(offsets))
                part = Lease(lease.token, lease.session, lease.granted, deadline, sorted(offsets))
                self._lend(part, next(self._numbers))
        return refused

    def expire(self, now: float) -> None:
        """End the leases whose time has come; their messages are ready since then, and suspects."""
        ends = self._ends
        while ends and ends[0][0] <= now:
            lease = heappop(ends)[2]
            if not lease.open:
                continue
            if lease.deadline > now:
                heappush(ends, (lease.deadline, next(self._numbers), lease))
            else:
                self._lose(lease, lease.deadline)

    def leave(self, session: Session, now: float) -> None:
        """The session goes properly: what it holds is given back untouched."""
        for lease in sorted(session.leases, key=lambda lease: lease.token):
            self._wait(self._drop(lease), now, now)

    def lose(self, session: Session, now: float) -> None:
        """The session died: what it holds is ready again, an attempt spent, and suspect."""
        for lease in sorted(session.leases, key=lambda lease: lease.token):
            self._lose(lease, now)

    def _take(self, tags: Iterable[Tag], now: float) -> tuple[list[int], list[Tag]]:
        """Take loans from their holders: the offsets, and the tags refused."""
        ends = self._ends
        if ends and ends[0][0] <= now:
            self.expire(now)
        leased = self.leased
        taken: list[int] = []
        refused: list[Tag] = []
        for tag in tags:
            offset = tag & OFFSETS
            lease = leased.get(offset)
            if lease is None or lease.token + offset != tag:
                refused.append(tag)
                continue
            del leased[offset]
            taken.append(offset)
            lease.open -= 1
            if not lease.open:
                lease.session.leases.discard(lease)
                self._open -= 1
        return taken, refused

    def _close(self, lease: Lease, count: int) -> None:
        """Count `count` offsets as no longer out under the lease; forget it when none is left."""
        lease.open -= count
        if not lease.open:
            lease.session.leases.discard(lease)
            self._open -= 1

    def _drop(self, lease: Lease) -> list[int]:
        """End the lease; what was still out under it."""
        leased = self.leased
        back = [offset for offset in lease.offsets if leased.get(offset) is lease]
        for offset in back:
            del leased[offset]
        self._close(lease, lease.open)
        return back

    def _lose(self, lease: Lease, at: float) -> None:
        back = self._drop(lease)
        for offset in back:
            self._attempts[offset] = self._attempts.get(offset, 0) + 1
        self._suspects.update(back)
        self._wait(back, at, at)

    def _wait(self, offsets: Iterable[int], ready_at: float, now: float) -> None:
        """Let unsettled messages wait until `ready_at`; those that retention has removed are gone instead."""
        due, start = self._due, self._log.start
        if len(due) > 2 * len(self.waiting) + _SLACK:
            due[:] = [entry for entry in due if self.waiting.get(entry[1]) == entry[0]]
            heapify(due)
        gone: list[int] = []
        for offset in offsets:
            if offset < start:
                gone.append(offset)
                continue
            self.waiting[offset] = ready_at
            heappush(due, (ready_at, offset))
            if offset < self._low:
                self._low = offset
        if gone:
            self._forget(gone)
            self._settled(gone, now)
            self._count_removed(len(gone))

    def _settled(self, offsets: Sequence[int], now: float) -> None:
        """Called with what was settled or removed while it was out or ready; key order hooks in here."""

    # What happens to the log.

    def before_removal(self, target: int, now: float) -> None:
        """The log is about to lose everything before `target`; what this group had not settled of it is counted.

        What is lent stays with its holder, who may still settle it; given back, it is gone.
        """
        self.expire(now)
        lost = self._drop_waiting(target, len(self.waiting), now) if self.waiting else 0
        self._count_removed(lost + self._drop_unseen(max(0, target - self.cursor)))

    def drop_oldest(self, count: int, now: float) -> None:
        """Take the `count` oldest messages that are neither settled nor lent from this group, and count them."""
        self.expire(now)
        lost = self._drop_waiting(self.cursor, count, now) if self.waiting else 0
        self._count_removed(lost + self._drop_unseen(min(count - lost, self._log.end - self.cursor)))

    def _drop_unseen(self, count: int) -> int:
        if self._attempts:
            self._forget(range(self.cursor, self.cursor + count))
        self.cursor += count
        return count

    def _drop_waiting(self, below: int, most: int, now: float) -> int:
        """Remove up to `most` waiting messages below an offset, lowest first; how many."""
        dropped = 0
        offset = max(self._low, self._log.start)
        below = min(below, self.cursor)
        while offset < below and dropped < most:
            if offset in self.waiting:
                self._remove_waiting(offset, now)
                dropped += 1
            offset += 1
        self._low = max(self._low, offset)
        return dropped

    def _remove_waiting(self, offset: int, now: float) -> None:
        del self.waiting[offset]
        self._forget((offset,))

    def _forget(self, offsets: Iterable[int]) -> None:
        for offset in offsets:
            self._attempts.pop(offset, None)
            self._suspects.discard(offset)

    def _count_removed(self, count: int) -> None:
        self.removed += count
        self.unreported += count

    # Moving.

    def seek(self, target: int, skipped: int) -> dict[Session, list[Tag]]:
        """
        Start again at `target`; every loan ends, and no settle of before is known any more.

        Args:
            target: An offset in `[start, end]` of the log.
            skipped: Messages before it that were asked for and are no longer kept; they are counted as removed.

        Returns:
            The loans that ended, by session.
        """
        ended: dict[Session, list[Tag]] = {}
        for offset, lease in self.leased.items():
            ended.setdefault(lease.session, []).append(lease.token + offset)
            self._attempts[offset] = self._attempts.get(offset, 0) + 1
        for session in self.sessions.values():
            for lease in session.leases:
                lease.open = 0
            session.leases.clear()
        # The count of what stays unsettled must not fall.
        self._attempts = {offset: spent for offset, spent in self._attempts.items() if offset >= target}
        self._suspects.clear()
        self.leased.clear()
        self.waiting.clear()
        self._due.clear()
        self._ends.clear()
        self._open = 0
        self.cursor = self._floor = self._low = target
        self._count_removed(skipped)
        return ended
