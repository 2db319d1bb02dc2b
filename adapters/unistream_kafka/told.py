"""What the blocking half of a member tells this one: partitions come and go, messages arrive, the member fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from unistream.driver.types import DataLoss
from unistream.errors import AccessError, BrokerUnavailableError
from unistream_kafka.errors import translated
from unistream_kafka.lending import DRAIN_SECONDS, Lending, Setting, finish
from unistream_kafka.member import Assigned, Member
from unistream_kafka.progress import Progress
from unistream_kafka.waiter import answer

__all__ = ["Told"]


class Told(Lending):
    """The half of a member on the event loop, as `unistream_kafka.member.Half` describes it."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._begin()

    def _begin(self) -> None:
        setting = self._setting
        self._joining: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._failure: BaseException | None = None
        self._fetching = False
        self._member = Member(
            setting.place,
            self,
            self._crossing,
            topic=setting.stored,
            group=setting.identity,
            starts=self._starts,
            session=setting.session,
            patience=max(setting.group.lease, setting.session),
        )

    def joined(self) -> None:
        """See `Half.joined`."""
        finish(self._joining)

    def place(self, partition: int) -> int:
        """See `Half.place`. Partitions that were added to the topic later begin at their first message."""
        starts = self._setting.starts
        return starts[partition] if partition < len(starts) else 0

    def assigned(self, stored: Assigned) -> None:
        """See `Half.assigned`."""
        ordered = self._setting.group.ordering == "key"
        missing = []
        for at, found in stored.items():
            if found is None:
                found = (self.place(at), "")
                if at < len(self._setting.starts):
                    missing.append(at)
            self._parts[at] = Progress(at, *found, ordered=ordered)
        if missing:
            self._held.update(missing)
            self._spawn(self._expired(missing))
        self._pump()

    async def _expired(self, partitions: list[int]) -> None:
        """Kafka holds no cursor although the group was pinned: it was deleted, or its offsets have expired."""
        await self._look()
        if self._error is None:
            group = self._setting.group
            detail = (
                f"Kafka holds no offsets of partitions {partitions}: they expired, or were deleted. The group begins "
                "again where it was created; what it had settled since comes again, what retention removed does not"
            )
            self._setting.emit(DataLoss(group.topic, group.name, None, detail))
            self._held.difference_update(partitions)
            self._pump()

    def arrived(self, found: Mapping[int, Sequence[Any]]) -> None:
        """See `Half.arrived`."""
        self._fetching = False
        wall = time.time()
        for at, messages in found.items():
            progress = self._parts.get(at)
            if progress is not None:
                for offset in progress.arrive(messages, wall):
                    self._loop.call_later(progress.rests[offset] - wall, self._rested, progress, offset)
        self._pump()

    def trimmed(self, partition: int, wanted: int, first: int, end: int) -> None:
        """See `Half.trimmed`."""
        group = self._setting.group
        progress = self._parts.get(partition)
        if progress is None:
            return
        if wanted < first:
            progress.frontier.skip_to(first)
            detail = f"partition {partition}: retention removed the messages from {wanted} to {first - 1}"
            self._setting.emit(DataLoss(group.topic, group.name, first - wanted, detail))
        else:
            self._drop([partition], "the partition was truncated")
            self._parts[partition] = Progress(partition, end, "", ordered=group.ordering == "key")
            detail = f"partition {partition}: its log ends at {end}, before {wanted}, which this group had reached"
            self._setting.emit(DataLoss(group.topic, group.name, None, detail))
        self._parts[partition].dirty = True

    def revoked(self, partitions: Sequence[int], done: Callable[[], None]) -> None:
        """See `Half.revoked`."""
        leaving = [self._parts[at] for at in partitions if at in self._parts]
        if self._closed or self._failure is not None or not leaving:
            done()
        else:
            self._spawn(self._hand_over(leaving, done))

    async def _hand_over(self, leaving: list[Progress], done: Callable[[], None]) -> None:
        places = {progress.partition for progress in leaving}
        try:
            self._held |= places
            self._put_back(leaving)
            self._leaving = places
            if any(progress.partition in places for progress, _ in self._loans.values()):
                self._drained = self._loop.create_future()
                await asyncio.wait([self._drained], timeout=DRAIN_SECONDS)
                self._drained = None
            self._lose(places, "the partition goes to another member")
            await self._last_commit(leaving)
            self._drop(sorted(places), "the partition went to another member")
        finally:
            self._held -= places
            done()

    def _check_drained(self) -> None:
        if not any(progress.partition in self._leaving for progress, _ in self._loans.values()):
            assert self._drained is not None
            finish(self._drained)

    def lost(self, partitions: Sequence[int] | None, reason: str) -> None:
        """See `Half.lost`."""
        if partitions is not None:
            self._drop(partitions, reason)
            return
        # Maybe this is still a member: the commit before the next lending will tell.
        self._put_back(self._parts.values())
        for progress, message in self._lose(self._parts, reason):
            progress.expire(message)

    def failed(self, error: BaseException) -> None:
        """See `Half.failed`."""
        made = translated(error, f"member of {self._name}", self._setting.group.topic)
        self._failure = made
        self._drop(list(self._parts), str(made))
        flight, self._flight = self._flight, None
        if flight is not None:
            # It may have been stored, whatever ended the member.
            answer(flight.waiters, BrokerUnavailableError(f"{self._name}: {made}", driver="kafka"))
        answer(self._waiters, self._lost_loan())
        self._waiters = []
        if not self._joining.done():
            self._joining.set_exception(made)
        if isinstance(made, AccessError):
            self._error = made
        self._wake()

    def left(self) -> None:
        """See `Half.left`."""
        finish(self._gone)

    def reachable(self, error: str | None) -> None:
        """See `Half.reachable`."""
        self._unreachable = error
        self._wake()
        if error is None:
            self._pump()

    def _rest(self, resting: Iterable[tuple[float, Progress, int]]) -> None:
        for delay, progress, offset in resting:
            self._loop.call_later(delay, self._rested, progress, offset)

    def _rested(self, progress: Progress, offset: int) -> None:
        if self._parts.get(progress.partition) is progress:
            progress.wake(offset)
            self._stale_since = self._loop.time()
            self._pump()
