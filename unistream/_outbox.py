"""Messages between `publish` and the confirm: window, natural batching, deadlines, retry, order.

Knows messages and the driver contract; knows nothing of clients, keys to partitions, or headers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Collection, Iterable, Sequence
from typing import cast

from unistream._confirmation import Confirmation, WhenFull, receipt, size_of, with_stored
from unistream._link import Link
from unistream._room import Room
from unistream._stats import ProducerStats
from unistream._turns import Turns, follow
from unistream.core.window import Window
from unistream.driver.contract import ProducerDriver
from unistream.driver.types import MaybeAwaitable, PublishOutcome, RawMessage
from unistream.errors import (
    BrokerUnavailableError,
    ContractError,
    NotPublishedError,
    PublishUnknownError,
    UnistreamError,
)
from unistream.message import Receipt

__all__ = ["Outbox", "answered", "failed"]

STOP_SECONDS = 5.0
"""How long a producer that gives up waits for the driver to notice that its calls were cancelled."""


class Outbox:
    """
    The undecided messages of one producer, in the order of publishing.

    Messages that arrive while a batch is under way form the next batch, so that nothing waits for a timer and a busy
    producer batches by itself.

    Attributes:
        stats: Shared with the producer.
        unseen: Failed messages that nobody has looked at.
        at_once: Whether the driver answered the last batch without an awaitable.
        turns: Counts what the driver took at once.
        closing: Nothing new is taken.
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
        self.turns = Turns()
        self.closing = False
        self._topic = topic
        self._driver = driver
        # No batch takes more than its share of the window, so that others are under way while one is confirmed.
        self._most = min(driver.batch_messages, max(1, window.limit // driver.pipeline))
        self._window = window
        self._when_full = when_full
        self._link = link
        self._dedupes = dedupes
        self._room = Room(topic, window, loop, stats)
        self._waiting = self._room.waiting
        # Waiting to be handed over; and all undecided.
        self._queue: deque[Confirmation] = deque()
        self._undecided: dict[Confirmation, None] = {}
        # The place of the newest message, and of the newest that may be at the broker.
        self._order = 0
        self._newest_handed = 0
        self._batches: dict[asyncio.Task[None], None] = {}
        self._failing = False
        self._pause: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None

    # In

    @property
    def clear(self) -> bool:
        """Whether nothing is before a message that comes now, which may be handed straight over."""
        return not (self._queue or self._waiting or self._batches or self._failing or self.closing)

    def now(self, raws: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Hand messages straight to the driver; raises nothing."""
        try:
            answer = self._driver.publish(raws, timeout)
        except Exception as error:
            return failed(error)
        if type(answer) is list:
            self.at_once = True
            self.turns.unbroken += len(raws)
        else:
            self.at_once = False
        return answer

    def track(
        self, batch: Sequence[RawMessage], timeout: float, answer: Awaitable[list[PublishOutcome]]
    ) -> list[Confirmation]:
        """Follow up messages that `now` handed over and whose answer is not there, or not plain receipts."""
        deadline = self.loop.time() + timeout
        confirmations = [Confirmation(self.loop, self.unseen, raw, size_of(raw), deadline) for raw in batch]
        for confirmation in confirmations:
            self._take(confirmation)
        self._start(confirmations, answer)
        return confirmations

    def fits(self, size: int) -> bool:
        """Whether the window has room for a message of `size` bytes."""
        return self._window.fits(size)

    async def put(self, raw: RawMessage, size: int, timeout: float) -> Confirmation:
        """
        Get room for a message as `when_full` says, and queue it.

        Returns:
            Its Confirmation; decided already, with DroppedError, where `when_full` dropped this very message.

        Raises:
            WindowFullError: There was no room, or none before the deadline.
            ClosedError, DroppedError: The producer was closed meanwhile.

        Cancellation: The message is not queued and counts as dropped.
        """
        confirmation = Confirmation(self.loop, self.unseen, raw, size, self.loop.time() + timeout)
        room = self._room
        if self.closing:
            raise room.refused(room.closed())
        if self._waiting or not self._window.fits(size):
            if self._when_full == "block":
                await room.wait(confirmation)
            elif self._when_full == "fail":
                raise room.refused(room.full("is full"))
            elif self._when_full == "drop_newest" or not self._drop_oldest(size):
                self.stats.dropped += 1
                confirmation._decide(self._room.dropped(confirmation, "the window is full"))
                self.unseen[confirmation] = None
                return confirmation
        self._take(confirmation)
        self._queue.append(confirmation)
        self._hand_over()
        return confirmation

    def _drop_oldest(self, size: int) -> bool:
        victims = self._room.victims(self._queue, size)
        for oldest in victims or ():
            self._queue.remove(oldest)
            self._finish(oldest, self._room.dropped(oldest, "a newer message took its place"))
        return victims is not None

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
            self.unseen[confirmation] = None
        confirmation._decide(outcome)
        if self._waiting:
            self._room.grant()

    def withdraw(self, confirmation: Confirmation) -> None:
        """Its publisher was cancelled: a message that waits is dropped, one that was handed over is unknown."""
        if confirmation in self._undecided:
            if not confirmation._handed:
                self._queue.remove(confirmation)
            if confirmation._handed or confirmation._maybe:
                self._finish(
                    confirmation,
                    PublishUnknownError(f"publishing of {confirmation.id} was cancelled", topic=self._topic),
                )
            else:
                self._finish(confirmation, self._room.dropped(confirmation, "its publisher was cancelled"))
        self.unseen.pop(confirmation, None)

    def _expire(self) -> None:
        """The timer: decide what has passed its deadline, and come again at the next one."""
        now = self.loop.time()
        self._sweep = None
        for confirmation in [one for one in self._undecided if one._deadline <= now]:
            if not confirmation._handed:
                self._queue.remove(confirmation)
            self._finish(confirmation, self._late(confirmation))
        if self._undecided and self._sweep is None:
            first = min(confirmation._deadline for confirmation in self._undecided)
            self._sweep = self.loop.call_at(first, self._expire)

    def _late(self, confirmation: Confirmation) -> UnistreamError:
        if confirmation._handed or confirmation._maybe:
            return PublishUnknownError(
                f"message {confirmation.id} to {self._topic!r}: no answer in time, it may be stored; "
                "publish it again with the same id if a duplicate does no harm",
                topic=self._topic,
            )
        error = NotPublishedError(
            f"message {confirmation.id} to {self._topic!r} could not be handed to the broker in time: "
            f"{self._link.error or 'earlier messages are not confirmed'}",
            topic=self._topic,
            retryable=True,
        )
        error.__cause__ = self._link.error
        return error

    async def decided(self) -> None:
        """Wait until every message published so far is decided, those that wait for room included."""
        for confirmation in [*self._undecided, *self._waiting]:
            await confirmation._decided()

    def take_unseen(self) -> list[UnistreamError]:
        """The failures that nobody has looked at; they count as looked at from now on."""
        failures = [one._outcome for one in self.unseen if isinstance(one._outcome, UnistreamError)]
        self.unseen.clear()
        return failures

    async def stop(self) -> None:
        """Give up what is undecided, and every timer and task. Ends within `STOP_SECONDS`."""
        self.closing = True
        self._room.stop()
        for timer in (self._pause, self._sweep):
            if timer is not None:
                timer.cancel()
        for confirmation in list(self._undecided):
            self.withdraw(confirmation)
        # Every task gets its first step, so that no driver's coroutine is dropped without having run.
        await asyncio.sleep(0)
        for task in self._batches:
            task.cancel()
        if self._batches:
            await asyncio.wait(list(self._batches), timeout=STOP_SECONDS)

    # Handing over

    def _hand_over(self) -> None:
        """Give the driver as many batches as it takes at once."""
        driver = self._driver
        while self._queue and self._pause is None and len(self._batches) < (1 if self._failing else driver.pipeline):
            batch = self._next_batch()
            seconds = max(confirmation._deadline for confirmation in batch) - self.loop.time()
            answer = self.now([confirmation._raw for confirmation in batch], max(seconds, 0.001))
            if isinstance(answer, list):
                self._newest_handed = max(self._newest_handed, batch[-1]._order)
                self._completed(batch, answer)
            else:
                self._start(batch, answer)

    def _next_batch(self) -> list[Confirmation]:
        queue, most, most_bytes = self._queue, self._most, self._driver.batch_bytes
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
        self._newest_handed = max(self._newest_handed, batch[-1]._order)
        self._batches[follow(self._run(batch, answer), answer, self._ran)] = None

    def _ran(self, task: asyncio.Task[None]) -> None:
        del self._batches[task]
        self._hand_over()

    async def _run(self, batch: list[Confirmation], answer: Awaitable[list[PublishOutcome]]) -> None:
        try:
            outcomes = await answer
        except BrokerUnavailableError as error:
            # Nothing of it was handed over; later batches under way raise too, and all go back in order.
            self._newest_handed = min(self._newest_handed, batch[0]._order - 1)
            self._put_back(batch)
            self._rest(error)
            return
        except UnistreamError as error:
            outcomes = _all(error, len(batch))
        except BaseException as error:
            if not isinstance(error, (Exception, asyncio.CancelledError)) or _cancelled():
                raise
            # A driver let something through: nothing can be said of the batch, and nothing may be hidden.
            defect = ContractError(f"the driver raised {error!r} from publish", topic=self._topic)
            defect.__cause__ = error
            outcomes = _all(defect, len(batch))
        self._completed(batch, outcomes)

    def _rest(self, error: Exception) -> None:
        """The broker was not reached: wait the backoff, then go on with one batch at a time until it answers."""
        self._failing = True
        delay = self._link.down(error)
        if self._pause is None:
            self._pause = self.loop.call_later(delay, self._wake)

    def _wake(self) -> None:
        self._pause = None
        self._hand_over()

    def _put_back(self, batch: Iterable[Confirmation]) -> None:
        again = [confirmation for confirmation in batch if confirmation in self._undecided]
        for confirmation in again:
            confirmation._handed = False
        self._queue = deque(sorted([*again, *self._queue], key=lambda confirmation: confirmation._order))

    def _completed(self, batch: Sequence[Confirmation], outcomes: Sequence[PublishOutcome]) -> None:
        if not isinstance(outcomes, Sequence) or len(outcomes) != len(batch):
            defect = ContractError(f"the driver answered {len(batch)} messages with {outcomes!r:.200}")
            outcomes = _all(defect, len(batch))
        again = self._repeatable(batch, outcomes) if self._dedupes else ()
        for confirmation, outcome in zip(batch, outcomes, strict=True):
            if confirmation in self._undecided and confirmation not in again:
                self._finish(confirmation, receipt(confirmation, outcome))
        if again:
            for confirmation in again:
                confirmation._maybe = True
            self._put_back(again)
            self._rest(next(outcome for outcome in outcomes if isinstance(outcome, PublishUnknownError)))
        elif self._failing or not self._link.ok:
            self._failing = False
            self._link.up()

    def _repeatable(
        self, batch: Sequence[Confirmation], outcomes: Sequence[PublishOutcome]
    ) -> Collection[Confirmation]:
        """
        The messages of unknown outcome that are sent again, under the same id, because the broker deduplicates.

        Not those whose key has a later message that may be stored already: order per key stands (PUB-4).
        """
        again: dict[Confirmation, None] = {}
        passed: set[bytes] = set()
        newest = batch[-1]._order >= self._newest_handed
        for confirmation, outcome in zip(reversed(batch), reversed(outcomes), strict=True):
            key = confirmation._raw.key
            repeatable = isinstance(outcome, PublishUnknownError) and confirmation in self._undecided
            if repeatable and (key is None or (newest and key not in passed)):
                again[confirmation] = None
            elif key is not None:
                passed.add(key)
        return again


def _cancelled() -> bool:
    """Whether the running task itself was cancelled, not something that a driver awaits inside."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def failed(error: Exception) -> list[PublishOutcome]:
    """The answer of a driver that raised instead of giving an awaitable."""
    raise error


async def answered(answer: list[PublishOutcome]) -> list[PublishOutcome]:
    """An answer that is there, for following it up like one that is not."""
    return answer


def _all(error: UnistreamError, count: int) -> list[PublishOutcome]:
    with_stored(error)
    return [cast(PublishOutcome, error)] * count
