"""Saboteurs of what nobody sees in a delivery: threads, loops, forks, memory, and things left behind."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import unistream
from unistream import _client, sync
from unistream.conformance.saboteurs.table import mutation, saboteur
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, resolve
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import GroupSpec, RawDelivery, RawMessage, Token, TopicSpec
from unistream.errors import BrokerUnavailableError, ClosedError
from unistream.message import Receipt


@mutation("receipts-shared", "PUB-2", by=("thr.many-threads",))
@contextmanager
def receipts_shared() -> Iterator[None]:
    """Keeps the receipts of all threads in one place, and hands out the one that lies there."""
    publish = sync.Producer.publish
    last: list[Receipt] = []

    def careless(self: sync.Producer, value: bytes, **options: Any) -> Receipt:
        last.append(publish(self, value, **options))
        return last[-2] if len(last) > 1 else last[-1]

    with patch.object(sync.Producer, "publish", careless):
        yield


@mutation("elsewhere-unsaid", "END-6", by=("thr.wrong-loop",))
@contextmanager
def elsewhere_unsaid() -> Iterator[None]:
    """Says no more than `closed` to a caller on another event loop."""
    with patch.object(_client.Client, "_elsewhere", lambda self: ClosedError("closed")):
        yield


@mutation("fork-unnoticed", "END-6", by=("thr.fork",))
@contextmanager
def fork_unnoticed() -> Iterator[None]:
    """Takes a forked child for the process that connected."""
    pid = os.getpid()
    with patch.object(_client, "os", SimpleNamespace(getpid=lambda: pid)):
        yield


@mutation("more-handlers", "DEL-11")
@contextmanager
def more_handlers() -> Iterator[None]:
    """Runs twice as many handlers at a time as asked for."""
    run = unistream.Group.run

    async def eager(self: unistream.Group, handler: Any, *, concurrency: int = 1, **options: Any) -> Any:
        return await run(self, handler, concurrency=2 * concurrency, **options)

    with patch.object(unistream.Group, "run", eager):
        yield


@mutation("one-handler-thread", "DEL-11", by=("thr.handlers-in-threads",))
@contextmanager
def one_handler_thread() -> Iterator[None]:
    """Has one thread for all blocking handlers."""
    module = sys.modules[sync.Group.__module__]
    with patch.object(module, "ThreadPoolExecutor", lambda count, **options: ThreadPoolExecutor(1, **options)):
        yield


@mutation("faces-differ", "PUB-2", "DEL-4", by=("thr.both-faces-alike",))
@contextmanager
def faces_differ() -> Iterator[None]:
    """Counts attempts from zero in the blocking face."""
    attempt: Any = sync.Delivery.__dict__["attempt"]

    def less(self: sync.Delivery) -> int:
        return int(attempt.fget(self)) - 1

    with patch.object(sync.Delivery, "attempt", property(less)):
        yield


class _LeavesTask(DriverLayer):
    """Leaves a task running when it closes."""

    tasks: ClassVar[list[asyncio.Task[bool]]] = []

    async def close(self) -> None:
        """Start something that never ends."""
        self.tasks.append(asyncio.create_task(asyncio.Event().wait()))
        await self.inner.close()


@mutation("leave-task", "END-2", layer=_LeavesTask, by=("lek.client",))
@contextmanager
def leave_task() -> Iterator[None]:
    """Leaves a task running when a client is closed."""
    try:
        yield
    finally:
        _LeavesTask.tasks.clear()


class _LeavesFile(DriverLayer):
    """Leaves a file open when it closes."""

    files: ClassVar[list[int]] = []

    async def close(self) -> None:
        """Open a file and forget it."""
        self.files.append(os.open(os.devnull, os.O_RDONLY))
        await self.inner.close()


@mutation("leave-file", "END-2", layer=_LeavesFile, by=("lek.client",))
@contextmanager
def leave_file() -> Iterator[None]:
    """Leaves a file descriptor open when a client is closed."""
    try:
        yield
    finally:
        while _LeavesFile.files:
            os.close(_LeavesFile.files.pop())


class _LeavesThread(DriverLayer):
    """Leaves a thread running when it closes."""

    released: ClassVar[threading.Event] = threading.Event()

    async def close(self) -> None:
        """Start a thread and forget it."""
        threading.Thread(target=self.released.wait, daemon=True).start()
        await self.inner.close()


@mutation("leave-thread", "END-2", layer=_LeavesThread, by=("lek.client",))
@contextmanager
def leave_thread() -> Iterator[None]:
    """Leaves a thread running when a client is closed."""
    _LeavesThread.released.clear()
    try:
        yield
    finally:
        _LeavesThread.released.set()


class _KeepsAll(ConsumerLayer):
    """Keeps everything that it lends."""

    kept: ClassVar[list[bytes]] = []

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Keep a copy of every value, as a wire would have made one."""
        batch = await resolve(self.inner.receive(limit, timeout))
        self.kept.extend(bytes(bytearray(each.message.value)) for each in batch)
        return batch


