"""Connecting to a broker: one client, its topics, producers, groups, health and events."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from unistream._consumer import Consumer
from unistream._group import Drop, Group
from unistream._link import Link
from unistream._outbox import WhenFull
from unistream._producer import Producer
from unistream._registry import find_driver
from unistream.capabilities import Capabilities
from unistream.config import Config, load, parse_target, scheme_of
from unistream.core.backoff import Retry
from unistream.core.window import Window
from unistream.driver.contract import Driver
from unistream.driver.types import Event, GroupSpec, HealthChanged, Ordering, Overflow, Retention, StartAt, TopicSpec
from unistream.errors import BrokerUnavailableError, ClosedError, ConfigError, TopicConflictError, UnsupportedError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Check", "Client", "Health", "connect"]

MIB = 1024 * 1024
EVENTS_KEPT = 1000
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")

_log = logging.getLogger("unistream.client")


class Check(NamedTuple):
    """One part of `Health`: what was looked at, and what is wrong with it if anything."""

    name: str
    ok: bool
    detail: str = ""


class Health(NamedTuple):
    """
    Whether a client does its work.

    Attributes:
        ok: Every check is.
        state: `connected`, `reconnecting` (something will come back by itself), `failed`, or `closed`.
        checks: The connection, and every producer and consumer.
    """

    ok: bool
    state: str
    checks: tuple[Check, ...]


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
        self._parts: dict[Producer | Consumer, Link] = {}
        self._listeners: list[_Events] = []
        self._checked: dict[str, bool] = {}

    async def __aenter__(self) -> Client:
        if self._state != "new":
            raise ClosedError(f"{self}: entered before; connect() again")
        self._loop = asyncio.get_running_loop()
        self._state = "opening"
        try:
            await self._driver.open()
            self.capabilities.require(self._require)
        except BaseException:
            self._state = "closed"
            await self._driver.close()
            raise
        self._state = "open"
        _log.debug("%s: connected to %s", self, self.capabilities.product)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def capabilities(self) -> Capabilities:
        """What the backend offers."""
        if self._state == "new":
            raise ClosedError(f"{self}: capabilities are read from the live server; enter the client first")
        return self._driver.capabilities

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
            **self._config.topic(name),
        }
        if not isinstance(settings["retention"], Retention):
            settings["retention"] = Retention(**(settings["retention"] or {}))
        spec = TopicSpec(_name("topic", name), **settings)
        driver = self._use()
        self._check_topic(spec)
        stands = await driver.create_topic(spec)
        differences = [
            f"{item.name} is {getattr(stands, item.name)!r}, not {getattr(spec, item.name)!r}"
            for item in fields(spec)
            if getattr(stands, item.name) != getattr(spec, item.name)
        ]
        if differences:
            raise TopicConflictError(
                f"topic {name!r} exists: {'; '.join(differences)}; use these settings, or delete the topic first",
                topic=name,
            )

    def _check_topic(self, spec: TopicSpec) -> None:
        capabilities = self.capabilities
        if spec.partitions < 1 or spec.ordering not in ("none", "key"):
            raise ConfigError(f"topic {spec.name!r}: partitions={spec.partitions}, ordering={spec.ordering!r}")
        if spec.overflow not in ("reject", "drop_oldest") or (spec.max_backlog is not None and spec.max_backlog < 1):
            raise ConfigError(f"topic {spec.name!r}: max_backlog={spec.max_backlog}, overflow={spec.overflow!r}")
        if spec.ordering == "key" and not capabilities.ordering:
            raise capabilities.unsupported("ordering", 'ordering="key"', topic=spec.name)
        for item in fields(spec.retention):
            limit = getattr(spec.retention, item.name)
            if limit is None:
                continue
            if limit <= 0:
                raise ConfigError(f"topic {spec.name!r}: retention {item.name}={limit}; give more than 0, or None")
            if not capabilities.retention or item.name not in capabilities.retention.by:
                raise capabilities.unsupported("retention", f"retention {item.name}={limit}", topic=spec.name)
        backlog = capabilities.max_backlog
        if spec.max_backlog is not None and (not backlog or spec.overflow not in backlog.overflow):
            wanted = f"max_backlog={spec.max_backlog}, overflow={spec.overflow!r}"
            raise capabilities.unsupported("max_backlog", wanted, topic=spec.name)

    async def delete_topic(self, name: str) -> None:
        """Delete a topic with its messages and groups; deleting what does not exist succeeds."""
        await self._use().delete_topic(_name("topic", name))

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
        return Producer(self, _name("topic", topic), Window(max_unconfirmed, max_unconfirmed_bytes), when_full)

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
            "lease": float(lease),
            "max_lease": float(max_lease),
            "dead_letter": dead_letter,
            **self._config.group(topic, name),
        }
        dead_letter = settings.pop("dead_letter")
        retry = retry or Retry()
        if settings["lease"] <= 0 or settings["max_lease"] < settings["lease"]:
            raise ConfigError(
                f"group {name!r}: lease={settings['lease']}, max_lease={settings['max_lease']}; "
                "give a lease above 0 and a max_lease not below it"
            )
        if settings["ordering"] not in ("none", "key"):
            raise ConfigError(f"group {name!r}: ordering={settings['ordering']!r}; give 'none' or 'key'")
        if retry.max_attempts is not None and dead_letter is None:
            raise ConfigError(
                f"group {name!r}: max_attempts={retry.max_attempts} needs a dead_letter topic for what has no attempt "
                "left, or dead_letter=unistream.DROP"
            )
        if isinstance(dead_letter, str) and _name("dead letter topic", dead_letter) == topic:
            raise ConfigError(f"group {name!r}: its dead letters would go round in the same topic {topic!r}")
        spec = GroupSpec(_name("topic", topic), "" if name is None else _name("group", name), **settings)
        return Group(self, spec, name, retry, dead_letter)

    async def groups(self, topic: str | None = None) -> Sequence[GroupSpec]:
        """The groups of a topic, or of all topics; ephemeral ones left out."""
        driver = self._use()
        if topic is not None:
            return await driver.groups(_name("topic", topic))
        return [group for each in await driver.topics() for group in await driver.groups(each.name)]

    # Health and events

    async def health(self) -> Health:
        """
        Whether this client does its work: a round trip to the broker, and the state of every producer and consumer.

        A consumer whose topic or group was deleted is not healthy, however well the connection stands.
        """
        if self._state != "open":
            return Health(False, "closed", ())
        try:
            await self._driver.ping()
            checks = [Check("connection", True)]
        except BrokerUnavailableError as error:
            checks = [Check("connection", False, str(error))]
        failed = False
        for link in self._parts.values():
            checks.append(Check(link.what, link.ok, str(link.error or "")))
            failed = failed or (link.error is not None and not getattr(link.error, "retryable", False))
        for check in checks:
            if self._checked.get(check.name, True) is not check.ok:
                self._emit(HealthChanged(check.name, check.ok, check.detail))
            self._checked[check.name] = check.ok
        ok = all(check.ok for check in checks)
        return Health(ok, "connected" if ok else "failed" if failed else "reconnecting", tuple(checks))

    def events(self) -> AsyncIterator[Event]:
        """
        What happens from now on: DataLoss, Disconnected, Connected, HealthChanged; ends when the client is closed.

        A listener that falls a thousand events behind loses the oldest.
        """
        self._use()
        return _Events(self)

    def _emit(self, event: Event) -> None:
        if isinstance(event, HealthChanged):
            _log.info("%s: %s", self, event)
        elif not hasattr(event, "what"):
            _log.warning("%s: %s", self, event)
        for listener in self._listeners:
            listener.put(event)

    # Life

    async def close(self) -> None:
        """Close every consumer and producer of this client, then the connection. Idempotent."""
        if self._state in ("closed", "new"):
            self._state = "closed"
            return
        if asyncio._get_running_loop() is not self._loop:
            self._wrong_loop()
        self._state = "closed"
        try:
            parts = list(self._parts)
            await asyncio.gather(*(part.close() for part in parts if isinstance(part, Consumer)))
            await asyncio.gather(*(part.close() for part in parts if isinstance(part, Producer)))
        finally:
            for listener in list(self._listeners):
                listener.end()
            await self._driver.close()

    def _use(self) -> Driver:
        """The driver, for a caller on the right loop while the client is open."""
        if self._state != "open":
            raise ClosedError(f"{self} is {'closed' if self._state == 'closed' else 'not entered: use `async with`'}")
        if asyncio._get_running_loop() is not self._loop:
            self._wrong_loop()
        return self._driver

    def _wrong_loop(self) -> NoReturn:
        if os.getpid() != self._pid:
            raise ClosedError(f"{self}: this process was forked from the one that opened it; connect() after the fork")
        raise ClosedError(
            f"{self}: used outside the event loop that opened it; connect() there, or use unistream.sync from threads"
        )

    def __repr__(self) -> str:
        return f"<Client {self._target}>"

    __str__ = __repr__


class _Events(AsyncIterator[Event]):
    """One listener's queue of events."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._queue: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        client._listeners.append(self)

    def put(self, event: Event) -> None:
        """Queue an event."""
        self._queue.append(event)
        self._wake()

    def end(self) -> None:
        """Let the iteration end."""
        self._ended = True
        self._client._listeners.remove(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._queue.popleft()


def _name(what: str, name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{what} name {name!r}: use 1 to 200 of letters, digits, '.', '_' and '-'")
    return name
