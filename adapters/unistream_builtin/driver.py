"""Opening a broker of this process, and the orders about its topics and groups."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

from unistream import capabilities as can
from unistream.broker import Host, named
from unistream.driver.contract import Driver
from unistream.driver.types import Event, GroupSpec, Lag, Member, StartAt, Target, Token, TopicSpec
from unistream.errors import ClosedError, ConfigError
from unistream_builtin.consumer import MemoryConsumer
from unistream_builtin.errors import DRIVER, translating
from unistream_builtin.producer import MemoryProducer
from unistream_builtin.specs import broker_group, broker_start, broker_topic, group_spec, topic_spec

__all__ = ["MemoryDriver"]

_LEAST_LEASE_SECONDS = 0.1
# Timers fire when a lease ends; this is what a busy event loop may add.
_LATE_SECONDS = 1.0


class MemoryDriver(Driver):
    """Serves `memory://`; see the package."""

    schemes: ClassVar[tuple[str, ...]] = ("memory",)
    lacks: ClassVar[Mapping[str, str]] = {
        "socket": "the broker is in this process; there is no connection to break",
        "process": "the broker is in this process; no other process can reach it",
        "password": "the broker is in this process; there is nobody to log in to",
    }

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        if target.path or target.username or len(target.hosts) > 1 or any(port for _, port in target.hosts):
            raise ConfigError(
                f"{target}: give memory://name, or memory:// for a broker of one client; it has no port, user or path",
                driver=DRIVER,
            )
        self._name = target.hosts[0][0] if target.hosts else ""
        self._host: Host | None = None

    async def open(self) -> None:
        """See `Driver.open`."""
        make = _clocked(asyncio.get_running_loop())
        self._host = named(self._name, make) if self._name else make()
        self.capabilities = _capabilities(self._host)

    async def close(self) -> None:
        """See `Driver.close`. A named broker lives on."""
        self._host = None

    async def ping(self) -> None:
        """See `Driver.ping`."""
        self._host_open()

    @property
    def native(self) -> Host:
        """The broker's host."""
        return self._host_open()

    def _host_open(self) -> Host:
        if self._host is None:
            raise ClosedError(f"{self.target} is not open", driver=DRIVER)
        return self._host

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """See `Driver.create_topic`."""
        with translating(spec.name):
            return topic_spec(spec.name, self._host_open().create_topic(spec.name, broker_topic(spec)))

    async def delete_topic(self, name: str) -> None:
        """See `Driver.delete_topic`."""
        self._host_open().delete_topic(name)

    async def topic(self, name: str) -> TopicSpec:
        """See `Driver.topic`."""
        with translating(name):
            return topic_spec(name, self._host_open().topic(name))

    async def topics(self) -> Sequence[TopicSpec]:
        """See `Driver.topics`."""
        return [topic_spec(name, spec) for name, spec in self._host_open().topics()]

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """See `Driver.create_group`."""
        with translating(spec.topic):
            stands = self._host_open().create_group(spec.topic, spec.name, broker_group(spec))
            return group_spec(spec.topic, spec.name, stands)

    async def delete_group(self, topic: str, name: str) -> None:
        """See `Driver.delete_group`."""
        self._host_open().delete_group(topic, name)

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """See `Driver.groups`."""
        with translating(topic):
            return [group_spec(topic, name, spec) for name, spec in self._host_open().groups(topic)]

    async def lag(self, topic: str, group: str) -> Lag:
        """See `Driver.lag`."""
        with translating(topic):
            return Lag(self._host_open().lag(topic, group), exact=True)

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """See `Driver.members`."""
        with translating(topic):
            return [Member(name, held) for name, held in self._host_open().members(topic, group)]

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """See `Driver.seek`. Works while members are joined; they are told which loans ended."""
        with translating(topic):
            self._host_open().seek(topic, group, broker_start(to))

    async def producer(self, topic: TopicSpec) -> MemoryProducer:
        """See `Driver.producer`."""
        with translating(topic.name):
            self._host_open().topic(topic.name)
            return MemoryProducer(self._host_open(), topic.name)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> MemoryConsumer:
        """See `Driver.consumer`."""
        with translating(group.topic):
            return MemoryConsumer(self._host_open(), group, lost, self.emit)


def _clocked(loop: asyncio.AbstractEventLoop) -> Callable[[], Host]:
    """
    How to make a host whose clock agrees with the loop's timers.

    Event loops run on `time.monotonic`. One that is far from it has a clock of its own (a test's virtual time): leases
    and delays then follow that, and the times of messages too.
    """
    if abs(loop.time() - time.monotonic()) < 60:
        return Host
    began = time.time() - loop.time()
    return lambda: Host(monotonic=loop.time, wall_ms=lambda: int((began + loop.time()) * 1000))


def _capabilities(host: Host) -> can.Capabilities:
    places = frozenset({"earliest", "latest", "time", "position"})
    limits = host.limits
    return can.Capabilities(
        driver=DRIVER,
        product="unistream reference broker, in memory",
        durability=can.Durability(kind="memory", note="nothing survives the process"),
        ordering=can.OrderingByKey(blocks="key"),
        parallelism=can.Parallelism(),
        start=can.Start(at=places, note=f"settled history: {limits.history_messages} messages per topic"),
        seek=can.Seek(to=places, with_members=True),
        nack_delay=can.NackDelay(),
        lease=can.Lease(
            scope="message",
            least=_LEAST_LEASE_SECONDS,
            recover_within=_LATE_SECONDS,
            dead_peer_after=_LATE_SECONDS,
        ),
        fencing=can.Fencing(),
        attempts=can.Attempts(count="exact"),
        ack_confirm=can.AckConfirm(),
        dedupe=can.Dedupe(
            window=limits.dedupe_seconds, note=f"or {limits.dedupe_ids} newer ids of the topic, if they come sooner"
        ),
        retention=can.RetentionLimits(),
        max_backlog=can.MaxBacklog(decides="topic"),
        max_message_bytes=can.MaxMessageBytes(limit=limits.message_bytes),
        lag=can.LagReport(exact=True),
    )
