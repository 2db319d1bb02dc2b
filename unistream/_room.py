"""Room in a producer's window: who gets it, in turn, and what happens to a message for which there is none (PUB-5).

Knows sizes and deadlines; knows no driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from unistream._confirmation import Confirmation, with_stored
from unistream._stats import ProducerStats
from unistream.core.window import Window
from unistream.errors import ClosedError, DroppedError, UnistreamError, WindowFullError

__all__ = ["Room"]


class Room:
    """
    The window of one producer, and the publishers that wait for it.

    Attributes:
        window: What is out.
        waiting: Messages that wait for room, in turn.
    """

    def __init__(self, topic: str, window: Window, loop: asyncio.AbstractEventLoop, stats: ProducerStats) -> None:
        self.window = window
        self.waiting: dict[Confirmation, asyncio.Future[None]] = {}
        self._topic = topic
        self._loop = loop
        self._stats = stats

    async def wait(self, confirmation: Confirmation) -> None:
        """
        Wait in turn; on return the room is free, for the caller to claim before it awaits anything.

        Raises:
            WindowFullError: There was none before the message's deadline.
            DroppedError: The producer gave up meanwhile.

        Cancellation: The message counts as dropped.
        """
        granted: asyncio.Future[None] = self._loop.create_future()
        self.waiting[confirmation] = granted
        self._stats.in_flight += 1
        try:
            async with asyncio.timeout_at(confirmation._deadline):
                await granted
        except BaseException as error:
            self._stats.in_flight -= 1
            if self.waiting.pop(confirmation, None) is None and not granted.cancelled() and not granted.exception():
                # The room was granted in the same moment.
                self.window.give(confirmation._size)
            self.grant()
            if isinstance(error, TimeoutError):
                full = self.refused(self.full("stayed full for the whole timeout"))
                confirmation._decide(full)
                raise full from error
            dropped = self.dropped(confirmation, "it was given up before there was room")
            self._stats.dropped += 1
            confirmation._decide(dropped)
            if isinstance(error, ClosedError):
                raise dropped from error
            raise
        self._stats.in_flight -= 1
        self.window.give(confirmation._size)

    def grant(self) -> None:
        """Give room that became free to those who wait, in turn."""
        waiting = self.waiting
        while waiting:
            confirmation, granted = next(iter(waiting.items()))
            if not granted.done():
                if not self.window.fits(confirmation._size):
                    return
                # Kept for this message until its publisher runs.
                self.window.take(confirmation._size)
                granted.set_result(None)
            del waiting[confirmation]

    def victims(self, queue: Iterable[Confirmation], size: int) -> list[Confirmation] | None:
        """
        The oldest messages never handed over whose dropping makes room for `size` bytes.

        Returns:
            `None` if dropping them all would not do: then none is to be dropped.
        """
        window = self.window
        rest = Window(window.limit, window.limit_bytes)
        rest.messages, rest.bytes = window.messages, window.bytes
        victims: list[Confirmation] = []
        for oldest in queue:
            if rest.fits(size):
                break
            if not oldest._maybe:
                victims.append(oldest)
                rest.give(oldest._size)
        return victims if rest.fits(size) else None

    def stop(self) -> None:
        """Send everybody away who waits."""
        for granted in self.waiting.values():
            if not granted.done():
                granted.set_exception(self.closed())
        self.waiting.clear()

    # Refusals

    def refused(self, error: UnistreamError) -> UnistreamError:
        """Count a message that was turned away."""
        self._stats.failed += 1
        return error

    def full(self, why: str) -> WindowFullError:
        """The error for a message without room."""
        return WindowFullError(
            f"the window of the producer of {self._topic!r} ({self.window.limit} messages, "
            f"{self.window.limit_bytes} bytes) {why}; publish slower, or raise max_unconfirmed",
            topic=self._topic,
        )

    def closed(self) -> UnistreamError:
        """The error for a message that comes too late."""
        return with_stored(ClosedError(f"the producer of {self._topic!r} was closed", topic=self._topic))

    def dropped(self, confirmation: Confirmation, why: str) -> DroppedError:
        """The error for a message that the library dropped."""
        return DroppedError(f"message {confirmation.id} to {self._topic!r} was dropped: {why}", topic=self._topic)
