"""A group of consumers on a topic: its settings, its life at the broker, and running a handler on it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from enum import Enum
from secrets import token_hex
from typing import TYPE_CHECKING, Final, cast

from unistream._consumer import Consumer
from unistream._declare import conflict, kind_of_start
from unistream._delivery import Delivery
from unistream._stats import DrainReport
from unistream.core.backoff import Retry
from unistream.driver.types import GroupSpec, Lag, Member, StartAt, TopicSpec
from unistream.errors import ConfigError, Reject, UnsupportedError

if TYPE_CHECKING:
    from unistream._client import Client

__all__ = ["DROP", "Drop", "Group", "Handler"]

Handler = Callable[[Delivery], Awaitable[object]]

_log = logging.getLogger("unistream.consumer")


class Drop(Enum):
    """The type of `DROP`."""

    DROP = "drop"


DROP: Final = Drop.DROP
"""As a group's `dead_letter`: messages without an attempt left are dropped, counted and logged."""


class Group:
    """
    Consumers that share one copy of a topic. Made by `Client.group`; no I/O until something is asked of it.

    Attributes:
        name: `None`: ephemeral; each consumer of it is a group of its own.
        topic: Name of the topic.
        retry: This member's redelivery policy.
        dead_letter: Topic for messages without an attempt left, `DROP`, or `None`.
    """

    def __init__(
        self, client: Client, spec: GroupSpec, name: str | None, retry: Retry, dead_letter: str | Drop | None
    ) -> None:
        self.name = name
        self.topic = spec.topic
        self.retry = retry
        self.dead_letter = dead_letter
        self._client = client
        self._spec = spec

    async def create(self) -> None:
        """
        Pin the group at the broker, at `start`. Idempotent; of concurrent creators one pins (GRP-3).

        Raises:
            GroupConflictError: It exists with another ordering, start, lease or max_lease.
            TopicMissingError: There is no such topic.
            UnsupportedError: The backend or the topic lacks the ordering or the start.
        """
        await self._ensure()

    async def delete(self) -> None:
        """Delete the group and its progress; deleting what does not exist succeeds."""
        self._named("delete()")
        await self._client._use().delete_group(self.topic, self._spec.name)

    async def lag(self) -> Lag:
        """Messages published and not yet settled by the group, those in flight included."""
        self._named("lag()")
        self._require("lag", "lag()")
        return await self._client._use().lag(self.topic, self._spec.name)

    async def members(self) -> Sequence[Member]:
        """The members that the broker believes alive."""
        self._named("members()")
        return await self._client._use().members(self.topic, self._spec.name)

    async def seek(self, to: StartAt) -> None:
        """
        Move the group, so that the next delivery is the first message at or after `to`.

        Args:
            to: `"earliest"`, `"latest"`, an aware datetime, or a position of a Receipt or Delivery.

        Raises:
            UnsupportedError: The backend can't, or can't while members are joined.
            GroupMissingError, TopicMissingError: There is none.
        """
        self._named("seek()")
        driver = self._client._use()
        kind = kind_of_start(to)
        self._require("seek", f"seek({to!r})")
        if kind not in driver.capabilities.seek.to:
            raise driver.capabilities.unsupported("seek", f"seek({to!r})", topic=self.topic)
        await driver.seek(self.topic, self._spec.name, to)

    def consumer(self, *, max_in_flight: int = 100, max_in_flight_bytes: int = 16 * 1024 * 1024) -> Consumer:
        """
        A member of the group, which joins when it is entered; creates the group if need be.

        Args:
            max_in_flight: The most unsettled deliveries, fetched ahead included.
            max_in_flight_bytes: The most bytes of unsettled values in the application's hands, plus one message.
        """
        if max_in_flight < 1 or max_in_flight_bytes < 1:
            raise ConfigError(f"consumer(max_in_flight={max_in_flight}): give 1 or more, of messages and of bytes")
        return Consumer(self, max_in_flight, max_in_flight_bytes)

    async def run(
        self, handler: Handler, *, concurrency: int = 1, max_in_flight: int | None = None, drain: float = 30.0
    ) -> DrainReport:
        """
        Run a handler on every delivery, until cancelled or closed.

        A return acks, `Reject` rejects, any other exception nacks with the group's backoff.

        Args:
            handler: An async callable of one Delivery. It may settle by itself.
            concurrency: The most handlers at a time, exactly.
            max_in_flight: The most unsettled deliveries, fetched ahead included; default twice the concurrency.
            drain: Seconds that handlers get to finish when it ends.

        Returns:
            What became of the deliveries, when the client was closed.

        Cancellation: Handlers get `drain` seconds to finish; then they are cancelled and their messages given back.
        """
        if concurrency < 1:
            raise ConfigError(f"run(concurrency={concurrency}): give 1 or more")
        async with self.consumer(max_in_flight=2 * concurrency if max_in_flight is None else max_in_flight) as consumer:
            workers = [asyncio.create_task(_work(consumer, handler)) for _ in range(concurrency)]
            try:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                try:
                    await consumer.close(drain)
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.wait(workers)
                    # Looked at, all of them: the same end (a deleted group) reaches every worker, and is raised once.
                    errors = [error for worker in workers if not worker.cancelled() and (error := worker.exception())]
            if errors:
                raise errors[0]
            return await consumer.close()

    async def _ensure(self) -> tuple[GroupSpec, TopicSpec]:
        """The group and its topic as they stand, the group created if need be."""
        driver = self._client._use()
        capabilities = driver.capabilities
        spec = self._spec
        if spec.ordering == "key":
            self._require("ordering", 'ordering="key"')
        kind = kind_of_start(spec.start)
        if kind not in capabilities.start.at:
            raise capabilities.unsupported("start", f"start={spec.start!r}", topic=self.topic)
        topic = await driver.topic(self.topic)
        if spec.ordering == "key" and topic.ordering != "key":
            raise UnsupportedError(
                f'group {spec.name!r} asks for ordering="key", but the topic {self.topic!r} has none; '
                f'create the topic with ordering="key"',
                capability="ordering",
                topic=self.topic,
            )
        least = capabilities.lease.least
        spec = replace(spec, lease=max(spec.lease, least), max_lease=max(spec.max_lease, spec.lease, least))
        if self.name is None:
            return replace(spec, name=f"ephemeral-{token_hex(8)}", ephemeral=True), topic
        stands = await driver.create_group(spec)
        error = conflict(spec, stands)
        if error is not None:
            raise error
        return stands, topic

    def _named(self, what: str) -> None:
        if self.name is None:
            raise ConfigError(f"{what}: an ephemeral group lives only as long as its consumer; give it a name")

    def _require(self, capability: str, wanted: str) -> None:
        capabilities = self._client._use().capabilities
        if not getattr(capabilities, capability):
            raise capabilities.unsupported(capability, wanted, topic=self.topic)

    def _backoff(self, attempt: int) -> float:
        """Seconds that a nack without a delay asks for: the policy's, as far as the backend can."""
        longest = self._client.capabilities.nack_delay
        return min(self.retry.backoff.delay(attempt, random.random()), longest.max) if longest else 0.0

    def _check_delay(self, delay: float) -> None:
        if not delay >= 0:
            raise ConfigError(f"nack(delay={delay}): give 0 or more seconds")
        if delay > 0:
            self._require("nack_delay", f"nack(delay={delay})")
            capabilities = self._client.capabilities
            if delay > capabilities.nack_delay.max:
                raise capabilities.unsupported("nack_delay", f"nack(delay={delay})", topic=self.topic)

    def __repr__(self) -> str:
        return f"<Group {self.name} of {self.topic}>"


async def _work(consumer: Consumer, handler: Handler) -> None:
    """One of the `concurrency` workers of `Group.run`."""
    me = cast("asyncio.Task[None]", asyncio.current_task())
    async for delivery in consumer:
        consumer._handlers[me] = delivery._raw.token
        try:
            await handler(delivery)
        except Exception as error:
            if not isinstance(error, Reject):
                _log.warning("%s: the handler raised %r", delivery._name, error)
            await delivery._loans.conclude(delivery, error)
        except asyncio.CancelledError as stop:
            if me.cancelling():
                await delivery._loans.conclude(delivery, stop)
                raise
            # Something that the handler awaited was cancelled, not the handler: to its group that is a failure.
            _log.warning("%s: the handler raised %r", delivery._name, stop)
            await delivery._loans.conclude(delivery, RuntimeError(f"the handler ended with {stop!r}"))
        except BaseException as stop:
            await delivery._loans.conclude(delivery, stop)
            raise
        else:
            await delivery._loans.conclude(delivery, None)
        finally:
            del consumer._handlers[me], delivery
