"""Connecting to a broker: one client, its topics, producers, groups, health and events."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from unistream._confirmation import WhenFull
from unistream._consumer import Consumer
from unistream._declare import check_topic, conflict, group_spec, name_of, topic_spec
from unistream._group import Drop, Group
from unistream._health import Check, Health, Listeners, health_of
from unistream._parts import Parts
from unistream._producer import Producer
from unistream._registry import find_driver
from unistream._watchdog import Watchdog
from unistream.capabilities import Capabilities
from unistream.config import Config, load, parse_target, scheme_of
from unistream.core.backoff import Retry
from unistream.core.window import Window
from unistream.driver.contract import Driver
from unistream.driver.types import (
    DataLoss,
    Event,
    GroupSpec,
    HealthChanged,
    Ordering,
    Overflow,
    Retention,
    StartAt,
    TopicSpec,
)
from unistream.errors import ClosedError, ConfigError, TopicMissingError, UnistreamError, UnsupportedError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Check", "Client", "Health", "connect"]

MIB = 1024 * 1024

_log = logging.getLogger("unistream.client")


def connect(
    target: str | Config | None = None,
    *,
    profile: str | None = None,
    require: Mapping[str, object] | None = None,
    driver: type[Driver] | None = None,
) -> Client:
    """
    A client for the broker that a URL names. Nothing is contacted before it is entered.

    Args:
        target: A URL or a `Config`; without one: `UNISTREAM_URL`, else a profile of `UNISTREAM_CONFIG` or
            `./unistream.toml`.
        profile: Which profile of that file.
        require: What the program needs of the backend, checked at open; see `Capabilities.require`.
        driver: A driver class, for tests; else the installed one for the URL's scheme.

    Raises:
        ConfigError: The URL, an option or the file is wrong, or no driver serves the scheme.
    """
    config = load(target, profile)
    kind = driver or find_driver(scheme_of(config.url))
    return Client(config, kind, dict(require or {}))


class Client:
    """
    One connection to one broker. An async context manager; it lives on the event loop that entered it.

    Attributes:
        capabilities: What the backend offers, read from the live server; there once the client is entered.
    """

    def __init__(self, config: Config, driver: type[Driver], require: Mapping[str, object]) -> None:
        self._config = config
        self._require = require
        self._target = parse_target(config.url, driver)
        self._driver = driver(self._target, self._emit)
        # Set on entry, before any use.
        self._loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]
        self._pid = os.getpid()
        self._state = "new"
        self._parts = Parts()
        self._closing: asyncio.Task[None] | None = None
        self._listeners = Listeners()
        # What `events` was told last of the connection.
        self._told = True

    async def __aenter__(self) -> Client:
        if self._state != "new":
            raise ClosedError(f"{self}: entered before; connect() again")
        self._loop = asyncio.get_running_loop()
        self._watchdog = Watchdog(self._loop)
        self._state = "opening"
        try:
            await self._driver.open()
            self.capabilities.require(self._require)
            if self._state != "opening":
                raise ClosedError(f"{self} was closed while it opened")
        except BaseException:
            self._state = "closed"
            await self._discard()
            raise
        self._state = "open"
        _log.debug("%s: connected to %s", self, self.capabilities.product)
        return self

    async def _discard(self) -> None:
        """Close a driver that could not be opened; why it could not is the error to show, not what this raises."""
        try:
            await self._driver.close()
        except Exception:
            _log.exception("%s: the driver raised from close() after it could not be opened", self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except (ExceptionGroup, UnistreamError) as failures:
            if error is None:
                raise
            _log.warning("%s: %s (the block was left by %r)", self, failures, error)

    @property
    def capabilities(self) -> Capabilities:
        """What the backend offers."""
        try:
            return self._driver.capabilities
        except AttributeError:
            raise ClosedError(f"{self}: capabilities are read from the live server; enter the client first") from None

    @property
    def native(self) -> Any:
        """The client library's own object; what is done with it is not portable."""
        return self._use().native

    # Topics

    async def create_topic(
        self,
        name: str,
        *,
        partitions: int = 1,
        ordering: Ordering = "none",
        retention: Retention | None = None,
        max_backlog: int | None = None,
        overflow: Overflow = "reject",
    ) -> None:
        """
        Create a topic. Idempotent.

        Args:
            name: `[A-Za-z0-9._-]{1,200}`.
            partitions: Units of order, chosen by the key; fixed for the topic's life.
            ordering: `"key"`: groups may ask for order by key.
            retention: What may be removed although it is not settled; `None`: nothing, by anyone.
            max_backlog: Messages not settled by the slowest group.
            overflow: What happens beyond it: `"reject"` (TopicFullError) or `"drop_oldest"` (a declared loss).

        Raises:
            TopicConflictError: It exists with other settings; nothing was changed.
            UnsupportedError: The backend lacks the ordering, retention or max_backlog; nothing was touched.
            ConfigError: A value is out of range.
        """
        settings: dict[str, Any] = {
            "partitions": partitions,
            "ordering": ordering,
            "retention": retention,
            "max_backlog": max_backlog,
            "overflow": overflow,
            **self._config.topic(name_of("topic", name)),
        }
        spec = topic_spec(name, settings)
        driver = self._use()
        check_topic(spec, driver.capabilities)
        error = conflict(spec, await driver.create_topic(spec))
        if error is not None:
            raise error

    async def delete_topic(self, name: str) -> None:
        """Delete a topic with its messages and groups; deleting what does not exist succeeds."""
        await self._use().delete_topic(name_of("topic", name))

    async def topics(self) -> Sequence[TopicSpec]:
        """All topics, by name."""
        return await self._use().topics()

    # Publishing and consuming

    def producer(
        self,
        topic: str,
        *,
        max_unconfirmed: int = 1000,
        max_unconfirmed_bytes: int = 16 * MIB,
        when_full: WhenFull = "block",
    ) -> Producer:
        """
        The publishing side of a topic, which opens when it is entered.

        Args:
            topic: Name of the topic.
            max_unconfirmed: Messages published and not confirmed.
            max_unconfirmed_bytes: Their bytes.
            when_full: What happens beyond: `"block"` (wait for room), `"fail"` (WindowFullError at once),
                `"drop_newest"`, `"drop_oldest"` (of what was not handed over; DroppedError for its publisher).

        Raises:
            ConfigError, UnsupportedError: A value is out of range, or not offered.
        """
        if when_full == "spill":
            raise UnsupportedError(
                'when_full="spill" is not offered yet; use "block", and a durable broker for the buffer',
                capability="spill",
                topic=topic,
            )
        if when_full not in ("block", "fail", "drop_newest", "drop_oldest"):
            raise ConfigError(f'when_full={when_full!r}: give "block", "fail", "drop_newest" or "drop_oldest"')
        if max_unconfirmed < 1 or max_unconfirmed_bytes < 1:
            raise ConfigError(f"producer(max_unconfirmed={max_unconfirmed}): give 1 or more, of messages and of bytes")
        return Producer(self, name_of("topic", topic), Window(max_unconfirmed, max_unconfirmed_bytes), when_full)

    def group(
        self,
        name: str | None,
        topic: str,
        *,
        ordering: Ordering = "none",
        start: StartAt = "latest",
        lease: float = 30.0,
        max_lease: float = 3600.0,
        retry: Retry | None = None,
        dead_letter: str | Drop | None = None,
    ) -> Group:
        """
        A group of consumers that share one copy of a topic. No I/O.

        Args:
            name: `[A-Za-z0-9._-]{1,200}`, scoped by the topic; `None`: ephemeral.
            topic: Name of the topic.
            ordering: `"key"`: messages of one key in publish order, one unsettled at a time.
            start: Where it begins when it is created: `"latest"`, and by capability `"earliest"`, an aware datetime,
                a position.
            lease: Seconds that a delivery is lent, renewals apart.
            max_lease: Seconds after lending beyond which nothing is renewed; equal to `lease`: no renewal.
            retry: This member's redelivery policy.
            dead_letter: Topic for messages without an attempt left; `DROP`: drop them.

        Raises:
            ConfigError: A value is out of range, or `retry.max_attempts` without a `dead_letter`.
        """
        settings: dict[str, Any] = {
            "ordering": ordering,
            "start": start,
            "lease": lease,
            "max_lease": max_lease,
            "dead_letter": dead_letter,
            **self._config.group(topic, name),
        }
        dead_letter = settings.pop("dead_letter")
        retry = retry or Retry()
        spec = group_spec(topic, name, settings)
        if retry.max_attempts is not None and dead_letter is None:
            raise ConfigError(
                f"group {name!r}: max_attempts={retry.max_attempts} needs a dead_letter topic for what has no attempt "
                "left, or dead_letter=unistream.DROP"
            )
        if not isinstance(dead_letter, Drop | None) and name_of("dead letter topic", dead_letter) == topic:
            raise ConfigError(f"group {name!r}: its dead letters would go round in the same topic {topic!r}")
        return Group(self, spec, name, retry, dead_letter)

    async def groups(self, topic: str | None = None) -> Sequence[GroupSpec]:
        """The groups of a topic, or of all topics; ephemeral ones left out."""
        driver = self._use()
        if topic is not None:
            return await driver.groups(name_of("topic", topic))
        found: list[GroupSpec] = []
        for each in await driver.topics():
            with suppress(TopicMissingError):  # deleted while we look
                found += await driver.groups(each.name)
        return found

    # Health and events

    async def health(self) -> Health:
        """
        Whether this client does its work: a round trip to the broker, and the state of every producer and consumer.

        A consumer whose topic or group was deleted is not healthy, however well the connection stands.
        """
        if self._state != "open":
            return Health(False, "closed", ())
        ping: UnistreamError | None = None
        try:
            await self._use().ping()
        except UnistreamError as error:
            ping = error
        links = list(self._parts.links.values())
        health = health_of([("connection", ping), *((link.what, link.error) for link in links)])
        told, self._told = self._told, health.checks[0].ok
        if told is not self._told:
            self._emit(HealthChanged(*health.checks[0]))
        for link, check in zip(links, health.checks[1:], strict=True):
            if link.told is not check.ok:
                self._emit(HealthChanged(*check))
            link.told = check.ok
        return health

    def events(self) -> AsyncIterator[Event]:
        """
        What happens from now on: DataLoss, Disconnected, Connected, HealthChanged; ends when the client is closed.

        A listener that falls a thousand events behind loses the oldest.
        """
        self._use()
        return self._listeners.add()

    def _emit(self, event: Event) -> None:
        if isinstance(event, HealthChanged):
            _log.info("%s: %s", self, event)
        elif isinstance(event, DataLoss):
            _log.warning("%s: %s", self, event)
        self._listeners.tell(event)

    # Life

    async def close(self) -> None:
        """
        Close every consumer and producer of this client, then the connection. Idempotent.

        Raises:
            ExceptionGroup: Of the failures of submitted messages that nobody has looked at.

        Cancellation: What is undecided is given up, what is held is given back at once; then CancelledError goes on.
        """
        if self._closing is None and self._state != "open":
            # Whoever is opening it notices, and closes the driver.
            self._state = "closed"
            return
        if asyncio._get_running_loop() is not self._loop:
            self._wrong_loop()
        if self._closing is not None:
            # Somebody else closes it, and gets the failures.
            await asyncio.wait([self._closing])
            return
        self._state = "closed"
        self._closing = closing = self._loop.create_task(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            closing.cancel()
            await asyncio.wait([closing])
            raise

    async def _close(self) -> None:
        try:
            failures = await self._parts.close(Consumer, Producer)
        finally:
            self._listeners.end()
            await self._driver.close()
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup(f"{self} was closed, but", failures)

    def _use(self) -> Driver:
        """The driver, for a caller on the right loop while the client is open."""
        if self._state != "open":
            raise ClosedError(f"{self} is {'closed' if self._state == 'closed' else 'not entered: use `async with`'}")
        if asyncio._get_running_loop() is not self._loop:
            self._wrong_loop()
        return self._driver

    def _elsewhere(self) -> ClosedError:
        """The error for a use outside the loop or the process."""
        if os.getpid() != self._pid:
            return ClosedError(f"{self}: this process was forked from the one that opened it; connect() after the fork")
        return ClosedError(
            f"{self}: used outside the event loop that opened it; connect() there, or use unistream.sync from threads"
        )

    def _wrong_loop(self) -> NoReturn:
        raise self._elsewhere()

    def __repr__(self) -> str:
        return f"<Client {self._target}>"

    __str__ = __repr__
