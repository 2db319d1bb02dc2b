"""The publishing side as applications see it: checks a message, gives it a partition, and hands it to the outbox.

Knows no broker. One event loop touches a producer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

from unistream._confirmation import Confirmation, WhenFull, outcome_of, size_of, with_stored
from unistream._link import Link
from unistream._outbox import Outbox, answered
from unistream._stats import ProducerStats
from unistream._turns import TURN
from unistream.core.partitions import partition_for
from unistream.core.window import Window
from unistream.driver.contract import ProducerDriver
from unistream.driver.envelope import RESERVED_PREFIX
from unistream.driver.types import RawMessage
from unistream.errors import ClosedError, ConfigError, TimedOutError, TooLargeError, UnistreamError
from unistream.message import HeadersLike, Message, Receipt, as_bytes, header_pairs, new_id, new_ids

if TYPE_CHECKING:
    from types import TracebackType

    from unistream._client import Client

__all__ = ["Confirmation", "Producer", "ProducerStats", "WhenFull"]

DEFAULT_TIMEOUT = 30.0
LEAST_TIMEOUT = 0.001
"""Seconds; with less, no answer could come and the outcome of a message would be unknown for no reason."""

# A named tuple's own constructor is a Python function; this makes one per message at the speed of C.
_RAW: Callable[[tuple[Any, ...]], RawMessage] = partial(tuple.__new__, RawMessage)

_log = logging.getLogger("unistream.producer")


class Producer:
    """
    Publishes to one topic. An async context manager; leaving it flushes. Made by `Client.producer`.

    Attributes:
        topic: Name of the topic.
        stats: What became of every message.
    """

    def __init__(self, client: Client, topic: str, window: Window, when_full: WhenFull) -> None:
        self.topic = topic
        self.stats = ProducerStats()
        self._client = client
        self._window = window
        self._when_full: WhenFull = when_full
        self._driver: ProducerDriver | None = None
        self._outbox: Outbox | None = None
        self._entered = False
        self._left: asyncio.Future[None] | None = None
        self._partitions = 1
        self._turn = -1
        self._largest = 0.0
        self._most_bytes = 0

    async def __aenter__(self) -> Producer:
        self._client._use()
        if self._entered or self._left is not None:
            raise ClosedError(f"the producer of {self.topic!r} was entered or closed before; make another")
        self._entered = True
        await self._client._parts.enter(self, self._open())
        return self

    async def _open(self) -> None:
        client = self._client
        driver = client._driver
        spec = await driver.topic(self.topic)
        self._driver = await driver.producer(spec)
        self._partitions = spec.partitions
        self._largest = driver.capabilities.max_message_bytes.limit
        self._most_bytes = min(self._window.limit_bytes, self._driver.batch_bytes)
        link = Link(f"producer {self.topic}", client._emit, _log)
        self._outbox = Outbox(
            self.topic,
            self._driver,
            client._loop,
            self._window,
            self._when_full,
            link,
            dedupes=bool(driver.capabilities.dedupe),
            stats=self.stats,
        )
        if self._left is not None:
            await self._driver.close()
            raise ClosedError(f"the producer of {self.topic!r} was closed while it opened", topic=self.topic)
        client._parts.links[self] = link

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except ExceptionGroup as failures:
            if error is None:
                raise
            _log.warning("%s (the block was left by %r)", failures, error)

    async def publish(
        self,
        value: bytes,
        *,
        key: bytes | str | None = None,
        headers: HeadersLike | None = None,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Receipt:
        """
        Publish one message and wait until the broker has confirmed it.

        Args:
            value: The body.
            key: Chooses the partition and the order; `str` is encoded as UTF-8.
            headers: A mapping or pairs; names that begin with `unistream-` are reserved.
            id: Identity, at most 128 ASCII characters; a UUIDv7 text unless given.
            timeout: Seconds for everything: room in the window, reconnecting, the confirm.

        Raises:
            NotPublishedError: Surely not stored (`stored="no"`): WindowFullError, TooLargeError, DroppedError, …
            PublishUnknownError: Perhaps stored (`stored="unknown"`).
            TopicMissingError, AccessError, ConfigError, ClosedError: With `stored="no"`.

        Cancellation: The message counts as dropped while it was still waiting, else as unknown; it is not sent
            again, and no other receipt shifts.
        """
        outbox = self._here()
        if not timeout >= LEAST_TIMEOUT:
            timeout = LEAST_TIMEOUT
        if outbox.turns.unbroken >= TURN:
            await outbox.turns.take()
        raw, size = self._raw(value, key, headers, id)
        if outbox.clear and outbox.fits(size):
            answer = outbox.now((raw,), timeout)
            if isinstance(answer, list):
                if len(answer) == 1 and type(receipt := answer[0]) is Receipt:
                    self.stats.confirmed += 1
                    return receipt
                answer = answered(answer)
            [confirmation] = outbox.track((raw,), timeout, answer)
        else:
            confirmation = await outbox.put(raw, size, timeout)
        try:
            return await confirmation.result()
        except asyncio.CancelledError:
            outbox.withdraw(confirmation)
            raise

    async def submit(
        self,
        value: bytes,
        *,
        key: bytes | str | None = None,
        headers: HeadersLike | None = None,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Confirmation:
        """
        Publish one message, waiting for room in the window only.

        Arguments and errors are those of `publish`; what happens once there was room is told by the Confirmation. A
        failure that nobody looks at there is raised by `flush` and on leaving the producer.

        Cancellation: The message is not handed over.
        """
        outbox = self._here()
        if not timeout >= LEAST_TIMEOUT:
            timeout = LEAST_TIMEOUT
        if outbox.turns.unbroken >= TURN:
            await outbox.turns.take()
        raw, size = self._raw(value, key, headers, id)
        return await outbox.put(raw, size, timeout)

    async def publish_many(
        self, messages: Iterable[Message | bytes], *, timeout: float = DEFAULT_TIMEOUT
    ) -> list[Receipt | UnistreamError]:
        """
        Publish messages in order and wait for all of them.

        Args:
            messages: `Message` objects, or bare bodies; read only as fast as there is room.
            timeout: Seconds for each message, as in `publish`.

        Returns:
            One outcome per message, in order: its Receipt, or the error that `publish` would have raised.

        Cancellation: Messages not yet handed over are dropped; those that were are unknown.
        """
        outbox = self._here()
        if not timeout >= LEAST_TIMEOUT:
            timeout = LEAST_TIMEOUT
        most = min(self._window.limit, self._driver.batch_messages if self._driver else 1)
        outcomes: list[Receipt | UnistreamError | Confirmation] = []
        rest = iter(messages)
        try:
            while batch := list(islice(rest, most)):
                if outbox.turns.unbroken >= TURN:
                    await outbox.turns.take()
                if outbox.at_once and outbox.clear and (raws := self._plain(batch)) is not None:
                    # The driver answers at once: whole batches go straight through.
                    self._pass(outbox, raws, timeout, outcomes)
                    continue
                for message in batch:
                    try:
                        raw, size = self._message(message)
                        outcomes.append(await outbox.put(raw, size, timeout))
                    except UnistreamError as error:
                        outcomes.append(error)
            return [await outcome_of(outcome) if isinstance(outcome, Confirmation) else outcome for outcome in outcomes]
        except asyncio.CancelledError:
            for outcome in outcomes:
                if isinstance(outcome, Confirmation):
                    outbox.withdraw(outcome)
            raise

    def _plain(self, batch: Sequence[Message | bytes]) -> list[RawMessage] | None:
        """Bare bodies as they cross the driver line, in one piece; `None` if any message needs a closer look."""
        if set(map(type, batch)) != {bytes} or max(map(len, batch)) > self._largest:  # type: ignore[arg-type]
            return None
        if sum(map(len, batch)) > self._most_bytes:  # type: ignore[arg-type]
            return None
        partitions = self._partitions
        if partitions == 1:
            places: Iterable[int] = repeat(0)
        else:
            places = [self._partition(None) for _ in batch]
        ids = new_ids(len(batch))
        return list(map(_RAW, zip(ids, batch, repeat(None), repeat(()), places, repeat(""), strict=False)))

    def _message(self, message: Message | bytes) -> tuple[RawMessage, int]:
        if isinstance(message, Message):
            return self._raw(message.value, message.key, message.headers, message.id)
        return self._raw(message, None, None, None)

    def _pass(
        self,
        outbox: Outbox,
        raws: list[RawMessage],
        timeout: float,
        outcomes: list[Receipt | UnistreamError | Confirmation],
    ) -> None:
        """Hand a whole batch to a driver that answers at once."""
        self.stats.published += len(raws)
        answer = outbox.now(raws, timeout)
        if not isinstance(answer, list):
            outcomes.extend(outbox.track(raws, timeout, answer))
        elif len(answer) == len(raws) and set(map(type, answer)) == {Receipt}:
            self.stats.confirmed += len(raws)
            outcomes.extend(answer)
        else:
            outcomes.extend(outbox.track(raws, timeout, answered(answer)))

    async def flush(self, timeout: float | None = None) -> None:
        """
        Wait until every message published so far is decided.

        Raises:
            TimedOutError: Some are not after `timeout` seconds; they go on.
            ExceptionGroup: Of the failures of submitted messages that nobody has looked at.
        """
        outbox = self._here()
        try:
            async with asyncio.timeout(timeout):
                await outbox.decided()
        except TimeoutError as error:
            raise TimedOutError(
                f"{self.stats.in_flight} messages to {self.topic!r} are undecided after {timeout} s", topic=self.topic
            ) from error
        self._raise_unseen(outbox)

    async def close(self) -> None:
        """
        Take no new messages, flush, and release the driver's side. Idempotent.

        Raises:
            ExceptionGroup: As `flush`.

        Cancellation: What is undecided is given up: unknown, or dropped if it was never handed over.
        """
        if self._left is not None:
            # Closed, or being closed by somebody else, who gets its failures.
            await asyncio.shield(self._left)
            return
        outbox = self._outbox
        if outbox is not None:
            self._here()
        self._left = asyncio.get_running_loop().create_future()
        try:
            if outbox is not None:
                await self._leave(outbox)
                self._raise_unseen(outbox)
        finally:
            self._left.set_result(None)

    async def _leave(self, outbox: Outbox) -> None:
        outbox.closing = True
        try:
            await outbox.decided()
        finally:
            self._outbox = None
            try:
                await outbox.stop()
            finally:
                self._client._parts.links.pop(self, None)
                if self._driver is not None:
                    await self._driver.close()

    def _raise_unseen(self, outbox: Outbox) -> None:
        failures = outbox.take_unseen()
        if failures:
            raise ExceptionGroup(f"{len(failures)} messages to {self.topic!r} were not confirmed", failures)

    def _here(self) -> Outbox:
        outbox = self._outbox
        if outbox is None or outbox.closing:
            closed = ClosedError(
                f"the producer of {self.topic!r} is closed, or was never entered: use `async with`",
                topic=self.topic,
            )
            raise with_stored(closed)
        if asyncio._get_running_loop() is not outbox.loop:
            raise with_stored(self._client._elsewhere())
        return outbox

    def _raw(
        self, value: bytes, key: bytes | str | None, headers: HeadersLike | None, id: str | None
    ) -> tuple[RawMessage, int]:
        """The message as it crosses the driver line, and its size; counts it as published."""
        self.stats.published += 1
        try:
            if type(value) is not bytes:
                value = as_bytes(value, "value")
            size = len(value)
            if key is not None:
                key = key.encode() if isinstance(key, str) else as_bytes(key, "key")
                size += len(key)
            pairs = header_pairs(headers) if headers else ()
            for name, content in pairs:
                if name.lower().startswith(RESERVED_PREFIX):
                    raise ConfigError(f"header {name!r}: names that begin with {RESERVED_PREFIX!r} are reserved")
                # Every broker's headers are UTF-8 at most: half a surrogate pair is refused here, not by the driver.
                size += len(name if name.isascii() else name.encode()) + len(content)
            if size > self._largest:
                raise self._too_large(size)
            if not id:
                id = new_id()
            elif (
                not isinstance(id, str) or len(id) > 128 or not id.isascii() or not id.isprintable() or id != id.strip()
            ):
                # Some brokers' headers lose spaces at the ends.
                raise ConfigError(f"id {id!r}: give at most 128 printable ASCII characters, no space at the ends")
        except (TypeError, ValueError, UnistreamError) as error:
            self.stats.failed += 1
            refused = error if isinstance(error, UnistreamError) else ConfigError(str(error))
            refused.stored = "no"
            refused.topic = self.topic
            if refused is error:
                raise
            raise refused from error
        return _RAW((id, value, key, pairs, self._partition(key) if self._partitions > 1 else 0, "")), size

    def _too_large(self, size: int) -> TooLargeError:
        return TooLargeError(
            f"a message of {size} bytes (value, key, headers) to {self.topic!r}: {self._client.capabilities.product} "
            f"takes {self._largest:.0f}; store the body elsewhere and publish a reference to it, or raise the limit"
        )

    def _partition(self, key: bytes | None) -> int:
        if key is not None:
            return partition_for(key, self._partitions)
        self._turn = (self._turn + 1) % self._partitions
        return self._turn

    async def _publish_raw(self, raw: RawMessage, timeout: float) -> None:
        """Publish a message made by the library itself, reserved headers included, and wait for the confirm."""
        outbox = self._here()
        self.stats.published += 1
        raw = raw._replace(partition=self._partition(raw.key))
        confirmation = await outbox.put(raw, size_of(raw), timeout)
        try:
            await confirmation.result()
        except asyncio.CancelledError:
            outbox.withdraw(confirmation)
            raise
