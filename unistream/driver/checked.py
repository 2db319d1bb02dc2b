"""A wrapper around a driver that asserts both sides of the contract, the driver's and the caller's.

Always on in the conformance suite and in adapter tests: `connect(url, driver=checked(MyDriver))`. A breach raises
`ContractError`, which nothing handles.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeVar

from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.types import (
    GroupSpec,
    MaybeAwaitable,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Receipt,
    Settlement,
    SettleOutcome,
    Token,
    TopicSpec,
    Verb,
)
from unistream.errors import BrokerUnavailableError, ClosedError, ContractError, SettleError, UnistreamError

__all__ = ["checked"]

T = TypeVar("T")


def checked(base: type[Driver]) -> type[Driver]:
    """A subclass of the driver class whose producers and consumers are checked."""

    class Checked(base):  # type: ignore[misc, valid-type]
        async def producer(self, topic: TopicSpec) -> ProducerDriver:
            return _Producer(await super().producer(topic))

        async def consumer(
            self,
            group: GroupSpec,
            topic: TopicSpec,
            *,
            max_in_flight: int,
            lost: Callable[[Collection[Token], str], None],
        ) -> ConsumerDriver:
            return await _Consumer.join(super().consumer, group, topic, max_in_flight, lost)

    Checked.__name__ = Checked.__qualname__ = f"Checked{base.__name__}"
    return Checked


def _must(condition: bool, rule: str) -> None:
    if not condition:
        raise ContractError(f"driver contract: {rule}")


class _Calls:
    """How many calls are under way, against the most that may be."""

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self._now = 0

    def run(self, call: Callable[[], MaybeAwaitable[T]], check: Callable[[T], None]) -> MaybeAwaitable[T]:
        """Make a call and check its answer, at once or when it comes."""
        _must(self._now < self._most, f"at most {self._most} calls of {self._what} at a time")
        try:
            answer = call()
        except Exception as error:
            _must(isinstance(error, UnistreamError), f"{self._what} let {error!r} through untranslated")
            raise
        if not inspect.isawaitable(answer):
            check(answer)
            return answer
        self._now += 1
        return self._follow(answer, check)

    async def _follow(self, answer: Awaitable[T], check: Callable[[T], None]) -> T:
        try:
            result = await answer
        except Exception as error:
            _must(isinstance(error, UnistreamError), f"{self._what} let {error!r} through untranslated")
            raise
        finally:
            self._now -= 1
        check(result)
        return result


class _Producer(ProducerDriver):
    def __init__(self, inner: ProducerDriver) -> None:
        self._inner = inner
        self.pipeline = inner.pipeline
        self.batch_messages = inner.batch_messages
        self.batch_bytes = inner.batch_bytes
        self._calls = _Calls("publish", inner.pipeline)
        self._closed = False

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        _must(not self._closed, "publish after close")
        _must(1 <= len(batch) <= self.batch_messages, f"a batch has 1 to {self.batch_messages} messages")
        size = sum(len(message.value) for message in batch)
        _must(len(batch) == 1 or size <= self.batch_bytes, f"a batch has at most {self.batch_bytes} bytes")
        _must(timeout > 0, "a publish timeout is above 0")

        def check(outcomes: list[PublishOutcome]) -> None:
            _must(len(outcomes) == len(batch), f"{len(outcomes)} outcomes for {len(batch)} messages")
            for message, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, Receipt):
                    _must(outcome.id == message.id, f"{outcome} for message {message.id}")
                    continue
                _must(isinstance(outcome, UnistreamError), f"{outcome!r} is no publish outcome")
                _must(
                    not isinstance(outcome, BrokerUnavailableError),
                    "a message that was not handed over raises BrokerUnavailableError for the whole batch",
                )

        return self._calls.run(lambda: self._inner.publish(batch, timeout), check)

    async def close(self) -> None:
        self._closed = True
        await self._inner.close()


class _Consumer(ConsumerDriver):
    _inner: ConsumerDriver

    def __init__(self, lost: Callable[[Collection[Token], str], None]) -> None:
        self._tell = lost
        self._lent: set[Token] = set()
        self._ended: set[Token] = set()
        self._receiving = _Calls("receive", 1)
        self._settling = _Calls("settle", 1)
        self._extending = _Calls("extend", 1)
        self._closed = False

    @classmethod
    async def join(
        cls,
        consumer: Callable[..., Awaitable[ConsumerDriver]],
        group: GroupSpec,
        topic: TopicSpec,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> _Consumer:
        self = cls(lost)
        self._inner = await consumer(group, topic, max_in_flight=max_in_flight, lost=self._lose)
        return self

    def _lose(self, tokens: Collection[Token], reason: str) -> None:
        self._lent.difference_update(tokens)
        self._ended.update(tokens)
        self._tell(tokens, reason)

    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        _must(not self._closed, "receive after close")
        _must(limit >= 1 and timeout >= 0, f"receive(limit={limit}, timeout={timeout})")

        def check(raws: list[RawDelivery]) -> None:
            _must(len(raws) <= limit, f"receive(limit={limit}) returned {len(raws)} (BPC-1)")
            for raw in raws:
                _must(raw.attempt >= 1, f"attempt {raw.attempt} (DEL-4)")
                _must(not raw.suspect or len(raws) == 1, "a suspect comes alone (DEL-4)")
                _must(raw.token not in self._lent and raw.token not in self._ended, "a token was used twice")
                self._lent.add(raw.token)

        return self._receiving.run(lambda: self._inner.receive(limit, timeout), check)

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        _must(not self._closed, "settle after close")
        for settlement in batch:
            known = settlement.token in self._lent or settlement.token in self._ended
            _must(known, f"settle of a loan that was never lent: {settlement}")
            _must(settlement.delay == 0 or settlement.verb is Verb.NACK, f"a delay belongs to a nack: {settlement}")

        def check(outcomes: list[SettleOutcome]) -> None:
            self._outcomes(outcomes, len(batch))
            tokens = [settlement.token for settlement in batch]
            self._lent.difference_update(tokens)
            self._ended.update(tokens)

        return self._settling.run(lambda: self._inner.settle(batch), check)

    def extend(self, tokens: Sequence[Token], seconds: float) -> MaybeAwaitable[list[SettleOutcome]]:
        _must(not self._closed, "extend after close")
        _must(seconds > 0, f"extend for {seconds} s")
        return self._extending.run(
            lambda: self._inner.extend(tokens, seconds), lambda outcomes: self._outcomes(outcomes, len(tokens))
        )

    @staticmethod
    def _outcomes(outcomes: list[SettleOutcome], count: int) -> None:
        _must(len(outcomes) == count, f"{len(outcomes)} outcomes for {count} loans")
        for outcome in outcomes:
            _must(outcome is None or isinstance(outcome, SettleError), f"{outcome!r} is no settle outcome")

    async def close(self) -> None:
        self._closed = True
        try:
            await self._inner.close()
        except ClosedError as error:
            raise ContractError("closing twice is allowed") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