class _KeepsAllDriver(DriverLayer):
    consumer_layer = _KeepsAll


@mutation("keep-all", "END-2", layer=_KeepsAllDriver, by=("lek.steady",))
@contextmanager
def keep_all() -> Iterator[None]:
    """Keeps every message that it has lent."""
    try:
        yield
    finally:
        _KeepsAll.kept.clear()


@saboteur("spin", "END-3", by=("con.idle-cost",))
class Spin(ConsumerLayer):
    """Asks again and again while nothing is there."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Poll without a pause until the time is up."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout
        while True:
            batch = await resolve(self.inner.receive(limit, 0.0))
            if batch or loop.time() >= ends:
                return batch
            await asyncio.sleep(0)


def _copy(message: RawMessage) -> RawMessage:
    return message._replace(value=bytes(bytearray(message.value)))


class _Hoarder(ConsumerLayer):
    """Fetches all there is."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._hoard: deque[RawDelivery] = deque()

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Hand out of the hoard, and fill it with everything that comes."""
        while batch := await resolve(self.inner.receive(100_000, 0.0 if self._hoard else timeout)):
            # A copy of each, as a wire would have made one.
            self._hoard.extend(each._replace(message=_copy(each.message)) for each in batch)
        return [self._hoard.popleft() for _ in range(min(limit, len(self._hoard)))]


@saboteur("hoard", "BPC-2", by=("bpc.client-buffer-bounded",))
class Hoard(DriverLayer):
    """Fetches the whole backlog into the process."""

    consumer_layer = _Hoarder
    beyond = 100_000


@saboteur("never-off-the-list", "GRP-7", by=("ovl.many-topics",))
class NeverOffTheList(DriverLayer):
    """Goes on listing topics that were deleted."""

    seen: ClassVar[dict[str, TopicSpec]] = {}

    async def topics(self) -> Sequence[TopicSpec]:
        """List everything that was ever there."""
        self.seen.update((spec.name, spec) for spec in await self.inner.topics())
        return list(self.seen.values())

    async def delete_topic(self, name: str) -> None:
        """Look at the list once more, then delete."""
        await self.topics()
        await self.inner.delete_topic(name)


@saboteur("ephemeral-stays", "GRP-5", by=("lek.broker",))
class EphemeralStays(DriverLayer):
    """Goes on listing ephemeral groups that have left."""

    ephemeral: ClassVar[dict[str, GroupSpec]] = {}

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """List everything that was ever there."""
        stands = list(await self.inner.groups(topic))
        names = {spec.name for spec in stands}
        return stands + [each for each in self.ephemeral.values() if each.topic == topic and each.name not in names]

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """Remember the group."""
        if group.ephemeral:
            self.ephemeral[group.name] = group
        return await super().consumer(group, topic, max_in_flight=max_in_flight, lost=lost)


@saboteur("few-clients", "END-3", by=("ovl.connect-storm",))
class FewClients(DriverLayer):
    """Serves no more than fifty clients."""

    open_now: ClassVar[int] = 0

    async def open(self) -> None:
        """Turn the fifty-first away."""
        if FewClients.open_now >= 50:
            raise BrokerUnavailableError("too many clients")
        await super().open()
        FewClients.open_now += 1

    async def close(self) -> None:
        """Make room."""
        FewClients.open_now -= 1
        await super().close()
