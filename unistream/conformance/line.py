"""Knows how to cut the line between one client and the broker where there is no wire to cut: at the driver's door.

Every member and producer of a random workload has a client of its own, and every client a line of its own, so that one
can fail while the others work. It is what a proxy does for a socket, for backends in the same process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from unistream.conformance.proxy import Proxy
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, ProducerLayer, resolve, stack
from unistream.driver.contract import Driver
from unistream.driver.types import (
    MaybeAwaitable,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Settlement,
    SettleOutcome,
    Token,
)
from unistream.errors import BrokerUnavailableError, PublishUnknownError

T = TypeVar("T")

LOST_SECONDS = 0.5
"""How long a driver waits for a lost answer before it says that the outcome is unknown."""


class Line:
    """
    The state of the line between one client and its broker.

    `dead` answers nothing, ever: the client's process has died, or its network is gone for good. `refuse` and
    `lose_reply` are counted down by the publishes they hit.
    """

    def __init__(self, proxy: Proxy | None = None) -> None:
        self.proxy = proxy
        """The wire below, where there is one: what a driver does on its own goes round its door."""
        self.refuse = 0
        """So many publish calls are refused before anything of them is sent, and those that were made meanwhile."""
        self.lose_reply = 0
        """So many publish calls are carried out, and their answer is lost."""
        self.latency = 0.0
        """So many seconds pass before a call reaches the broker."""
        self.hits = 0
        """How many calls met a fault: the proof that it took effect."""
        self._cut = False
        self._dead = False
        self._buried = False
        self._waiting: set[asyncio.Future[None]] = set()
        self._calls: set[asyncio.Future[Any]] = set()

    @property
    def dead(self) -> bool:
        """Whether the line is dead."""
        return self._dead

    def kill(self) -> None:
        """Let nothing through any more; calls under way are cut off and never return."""
        self._dead = True
        if self.proxy is not None:
            # As the operating system does for a process that is killed.
            self.proxy.refuse()
            self.proxy.reset()
        for call in self._calls:
            call.cancel()

    def interrupt(self) -> None:
        """Lose the connection: calls under way fail, and all others until `restore`."""
        if self.proxy is not None:
            self.proxy.refuse()
            self.proxy.reset()
            return
        self._cut = True
        for call in self._calls:
            call.cancel()

    def restore(self) -> None:
        """Let calls through again after `interrupt`."""
        self._cut = False
        if self.proxy is not None:
            self.proxy.heal()

    def bury(self) -> None:
        """End every call that waits on the dead line, and refuse new ones, so that the client can be closed."""
        self._dead = self._buried = True
        if self.proxy is not None:
            self.proxy.heal()
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def carry(self, call: Callable[[], MaybeAwaitable[T]]) -> T:
        """
        Make a call over the line.

        Raises:
            BrokerUnavailableError: The line is interrupted, or dead and buried.
        """
        if self.latency:
            self.hits += 1
            await asyncio.sleep(self.latency)
        if self._dead:
            return await self._nothing()
        if self._cut:
            self.hits += 1
            raise BrokerUnavailableError("the line is interrupted")
        task: asyncio.Future[T] = asyncio.ensure_future(resolve(call()))
        self._calls.add(task)
        try:
            result = await task
        except asyncio.CancelledError:
            if self._cut and task.cancelled():
                self.hits += 1
                raise BrokerUnavailableError("the line was interrupted") from None
            if not self._dead:
                raise
            return await self._nothing()
        finally:
            self._calls.discard(task)
        return await self._nothing() if self._dead else result

    async def _nothing(self) -> T:
        self.hits += 1
        if not self._buried:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                await future
            finally:
                self._waiting.discard(future)
        raise BrokerUnavailableError("the line is dead")


class _LineProducer(ProducerLayer):
    # How many calls were made, and the last one that must be refused with the ones before it: those made before their
    # caller could know of a refusal.
    _made = 0
    _refused = 0

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        self._made += 1
        return self._publish(self._made, batch, timeout)

    async def _publish(self, call: int, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        line = _line(self.driver)
        if line.refuse or call <= self._refused:
            line.refuse = max(0, line.refuse - 1)
            line.hits += 1
            self._refused = self._made
            raise BrokerUnavailableError("refused by the line before anything was sent", topic=self.topic.name)
        outcomes = await line.carry(lambda: self.inner.publish(batch, timeout))
        if line.lose_reply:
            line.lose_reply -= 1
            line.hits += 1
            # Nobody says that an answer is lost: the time runs out.
            await asyncio.sleep(min(timeout, LOST_SECONDS))
            return [PublishUnknownError("the answer was lost", topic=self.topic.name) for _ in batch]
        return outcomes

    async def close(self) -> None:
        if not _line(self.driver).dead:
            await self.inner.close()


class _LineConsumer(ConsumerLayer):
    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        return await _line(self.driver).carry(lambda: self.inner.receive(limit, timeout))

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        return await _line(self.driver).carry(lambda: self.inner.settle(batch))

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        return await _line(self.driver).carry(lambda: self.inner.extend(tokens, seconds))

    async def close(self) -> None:
        # A dead member can't take leave: its place in the group ends when the broker notices.
        if not _line(self.driver).dead:
            await self.inner.close()


class _OnLine(DriverLayer):
    line: ClassVar[Line]
    producer_layer = _LineProducer
    consumer_layer = _LineConsumer


def _line(driver: Driver) -> Line:
    assert isinstance(driver, _OnLine)
    return driver.line


def on_line(driver: type[Driver], line: Line) -> type[Driver]:
    """Return `driver` with `line` between it and the library."""
    return stack(driver, _OnLine, line=line)
