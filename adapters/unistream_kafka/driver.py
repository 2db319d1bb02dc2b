"""Opens a Kafka cluster, keeps its topics and groups, and makes producers and consumers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from kafka.admin import KafkaAdminClient

from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.owner_thread import OwnerThread
from unistream.driver.types import Event, GroupSpec, Lag, Member, Option, StartAt, Target, Token, TopicSpec
from unistream.errors import BrokerUnavailableError, ClosedError, ConfigError
from unistream_kafka.client import Place, Secret
from unistream_kafka.consumer import KafkaConsumerDriver
from unistream_kafka.control import Control
from unistream_kafka.errors import translate
from unistream_kafka.lending import Setting
from unistream_kafka.probe import Server, probe
from unistream_kafka.producer import KafkaProducerDriver
from unistream_kafka.registry import group_id

__all__ = ["KafkaDriver"]

T = TypeVar("T")
_log = logging.getLogger("unistream.driver.kafka")
_PORT = 9092


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise ValueError("give a number of seconds above 0")
    return value


def _copies(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 32767:
        raise ValueError("give a number of copies, 1 or more")
    return value


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError("give true or false")


def _mechanism(text: str) -> str:
    known = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
    if text.upper() not in known:
        raise ValueError(f"give one of {', '.join(known)}")
    return text.upper()


class KafkaDriver(Driver):
    """Apache Kafka; `kafka://` in the clear, `kafkas://` over TLS. Several hosts may be given; one is enough."""

    schemes: ClassVar[tuple[str, ...]] = ("kafka", "kafkas")
    options: ClassVar[Mapping[str, Option]] = {
        "connect_timeout": Option(_seconds, 5.0, "Seconds for one attempt to connect, and for ping."),
        "dead_peer_after": Option(_seconds, 10.0, "Seconds without an answer after which a connection counts as dead."),
        "session_timeout": Option(_seconds, 10.0, "Seconds without a heartbeat after which a member counts as dead."),
        "replication_factor": Option(_copies, -1, "Copies of topics made here; default: the cluster's default."),
        "sasl_mechanism": Option(_mechanism, "PLAIN", "How user and password are shown: PLAIN, SCRAM-SHA-256 or -512."),
        "ca_file": Option(str, None, "kafkas: file of the certificates to trust, instead of the system's."),
        "cert_file": Option(str, None, "kafkas: file of the client's certificate."),
        "key_file": Option(str, None, "kafkas: file of the client's private key."),
        "check_hostname": Option(_boolean, True, "kafkas: whether the certificate must be for this host."),
    }

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        if target.path:
            raise ConfigError(f"{target}: a Kafka URL has no path")
        if target.username is not None and target.password is None:
            raise ConfigError(f"{target}: a user without a password; give kafka://user:password@host")
        self._place: Place
        self._control: Control
        self._server: Server
        self._session: float
        self._owner: OwnerThread | None = None

    async def open(self) -> None:
        """See `Driver.open`."""
        options = self.target.options
        self._place = self._find()
        self._session = options["session_timeout"]
        self._control = Control(self._place, options["replication_factor"])
        self._owner = OwnerThread("unistream-kafka-control")

        def look(control: Control) -> Any:
            return probe(control.admin(), self._place, self._session, options["replication_factor"])

        try:
            self._server, self.capabilities = await self._do(f"open {self.target}", look)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """See `Driver.close`."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.post(self._control.close)
            await owner.close()

    async def ping(self) -> None:
        """See `Driver.ping`."""
        patience = self._place.connect_timeout
        try:
            async with asyncio.timeout(patience):
                await self._do(f"ping {self.target}", lambda control: control.admin().describe_cluster())
        except TimeoutError as error:
            late = f"ping {self.target}: no answer within {patience:g} s"
            raise BrokerUnavailableError(late, driver="kafka") from error

    @property
    def native(self) -> KafkaAdminClient | None:
        """The KafkaAdminClient, if it is connected just now. Its methods block; it serves other threads too."""
        return self._control._client

    async def _do(self, what: str, work: Callable[[Control], T], topic: str | None = None) -> T:
        if self._owner is None:
            raise ClosedError(f"{what}: the driver is closed", driver="kafka")
        with translate(what, topic):
            return await self._owner.call(lambda: self._control.run(work))

    # Topics

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """See `Driver.create_topic`."""
        return await self._do(f"create topic {spec.name!r}", lambda control: control.create_topic(spec), spec.name)

    async def delete_topic(self, name: str) -> None:
        """See `Driver.delete_topic`."""
        await self._do(f"delete topic {name!r}", lambda control: control.delete_topic(name), name)

    async def topic(self, name: str) -> TopicSpec:
        """See `Driver.topic`. Any Kafka topic gives order by key."""
        return (await self._do(f"topic {name!r}", lambda control: control.topic(name), name)).spec

    async def topics(self) -> Sequence[TopicSpec]:
        """See `Driver.topics`."""
        return await self._do("topics", lambda control: control.topics())

    # Groups

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """See `Driver.create_group`."""
        what = f"create group {spec.name!r} of topic {spec.topic!r}"
        return (await self._do(what, lambda control: control.create_group(spec), spec.topic)).spec

    async def delete_group(self, topic: str, name: str) -> None:
        """See `Driver.delete_group`."""
        what = f"delete group {name!r} of topic {topic!r}"
        await self._do(what, lambda control: control.delete_group(topic, name), topic)

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """See `Driver.groups`."""
        return await self._do(f"groups of topic {topic!r}", lambda control: control.groups(topic), topic)

    async def lag(self, topic: str, group: str) -> Lag:
        """See `Driver.lag`."""
        what = f"lag of group {group!r} of topic {topic!r}"
        return await self._do(what, lambda control: control.lag(topic, group), topic)

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """See `Driver.members`."""
        what = f"members of group {group!r} of topic {topic!r}"
        return await self._do(what, lambda control: control.members(topic, group), topic)

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """See `Driver.seek`."""
        await self._do(
            f"seek group {group!r} of topic {topic!r}", lambda control: control.seek(topic, group, to), topic
        )

    # Producers and consumers

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """See `Driver.producer`."""
        standing = await self._do(f"topic {topic.name!r}", lambda control: control.topic(topic.name), topic.name)
        promised = self.capabilities.durability
        if standing.copies < promised.copies:
            _log.warning(
                "topic %r: a confirmed message is on %d nodes at least, fewer than the cluster's %d; "
                "raise its replication factor and its min.insync.replicas",
                topic.name,
                standing.copies,
                promised.copies,
            )
        producer = KafkaProducerDriver(self._place, topic, standing.stored, standing.most_bytes, self.topic)
        await producer.open()
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
        standing = await self._do(f"topic {topic.name!r}", lambda control: control.topic(topic.name), topic.name)
        name = None if group.ephemeral else group.name
        if name is None:
            count = standing.spec.partitions
            starts: Sequence[int] = await self._do(
                f"ends of topic {topic.name!r}", lambda control: control.ends(standing.stored, count), topic.name
            )
        else:
            what = f"join group {group.name!r} of topic {topic.name!r}"
            starts = (await self._do(what, lambda control: control.group(topic.name, group.name), topic.name)).offsets
        topic_id = standing.topic_id
        consumer = KafkaConsumerDriver(
            Setting(
                place=self._place,
                group=group,
                stored=standing.stored,
                identity=None if name is None else group_id(topic.name, name),
                starts=starts,
                max_in_flight=max_in_flight,
                session=self._session,
                text_bytes=self._server.text_bytes,
                check=lambda: self._do("watch", lambda control: control.check(topic.name, topic_id, name), topic.name),
                emit=self.emit,
                lost=lost,
            )
        )
        await consumer.join()
        return consumer

    # Where

    def _find(self) -> Place:
        target, options = self.target, self.target.options
        hosts = target.hosts or (("localhost", None),)
        return Place(
            label=str(target),
            hosts=tuple((host, _PORT if port is None else port) for host, port in hosts),
            connect_timeout=options["connect_timeout"],
            dead_peer_after=options["dead_peer_after"],
            security=self._security(),
            dial=self.dial,
        )

    def _security(self) -> dict[str, Any]:
        target, options = self.target, self.target.options
        tls, user = target.scheme == "kafkas", target.username
        security: dict[str, Any] = {
            "security_protocol": ("SASL_" if user is not None else "") + ("SSL" if tls else "PLAINTEXT")
        }
        if user is not None:
            security["sasl_mechanism"] = options["sasl_mechanism"]
            security["sasl_plain_username"] = user
            security["sasl_plain_password"] = Secret(target.password or "")
        if tls:
            security["ssl_cafile"] = options["ca_file"]
            security["ssl_certfile"] = options["cert_file"]
            security["ssl_keyfile"] = options["key_file"]
            security["ssl_check_hostname"] = options["check_hostname"]
        return security
