"""Opens a RabbitMQ, keeps its topics and groups, and makes producers and consumers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.types import Event, GroupSpec, Lag, Member, Option, StartAt, Target, Token, TopicSpec
from unistream.errors import BrokerUnavailableError, ConfigError, GroupMissingError
from unistream_rabbitmq.consumer import Setting
from unistream_rabbitmq.delays import SETTLED_SECONDS, Delays
from unistream_rabbitmq.errors import translate
from unistream_rabbitmq.link import Line, Place
from unistream_rabbitmq.locks import Locks
from unistream_rabbitmq.names import GroupQueues
from unistream_rabbitmq.ordered import OrderedConsumer
from unistream_rabbitmq.probe import capabilities_of, most_bytes, version_of
from unistream_rabbitmq.producer import RabbitProducer
from unistream_rabbitmq.registry import Registry
from unistream_rabbitmq.relay import Relay
from unistream_rabbitmq.shared import SharedConsumer
from unistream_rabbitmq.topology import Topology

__all__ = ["RabbitDriver"]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise ValueError("give a number of seconds above 0")
    return value


def _patience(text: str) -> float:
    return 0.0 if float(text) == 0 else _seconds(text)


def _heartbeat(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 600:
        raise ValueError("give whole seconds, 1 to 600")
    return value


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError("give true or false")


class RabbitDriver(Driver):
    """RabbitMQ over AMQP 0-9-1; `amqp://` in the clear, `amqps://` over TLS. The path is the virtual host."""

    schemes: ClassVar[tuple[str, ...]] = ("amqp", "amqps")
    options: ClassVar[Mapping[str, Option]] = {
        "connect_timeout": Option(_seconds, 5.0, "Seconds for one attempt to connect, and for ping."),
        "heartbeat": Option(_heartbeat, 10, "Seconds; a silent server is given up after 1.5, a silent member after 3."),
        "creation_settles": Option(
            _patience,
            SETTLED_SECONDS,
            "Seconds for which a new group or delay is not relied upon, to survive kill -9 of the server.",
        ),
        "ca_file": Option(str, None, "amqps: file of the certificates to trust, instead of the system's."),
        "cert_file": Option(str, None, "amqps: file of the client's certificate."),
        "key_file": Option(str, None, "amqps: file of the client's private key."),
        "check_hostname": Option(_boolean, True, "amqps: whether the certificate must be for this host."),
    }

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        if len(target.hosts) > 1:
            raise ConfigError(f"{target}: one host only; put a load balancer in front of a cluster")
        self._parts: set[Any] = set()
        self._version: tuple[int, ...] = ()
        self._place: Place
        self._control: Line
        self._publishing: Line
        self._consuming: Line
        self._registry: Registry
        self._topology: Topology
        self._delays: Delays

    async def open(self) -> None:
        """See `Driver.open`."""
        self._place = place = self._find()
        self._control = Line(place, "unistream control")
        self._publishing = Line(place, "unistream publish")
        self._consuming = Line(place, "unistream consume")
        try:
            with translate(f"open {self.target}"):
                wire = await self._control.wire()
            self._version = version_of(wire.properties)
            self.capabilities = capabilities_of(self._version, place.heartbeat, self.target.options["creation_settles"])
        except BaseException:
            await self._control.close()
            raise
        self._registry = Registry(self._control, self._publishing, Locks(place), place.connect_timeout)
        settles = self.target.options["creation_settles"]
        self._topology = Topology(self._control, self._registry, settles, unlimited_returns=self._version >= (4,))
        self._delays = Delays(self._control, settles)

    async def close(self) -> None:
        """See `Driver.close`."""
        if not self._version:
            return
        for part in list(self._parts):
            await part.close()
        await self._delays.close()
        await asyncio.gather(self._control.close(), self._publishing.close(), self._consuming.close())

    async def ping(self) -> None:
        """See `Driver.ping`. Fails too while RabbitMQ takes no messages from this client."""
        with translate(f"ping {self.target}"):
            try:
                async with asyncio.timeout(self._place.connect_timeout):
                    wire = await self._control.wire()
                    channel = await wire.channel()
                    await channel.close()
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {self._place.connect_timeout:g} s") from error
        if self._publishing.blocked is not None:
            raise BrokerUnavailableError(
                f"ping {self.target}: RabbitMQ takes no messages just now ({self._publishing.blocked}); "
                "free its memory or disk",
                driver="amqp",
            )

    @property
    def native(self) -> Any:
        """The `pika.adapters.asyncio_connection.AsyncioConnection` for declaring; `None` while it is not connected."""
        wire = self._control.now
        return None if wire is None else wire.connection

    # Topics and groups

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """See `Driver.create_topic`."""
        with translate(f"create topic {spec.name!r}", spec.name):
            return await self._topology.create_topic(spec)

    async def delete_topic(self, name: str) -> None:
        """See `Driver.delete_topic`."""
        with translate(f"delete topic {name!r}", name):
            await self._topology.delete_topic(name)

    async def topic(self, name: str) -> TopicSpec:
        """See `Driver.topic`. An exchange `us.NAME` that a foreign program made is a topic with all defaults."""
        with translate(f"topic {name!r}", name):
            return await self._topology.topic(name)

    async def topics(self) -> Sequence[TopicSpec]:
        """See `Driver.topics`. Exchanges of foreign programs appear once they were created here too."""
        with translate("topics"):
            state = await self._registry.read()
        return [spec for name in sorted(state.topics) if (spec := state.topic(name)) is not None]

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """See `Driver.create_group`."""
        with translate(f"create group {spec.name!r} of topic {spec.topic!r}", spec.topic):
            return await self._topology.create_group(spec)

    async def delete_group(self, topic: str, name: str) -> None:
        """See `Driver.delete_group`."""
        with translate(f"delete group {name!r} of topic {topic!r}", topic):
            await self._topology.delete_group(topic, name)

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """See `Driver.groups`."""
        with translate(f"groups of topic {topic!r}", topic):
            await self._topology.topic(topic)
            return (await self._registry.read()).groups(topic)

    async def lag(self, topic: str, group: str) -> Lag:
        """See `Driver.lag`: what waits, plus what this client's members have in flight. What is delayed is not seen."""
        queues = await self._queues(topic, group)
        with translate(f"lag of group {group!r} of topic {topic!r}", topic):
            waiting, _ = await self._topology.count(queues)
        members = [part for part in self._parts if isinstance(part, (SharedConsumer, OrderedConsumer))]
        own = sum(member.in_flight for member in members if member.of(topic, group))
        return Lag(waiting + own, False)

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """See `Driver.members`. AMQP tells how many there are, not who."""
        queues = await self._queues(topic, group)
        with translate(f"members of group {group!r} of topic {topic!r}", topic):
            _, members = await self._topology.count(queues)
        return [Member(f"member-{number + 1}") for number in range(members)]

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """See `Driver.seek`; never offered."""
        raise self.capabilities.unsupported("seek", f"seek({to!r})", topic=topic)

    async def _queues(self, topic: str, group: str) -> GroupQueues:
        with translate(f"group {group!r} of topic {topic!r}", topic):
            spec = await self._topology.topic(topic)
            found = (await self._registry.read()).group(topic, group)
        if found is None:
            raise GroupMissingError(f"topic {topic!r} has no group {group!r}", driver="amqp", topic=topic)
        return GroupQueues(spec, group, ordered=found.ordering == "key")

    # Producers and consumers

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """See `Driver.producer`."""
        spec = await self.topic(topic.name)
        limit = most_bytes(self._version)
        producer = RabbitProducer(self._publishing, spec, limit, self._has_group, self._room, self._parts.discard)
        with translate(f"producer of topic {topic.name!r}", topic.name):
            await producer.open()
        self._parts.add(producer)
        return producer

    async def _has_group(self, topic: str) -> bool:
        with translate(f"groups of topic {topic!r}", topic):
            return bool((await self._registry.read()).groups(topic))

    async def _room(self, topic: TopicSpec) -> int:
        with translate(f"groups of topic {topic.name!r}", topic.name):
            return await self._topology.room(topic)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """See `Driver.consumer`."""
        await self.topic(topic.name)
        queues = GroupQueues(topic, group.name, ordered=group.ordering == "key")
        if queues.partitions and group.ephemeral:
            queues.partitions = (queues.main,)  # one queue for its one member
        setting = Setting(
            place=self._place,
            consuming=self._consuming,
            control=self._control,
            relay=Relay(self._publishing, self._delays, self._place.connect_timeout),
            registry=self._registry,
            group=group,
            topic=topic,
            queues=queues,
            max_in_flight=max_in_flight,
            lost=lost,
            emit=self.emit,
            closed=self._parts.discard,
        )
        consumer = OrderedConsumer(setting) if queues.partitions else SharedConsumer(setting)
        await consumer.join()
        self._parts.add(consumer)
        return consumer

    # Where

    def _find(self) -> Place:
        target, options = self.target, self.target.options
        host, port = target.hosts[0] if target.hosts else ("localhost", None)
        secure = target.scheme == "amqps"
        return Place(
            host=host,
            port=port or (5671 if secure else 5672),
            vhost=target.path or "/",
            username=target.username or "guest",
            password="guest" if target.password is None else target.password,
            dial=self.dial,
            connect_timeout=options["connect_timeout"],
            heartbeat=options["heartbeat"],
            tls=self._tls() if secure else None,
        )

    def _tls(self) -> ssl.SSLContext:
        options = self.target.options
        try:
            context = ssl.create_default_context(cafile=options["ca_file"])
            context.check_hostname = options["check_hostname"]
            if options["cert_file"]:
                context.load_cert_chain(options["cert_file"], options["key_file"])
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{self.target}: a TLS file can't be used: {error}") from error
        return context
