"""Messages between `publish` and the confirm: window, natural batching, deadlines, retry, order.

Knows messages and the driver contract; knows nothing of clients, keys to partitions, or headers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from unistream._link import Link
from unistream.core.window import Window
from unistream.driver.contract import ProducerDriver
from unistream.driver.types import MaybeAwaitable, PublishOutcome, RawMessage, RawReceipt
from unistream.errors import (
    BrokerUnavailableError,
    ContractError,
    DroppedError,
    NotPublishedError,
    PublishUnknownError,
    TimedOutError,
    UnistreamError,
    WindowFullError,
)
from unistream.message import Receipt

__all__ = ["Confirmation", "Outbox", "ProducerStats", "WhenFull"]

WhenFull = Literal["block", "fail", "drop_newest", "drop_oldest", "spill"]


@dataclass(slots=True)
class ProducerStats:
    """
    What became of every message; `confirmed + failed + unknown + dropped + in_flight == published`, always.

    Attributes:
        published: Calls of `publish` and `submit`, and messages of `publish_many`.
        confirmed: The broker holds them.
        failed: Surely not stored.
        unknown: Perhaps stored.
        dropped: Dropped by `when_full`, or cancelled, before they were handed to the broker.
        in_flight: Not decided yet.
    """

    published: int = 0
    confirmed: int = 0
    failed: int = 0
    unknown: int = 0
    dropped: int = 0
    in_flight: int = 0

    def count(self, error: UnistreamError) -> None:
        """One message ended with `error`."""
        if isinstance(error, DroppedError):
            self.dropped += 1
        elif error.stored == "unknown":
            self.unknown += 1
        else:
            self.failed += 1


class Confirmation:
    """What becomes of a submitted message: a `Receipt` or a `PublishError`. Awaitable."""

    __slots__ = ("_deadline", "_handed", "_order", "_outbox", "_outcome", "_raw", "_size", "_waiters")

    def __init__(self, outbox: Outbox, raw: RawMessage, size: int, deadline: float) -> None:
        self._order = 0
        self._outbox = outbox
        self._raw = raw
        self._size = size
        self._deadline = deadline
        self._handed = False
        self._outcome: Receipt | UnistreamError | None = None
        self._waiters: tuple[asyncio.Future[None], ...] = ()

    @property
    def id(self) -> str:
        """The message's id."""
        return self._raw.id

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._outcome is not None

    @property
    def failed(self) -> bool:
        """Whether it is known that the message was not confirmed."""
        return isinstance(self._outcome, UnistreamError)

    def failure(self) -> UnistreamError | None:
        """Why the message was not confirmed; `None` if it was, or is undecided. Counts as looking at it."""
        if not isinstance(self._outcome, UnistreamError):
            return None
        self._outbox.unseen.pop(self, None)
        return self._outcome

    async def result(self, timeout: float | None = None) -> Receipt:
        """
        Wait for the outcome.

        Args:
            timeout: Seconds to wait; `None`: until the message's own timeout decides it.

        Raises:
            TimedOutError: The time is up; the message goes on.
            PublishError: It was not confirmed.

        Cancellation: Gives up waiting; the message goes on.
        """
        if self._outcome is None:
            waiter = self._outbox.loop.create_future()
            self._waiters = (*self._waiters, waiter)
            if timeout is None:
                await waiter
            else:
                try:
                    await asyncio.wait_for(waiter, timeout)
                except TimeoutError as error:
                    raise TimedOutError(f"message {self.id} is not confirmed after {timeout} s") from error
        outcome = self._outcome
        if isinstance(outcome, UnistreamError):
            self._outbox.unseen.pop(self, None)
            raise outcome
        return cast(Receipt, outcome)

    def __await__(self) -> Generator[Any, None, Receipt]:
        return self.result().__await__()

    def _decide(self, outcome: Receipt | UnistreamError) -> None:
        self._outcome = outcome
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Outbox:
    """
    The undecided messages of one producer, in the order of publishing.

    Messages that arrive while a batch is under way form the next batch, so that nothing waits for a timer and a busy
    producer batches by itself.

    Attributes:
        stats: Shared with the producer.
        unseen: Failed submissions that nobody has looked at.
        at_once: Whether the driver answered the last batch without an awaitable.
    """

    def __init__(
        self,
        topic: str,
        driver: ProducerDriver,
        loop: asyncio.AbstractEventLoop,
        window: Window,
        when_full: WhenFull,
        link: Link,
        *,
        dedupes: bool,
        stats: ProducerStats,
    ) -> None:
        self.loop = loop
        self.stats = stats
        self.unseen: dict[Confirmation, None] = {}
        self.at_once = False
        self._topic = topic
        self._driver = driver
        self._window = window
        self._when_full = when_full
        self._link = link
        self._dedupes = dedupes
        # Waiting to be handed over; all undecided; publishers that wait for room, each with its size.
        self._queue: deque[Confirmation] = deque()
        self._order = 0
        self._undecided: dict[Confirmation, None] = {}
        self._room: deque[tuple[asyncio.Future[None], int]] = deque()
        self._batches: dict[asyncio.Task[None], None] = {}
        self._failing = False
        self._pause: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None

    # In

    @property
    def clear(self) -> bool:
        """Whether nothing is before a message that comes now."""
        return not (self._queue or self._room or self._batches or self._pause)

    def now(self, raws: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Hand messages straight to the driver, which must be `clear` and whose answer the caller counts."""
        try:
            answer = self._driver.publish(raws, timeout)
        except UnistreamError as error:
            return _all(error, len(raws))
        self.at_once = type(answer) is list
        return answer

    def track(
        self, batch: Sequence[RawMessage], timeout: float, answer: Awaitable[list[PublishOutcome]]
    ) -> list[Confirmation]:
        """Follow up messages that `now` handed over and that the driver did not answer at once."""
        deadline = self.loop.time() + timeout
        confirmations = [Confirmation(self, raw, size_of(raw), deadline) for raw in batch]
        for confirmation in confirmations:
            self._take(confirmation)
        self._start(confirmations, answer)
        return confirmations

    def fits(self, size: int) -> bool:
        """Whether the window has room for a message of `size` bytes."""
        return self._window.fits(size)

    async def put(self, raw: RawMessage, size: int, deadline: float) -> Confirmation:
        """
        Get room for a message as `when_full` says, and queue it.

        Returns:
            Its Confirmation; decided already, with DroppedError, where `when_full` dropped this very message.

        Raises:
            WindowFullError: There was no room, or none before the deadline.

        Cancellation: The message is not queued and counts as dropped.
        """
        confirmation = Confirmation(self, raw, size, deadline)
        if self._room or not self._window.fits(size):
            if self._when_full == "block":
                await self._wait_for_room(confirmation)
            elif self._when_full == "fail":
                raise self._full("is full")
            elif self._when_full == "drop_oldest" and self._queue:
                while self._queue and not self._window.fits(size):
                    oldest = self._queue.popleft()
                    self._finish(oldest, self._dropped(oldest, "a newer message took its place"))
            else:
                self.stats.dropped += 1
                confirmation._decide(self._dropped(confirmation, "the window is full"))
                return confirmation
        self._take(confirmation)
        self._queue.append(confirmation)
        self._hand_over()
        return confirmation

    async def _wait_for_room(self, confirmation: Confirmation) -> None:
        granted: asyncio.Future[None] = self.loop.create_future()
        entry = (granted, confirmation._size)
        self._room.append(entry)
        self.stats.in_flight += 1
        try:
            async with asyncio.timeout_at(confirmation._deadline):
                await granted
        except BaseException as error:
            if entry in self._room:
                self._room.remove(entry)
            elif not granted.cancelled():
                self._window.give(confirmation._size)
            self._grant_room()
            if isinstance(error, TimeoutError):
                raise self._full("stayed full for the whole timeout") from error
            self.stats.dropped += 1
            raise
        finally:
            self.stats.in_flight -= 1
        # The room was kept free for this message until here; `_take` claims it for good.
        self._window.give(confirmation._size)

    def _grant_room(self) -> None:
        room = self._room
        while room and self._window.fits(room[0][1]):
            granted, size = room.popleft()
            if not granted.done():
                self._window.take(size)
                granted.set_result(None)
        if not self._undecided and not room and self._empty is not None:
            self._empty.set_result(None)
            self._empty = None

    def _full(self, why: str) -> WindowFullError:
        self.stats.failed += 1
        return WindowFullError(
            f"the window of the producer of {self._topic!r} ({self._window.limit} messages, "
            f"{self._window.limit_bytes} bytes) {why}; publish slower, or raise max_unconfirmed",
            topic=self._topic,
        )

    def _dropped(self, confirmation: Confirmation, why: str) -> DroppedError:
        return DroppedError(f"message {confirmation.id} to {self._topic!r} was dropped: {why}", topic=self._topic)

    def _take(self, confirmation: Confirmation) -> None:
        self._window.take(confirmation._size)
        self._undecided[confirmation] = None
        self._order += 1
        confirmation._order = self._order
        self.stats.in_flight += 1
        if self._sweep is None:
            self._sweep = self.loop.call_at(confirmation._deadline, self._expire)
        elif confirmation._deadline < self._sweep.when():
            self._sweep.cancel()
            self._sweep = self.loop.call_at(confirmation._deadline, self._expire)

    # Out

    def _finish(self, confirmation: Confirmation, outcome: Receipt | UnistreamError) -> None:
        """A message is decided: count it, tell who waits, and give its room to the next."""
        del self._undecided[confirmation]
        self._window.give(confirmation._size)
        self.stats.in_flight -= 1
        if isinstance(outcome, Receipt):
            self.stats.confirmed += 1
        else:
            self.stats.count(outcome)
            if not confirmation._waiters:
                self.unseen[confirmation] = None
        confirmation._decide(outcome)
        if self._room or not self._undecided:
            self._grant_room()

    def withdraw(self, confirmation: Confirmation) -> None:
        """Its publisher was cancelled: a message that waits is dropped, one that was handed over is unknown."""
        if confirmation in self._undecided:
            if confirmation._handed:
                self._finish(
                    confirmation,
                    PublishUnknownError(f"publishing of {confirmation.id} was cancelled", topic=self._topic),
                )
            else:
                self._queue.remove(confirmation)
                self._finish(confirmation, self._dropped(confirmation, "its publisher was cancelled"))
        self.unseen.pop(confirmation, None)

    def _expire(self) -> None:
        """The timer: decide what has passed its deadline, and come again at the next one."""
        now = self.loop.time()
        self._sweep = None
        for confirmation in [one for one in self._undecided if one._deadline <= now]:
            if confirmation._handed:
                error: UnistreamError = PublishUnknownError(
                    f"message {confirmation.id} to {self._topic!r}: no answer in time, it may be stored; "
                    "publish it again with the same id if a duplicate does no harm",
                    topic=self._topic,
                )
            else:
                self._queue.remove(confirmation)
                error = NotPublishedError(
                    f"message {confirmation.id} to {self._topic!r} could not be handed to the broker in time: "
                    f"{self._link.error or 'earlier messages are not confirmed'}",
                    topic=self._topic,
                    retryable=True,
                )
                error.__cause__ = self._link.error
            self._finish(confirmation, error)
        if self._undecided and self._sweep is None:
            first = min(confirmation._deadline for confirmation in self._undecided)
            self._sweep = self.loop.call_at(first, self._expire)

    async def emptied(self) -> None:
        """Wait until nothing is undecided."""
        while self._undecided or self._room:
            if self._empty is None:
                self._empty = self.loop.create_future()
            await asyncio.shield(self._empty)

    def take_unseen(self) -> list[UnistreamError]:
        """The failures that nobody has looked at; they count as looked at from now on."""
        failures = [one._outcome for one in self.unseen if isinstance(one._outcome, UnistreamError)]
        self.unseen.clear()
        return failures

    def stop(self) -> None:
        """Give up what is undecided, and every timer and task."""
        for confirmation in list(self._undecided):
            self.withdraw(confirmation)
        for timer in (self._pause, self._sweep):
            if timer is not None:
                timer.cancel()
        for task in self._batches:
            task.cancel()

    # Handing over

    def _hand_over(self) -> None:
        """Give the driver as many batches as it takes at once."""
        driver = self._driver
        while self._queue and self._pause is None and len(self._batches) < (1 if self._failing else driver.pipeline):
            batch = self._next_batch()
            seconds = max(confirmation._deadline for confirmation in batch) - self.loop.time()
            answer = self.now([confirmation._raw for confirmation in batch], max(seconds, 0.001))
            if isinstance(answer, list):
                self._completed(batch, answer)
            else:
                self._start(batch, answer)

    def _next_batch(self) -> list[Confirmation]:
        queue, most, most_bytes = self._queue, self._driver.batch_messages, self._driver.batch_bytes
        batch: list[Confirmation] = []
        size = 0
        while queue and len(batch) < most:
            size += queue[0]._size
            if batch and size > most_bytes:
                break
            confirmation = queue.popleft()
            confirmation._handed = True
            batch.append(confirmation)
        return batch

    def _start(self, batch: list[Confirmation], answer: Awaitable[list[PublishOutcome]]) -> None:
        for confirmation in batch:
            confirmation._handed = True
        task = self.loop.create_task(self._run(batch, answer))
        self._batches[task] = None
        task.add_done_callback(self._ran)

    def _ran(self, task: asyncio.Task[None]) -> None:
        del self._batches[task]
        self._hand_over()

    async def _run(self, batch: list[Confirmation], answer: Awaitable[list[PublishOutcome]]) -> None:
        try:
            outcomes = await answer
        except BrokerUnavailableError as error:
            # Nothing of it was handed over; later batches under way raise too, and all go back in order.
            self._failing = True
            self._put_back(batch)
            delay = self._link.down(error)
            if self._pause is None:
                self._pause = self.loop.call_later(delay, self._wake)
            return
        except UnistreamError as error:
            outcomes = _all(error, len(batch))
        except Exception as error:
            # A driver let something through: nothing can be said of the batch, and nothing may be hidden.
            defect = ContractError(f"the driver raised {error!r} from publish", topic=self._topic)
            defect.__cause__ = error
            defect.stored = "unknown"
            outcomes = _all(defect, len(batch))
        else:
            self._failing = False
            self._link.up()
        self._completed(batch, outcomes)

    def _wake(self) -> None:
        self._pause = None
        self._hand_over()

    def _put_back(self, batch: Iterable[Confirmation]) -> None:
        again = [confirmation for confirmation in batch if confirmation in self._undecided]
        for confirmation in again:
            confirmation._handed = False
        self._queue = deque(sorted([*again, *self._queue], key=lambda confirmation: confirmation._order))

    def _completed(self, batch: Sequence[Confirmation], outcomes: Sequence[PublishOutcome]) -> None:
        if len(outcomes) != len(batch):
            defect = ContractError(f"the driver gave {len(outcomes)} outcomes for {len(batch)} messages")
            defect.stored = "unknown"
            outcomes = _all(defect, len(batch))
        again = self._repeatable(batch, outcomes) if self._dedupes else ()
        for confirmation, outcome in zip(batch, outcomes, strict=True):
            if confirmation in self._undecided and confirmation not in again:
                self._finish(confirmation, receipt(confirmation._raw, outcome))
        if again:
            self._put_back(again)

    def _repeatable(
        self, batch: Sequence[Confirmation], outcomes: Sequence[PublishOutcome]
    ) -> Collection[Confirmation]:
        """
        The messages of unknown outcome that are sent again, under the same id, because the broker deduplicates.

        Not those whose key has a later message that may be stored already: order per key stands (PUB-4).
        """
        again: dict[Confirmation, None] = {}
        passed: set[bytes] = set()
        alone = len(self._batches) <= 1
        for confirmation, outcome in zip(reversed(batch), reversed(outcomes), strict=True):
            key = confirmation._raw.key
            if isinstance(outcome, PublishUnknownError) and (key is None or (alone and key not in passed)):
                again[confirmation] = None
            elif key is not None:
                passed.add(key)
        return again


def size_of(raw: RawMessage) -> int:
    """Bytes of value, key and headers."""
    size = len(raw.value) + len(raw.key or b"")
    return size + sum(len(name) + len(value) for name, value in raw.headers) if raw.headers else size


def receipt(raw: RawMessage, outcome: PublishOutcome) -> Receipt | UnistreamError:
    """What the publisher gets for a driver's outcome."""
    if type(outcome) is RawReceipt:
        return Receipt(raw.id, *outcome)
    error = cast(UnistreamError, outcome)
    error.stored = error.stored or "no"
    return error


def _all(error: UnistreamError, count: int) -> list[PublishOutcome]:
    error.stored = error.stored or "no"
    return [cast(PublishOutcome, error)] * count
