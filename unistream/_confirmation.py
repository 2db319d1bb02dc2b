"""What a publisher holds of a message that it submitted, and the count of what became of all of them.

Knows messages and outcomes; knows neither the window nor the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, Literal, cast

from unistream.driver.types import PublishOutcome, RawMessage
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ClosedError,
    ContractError,
    PublishUnknownError,
    TimedOutError,
    TopicMissingError,
    UnistreamError,
)
from unistream.message import Receipt

__all__ = ["Confirmation", "WhenFull", "outcome_of", "receipt", "size_of", "with_stored"]

WhenFull = Literal["block", "fail", "drop_newest", "drop_oldest", "spill"]

# Errors without a `stored` of their own that say that a message was turned away, whoever raises them.
_TURNED_AWAY = (AccessError, BrokerUnavailableError, ClosedError, TopicMissingError)


class Confirmation:
    """What becomes of a submitted message: a `Receipt` or a `PublishError`. Awaitable."""

    __slots__ = (
        "_deadline",
        "_handed",
        "_loop",
        "_maybe",
        "_order",
        "_outcome",
        "_raw",
        "_size",
        "_unseen",
        "_waiters",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        unseen: dict[Confirmation, None],
        raw: RawMessage,
        size: int,
        deadline: float,
    ) -> None:
        self._loop = loop
        self._unseen = unseen
        self._raw = raw
        self._size = size
        self._deadline = deadline
        # For the outbox: its place among all messages; whether the driver has it now; whether an earlier hand-over
        # ended without a word, so that the broker may hold it.
        self._order = 0
        self._handed = False
        self._maybe = False
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
        self._unseen.pop(self, None)
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
            if timeout is None:
                await self._decided()
            else:
                try:
                    async with asyncio.timeout(timeout):
                        await self._decided()
                except TimeoutError as error:
                    raise TimedOutError(f"message {self.id} is not confirmed after {timeout} s") from error
        failure = self.failure()
        if failure is not None:
            raise failure
        return cast(Receipt, self._outcome)

    def __await__(self) -> Generator[Any, None, Receipt]:
        return self.result().__await__()

    async def _decided(self) -> None:
        """Wait until the outcome is known, without looking at it."""
        if self._outcome is not None:
            return
        waiter = self._loop.create_future()
        self._waiters = (*self._waiters, waiter)
        try:
            await waiter
        except BaseException:
            self._waiters = tuple(other for other in self._waiters if other is not waiter)
            raise

    def _decide(self, outcome: Receipt | UnistreamError) -> None:
        self._outcome = outcome
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters = ()

    def __repr__(self) -> str:
        outcome = "undecided" if self._outcome is None else repr(self._outcome)
        return f"<Confirmation of {self.id}: {outcome}>"


async def outcome_of(confirmation: Confirmation) -> Receipt | UnistreamError:
    """What becomes of a message, its failure as a value."""
    try:
        return await confirmation.result()
    except UnistreamError as error:
        return error


def size_of(raw: RawMessage) -> int:
    """Bytes of value, key and headers."""
    size = len(raw.value) + len(raw.key or b"")
    return size + sum(len(name) + len(value) for name, value in raw.headers) if raw.headers else size


def with_stored(error: UnistreamError) -> UnistreamError:
    """An error that says whether the message may be stored: `"unknown"`, unless its class rules that out."""
    if error.stored is None:
        error.stored = "no" if isinstance(error, _TURNED_AWAY) else "unknown"
    return error


def receipt(confirmation: Confirmation, outcome: PublishOutcome) -> Receipt | UnistreamError:
    """What the publisher gets for a driver's outcome."""
    raw = confirmation._raw
    if type(outcome) is Receipt:
        return outcome
    if not isinstance(outcome, UnistreamError):
        defect = ContractError(f"the driver gave {outcome!r} as the outcome of a message")
        return with_stored(defect)
    error = with_stored(outcome)
    if confirmation._maybe and error.stored == "no":
        unknown = PublishUnknownError(
            f"message {raw.id} was refused when it was sent again, but may be stored since the first time: {error}",
            topic=error.topic,
        )
        unknown.__cause__ = error
        return unknown
    return error
