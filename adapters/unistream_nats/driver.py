"""Opens a NATS server, keeps its topics and groups, and makes producers and consumers."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.types import Event, GroupSpec, Lag, Member, Option, StartAt, Target, Token, TopicSpec
from unistream.errors import ConfigError, UnsupportedError
from unistream_nats.consumer import NatsConsumer, Setting
from unistream_nats.errors import ApiError, Code, translate
from unistream_nats.groups import Groups
from unistream_nats.link import Link, Place
from unistream_nats.names import INTERNAL, STREAM_PREFIX, lane_filters, stream_name
from unistream_nats.native import NativeClient
from unistream_nats.notes import Notes
from unistream_nats.probe import probe
from unistream_nats.producer import NatsProducer
from unistream_nats.registry import stream_config, topic_spec

__all__ = ["NatsDriver"]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise ValueError("give a number of seconds above 0")
    return value


def _some_seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 86400 * 365:
        raise ValueError("give a number of seconds, 0 or more")
    return value


def _replicas(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 5:
        raise ValueError("give 1 to 5")
    return value


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError("give true or false")


class NatsDriver(Driver):
    """NATS JetStream; `nats://` in the clear or as the server asks, `tls://` over TLS."""

    schemes: ClassVar[tuple[str, ...]] = ("nats", "tls")
    options: ClassVar[Mapping[str, Option]] = {
        "connect_timeout": Option(_seconds, 5.0, "Seconds for one attempt to connect, and for ping."),
        "dead_peer_after": Option(_seconds, 10.0, "Seconds without an answer after which a connection counts as dead."),
        "replicas": Option(_replicas, 1, "Servers of a cluster that hold each topic that is made here."),
        "keep_settled": Option(_some_seconds, 30.0, "Seconds that settled messages stay, for groups that seek back."),
        "domain": Option(str, None, "JetStream domain."),
        "ca_file": Option(str, None, "tls: file of the certificates to trust, instead of the system's."),
        "cert_file": Option(str, None, "tls: file of the client's certificate."),
        "key_file": Option(str, None, "tls: file of the client's private key."),
        "check_hostname": Option(_boolean, True, "tls: whether the certificate must be for this host."),
    }

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        if target.path:
            raise ConfigError(f"{target}: a NATS URL has no path; give host and port only")
        self._producers: set[NatsProducer] = set()
        self._consumers: set[NatsConsumer] = set()
        self._native: NativeClient | None = None
        self._place: Place
        self._link: Link
        self._publishing: Link

    async def open(self) -> None:
        """See `Driver.open`."""
        self._place = self._find()
        self._link = Link(self._place, f"{self.target} commands and consumers", self.emit)
        # A connection of its own, so that a full producer holds up no settle.
        self._publishing = Link(self._place, f"{self.target} producers", self.emit)
        try:
            with translate(f"open {self.target}"):
                self.capabilities = await probe(self._link, self._replicas)
        except BaseException:
            self._link.close()
            raise

    async def close(self) -> None:
        """See `Driver.close`."""
        if not hasattr(self, "_link"):
            return
        for producer in list(self._producers):
            await producer.close()
        for consumer in list(self._consumers):
            await consumer.close()
        self._link.close()
        self._publishing.close()
        if self._native is not None:
            native, self._native = self._native, None
            await native.close()

    async def ping(self) -> None:
        """See `Driver.ping`."""
        with translate(f"ping {self.target}"):
            await self._link.api("INFO", timeout=self._place.connect_timeout)

    @property
    def native(self) -> NativeClient:
        """A `nats.aio.client.Client` for the same servers; `await native.connect()` first. Closed with the driver."""
        if self._native is None:
            self._native = NativeClient(self._place)
        return self._native

    @property
    def _replicas(self) -> int:
        return int(self.target.options["replicas"])

    # Topics

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """See `Driver.create_topic`."""
        retention = spec.retention
        if spec.max_backlog is not None and (retention.max_bytes or retention.max_messages):
            raise self.capabilities.unsupported(
                "max_backlog", "max_backlog together with a retention by size is asked for", topic=spec.name
            )
        with translate(f"create topic {spec.name!r}", spec.name):
            try:
                told = await self._link.api(
                    f"STREAM.CREATE.{stream_name(spec.name)}", stream_config(spec, self._replicas)
                )
                return topic_spec(told["config"])
            except ApiError as error:
                if error.code != Code.STREAM_EXISTS:
                    raise
        return await self.topic(spec.name)

    async def delete_topic(self, name: str) -> None:
        """See `Driver.delete_topic`."""
        with translate(f"delete topic {name!r}", name):
            try:
                await self._link.api(f"STREAM.DELETE.{stream_name(name)}")
            except ApiError as error:
                if error.code != Code.STREAM_MISSING:
                    raise
            await self._notes(name).purge("*")

    async def topic(self, name: str) -> TopicSpec:
        """See `Driver.topic`. A stream that a foreign program made under the topic's name is adopted."""
        return topic_spec(await self._stream(name))

    async def _stream(self, name: str) -> dict[str, Any]:
        with translate(f"topic {name!r}", name):
            told = await self._link.api(f"STREAM.INFO.{stream_name(name)}")
        config: dict[str, Any] = told["config"]
        return config

    async def topics(self) -> Sequence[TopicSpec]:
        """See `Driver.topics`."""
        found: list[TopicSpec] = []
        seen = 0
        with translate("topics"):
            while True:
                told = await self._link.api("STREAM.LIST", {"offset": seen})
                streams = told["streams"] or []
                seen += len(streams)
                found += [
                    topic_spec(stream["config"])
                    for stream in streams
                    if stream["config"]["name"].startswith(STREAM_PREFIX)
                ]
                if not streams or seen >= told["total"]:
                    return sorted(found, key=lambda topic: topic.name)

    # Groups

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """
        See `Driver.create_group`.

        Before NATS 2.10, of creators at the same time with different leases the last one's stands.
        """
        topic = await self.topic(spec.topic)
        with translate(f"create group {spec.name!r} of topic {spec.topic!r}", spec.topic):
            return await self._groups(spec.topic).create(spec, topic)

    async def delete_group(self, topic: str, name: str) -> None:
        """See `Driver.delete_group`."""
        with translate(f"delete group {name!r} of topic {topic!r}", topic):
            try:
                await self._groups(topic).delete(name)
            except ApiError as error:
                if error.code != Code.STREAM_MISSING:
                    raise

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """See `Driver.groups`. Durable pull consumers that a foreign program made are groups with all defaults."""
        with translate(f"groups of topic {topic!r}", topic):
            return await self._groups(topic).all()

    async def lag(self, topic: str, group: str) -> Lag:
        """See `Driver.lag`."""
        spec = await self.topic(topic)
        with translate(f"lag of group {group!r} of topic {topic!r}", topic):
            _, lanes = await self._groups(topic).lanes(group, spec)
        return Lag(sum(lane["num_pending"] + lane["num_ack_pending"] for lane in lanes), True)

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """See `Driver.members`. The members are asked; the server does not know them."""
        spec = await self.topic(topic)
        with translate(f"members of group {group!r} of topic {topic!r}", topic):
            await self._groups(topic).lanes(group, spec)
            return await self._groups(topic).members(group)

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """See `Driver.seek`."""
        spec = await self.topic(topic)
        with translate(f"seek group {group!r} of topic {topic!r}", topic):
            await self._groups(topic).seek(group, spec, to)

    def _groups(self, topic: str) -> Groups:
        return Groups(self._link, topic, self._notes(topic))

    # Producers and consumers

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """See `Driver.producer`. Refuses topics that are less durable than the capability says."""
        config = await self._stream(topic.name)
        copies = config.get("num_replicas", 1)
        if config.get("storage") != "file" or copies < self._replicas:
            raise UnsupportedError(
                f"topic {topic.name!r} is kept in {config.get('storage')} by {copies} servers, and "
                f"{self.capabilities.durability.summary()} is promised here; make it anew or lower the option replicas",
                capability="durability",
                driver="nats",
                topic=topic.name,
            )
        producer = NatsProducer(self._publishing, topic, self._producers.discard)
        with translate(f"publish to {topic.name!r}", topic.name):
            await self._publishing.wire()
        self._producers.add(producer)
        return producer

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """See `Driver.consumer`."""
        if group.ephemeral:
            name = f"{INTERNAL}e{secrets.token_hex(12)}"
            group = GroupSpec(group.topic, name, group.ordering, "latest", group.lease, group.max_lease, ephemeral=True)

        async def create() -> None:
            await self._groups(topic.name).create_lanes(group, topic, "latest")

        if group.ephemeral:
            with translate(f"join topic {topic.name!r}", topic.name):
                await create()
        consumer = NatsConsumer(
            Setting(
                link=self._link,
                notes=self._notes(topic.name),
                group=group,
                topic=topic,
                lanes=lane_filters(group, topic),
                keep=self.target.options["keep_settled"],
                emit=self.emit,
                lost=lost,
                create=create,
                closed=self._consumers.discard,
            )
        )
        try:
            await consumer.join()
        except BaseException:
            await consumer.close()
            raise
        self._consumers.add(consumer)
        return consumer

    def _notes(self, topic: str) -> Notes:
        return Notes(self._link, stream_name(topic), self._replicas)

    # Where

    def _find(self) -> Place:
        target, options = self.target, self.target.options
        hosts = target.hosts or [("localhost", None)]
        return Place(
            label=str(target),
            hosts=[(host, port or 4222) for host, port in hosts],
            username=target.username,
            password=target.password,
            tls=self._tls(),
            domain=options["domain"],
            connect_timeout=options["connect_timeout"],
            dead_peer_after=options["dead_peer_after"],
            dial=self.dial,
        )

    def _tls(self) -> ssl.SSLContext | None:
        options = self.target.options
        if self.target.scheme != "tls" and not options["ca_file"] and not options["cert_file"]:
            return None
        try:
            context = ssl.create_default_context(cafile=options["ca_file"])
            context.check_hostname = options["check_hostname"]
            if options["cert_file"]:
                context.load_cert_chain(options["cert_file"], options["key_file"])
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{self.target}: a TLS file can't be used: {error}") from error
        return context
