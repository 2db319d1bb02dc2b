"""Opens a Redis, keeps its topics and groups, and makes producers and consumers."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.types import Event, GroupSpec, Lag, Member, Option, StartAt, Target, Token, TopicSpec
from unistream.errors import (
    ConfigError,
    GroupMissingError,
    TopicMissingError,
    UnsupportedError,
)
from unistream_redis.consumer import Setting, alive_for
from unistream_redis.ephemeral import delete_groups, sweep
from unistream_redis.errors import translate
from unistream_redis.keys import TOPICS, TopicKeys
from unistream_redis.link import Link, Place
from unistream_redis.ordered import OrderedConsumer
from unistream_redis.probe import Server, probe
from unistream_redis.producer import RedisProducer
from unistream_redis.registry import group_record, group_spec, place_of, topic_fields, topic_spec
from unistream_redis.scripts import (
    ALL,
    CREATE_GROUP,
    CREATE_TOPIC,
    DELETE_TOPIC,
    LAG,
    PUBLISH,
    RETAIN,
    SEEK,
)
from unistream_redis.shared import SharedConsumer

__all__ = ["RedisDriver"]

_FOREIGN = "~"  # in front of names that this adapter makes up: ephemeral groups, the parked entries' consumer


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise ValueError("give a number of seconds above 0")
    return value


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError("give true or false")


class RedisDriver(Driver):
    """Redis Streams; `redis://` in the clear, `rediss://` over TLS. The path is the number of the database."""

    schemes: ClassVar[tuple[str, ...]] = ("redis", "rediss")
    options: ClassVar[Mapping[str, Option]] = {
        "connect_timeout": Option(_seconds, 5.0, "Seconds for one attempt to connect, and for ping."),
        "dead_peer_after": Option(_seconds, 5.0, "Seconds without an answer after which a connection counts as dead."),
        "ca_file": Option(str, None, "rediss: file of the certificates to trust, instead of the system's."),
        "cert_file": Option(str, None, "rediss: file of the client's certificate."),
        "key_file": Option(str, None, "rediss: file of the client's private key."),
        "check_hostname": Option(_boolean, True, "rediss: whether the certificate must be for this host."),
    }

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        if len(target.hosts) > 1:
            raise ConfigError(f"{target}: one host only; Redis Cluster and Sentinel are not served")
        if target.path and not target.path.isdecimal():
            raise ConfigError(f"{target}: the path is the number of a database, as in redis://host/0")
        self._native: redis.asyncio.Redis | None = None
        self._place: Place
        self._server: Server
        self._link: Link

    async def open(self) -> None:
        """See `Driver.open`."""
        self._place = self._find()
        self._link = Link(self._place, f"{self.target} commands", self.emit, ALL)
        try:
            with translate(f"open {self.target}"):
                self._server, self.capabilities = await probe(self._link, self._place.dead_peer_after)
        except BaseException:
            await self._link.close()
            raise

    async def close(self) -> None:
        """See `Driver.close`."""
        if not hasattr(self, "_link"):
            return
        await self._link.close()
        if self._native is not None:
            client, self._native = self._native, None
            await client.aclose()

    async def ping(self) -> None:
        """See `Driver.ping`."""
        with translate(f"ping {self.target}"):
            try:
                async with asyncio.timeout(self._place.connect_timeout):
                    await self._link.call("PING")
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {self._place.connect_timeout:g} s") from error

    @property
    def native(self) -> redis.asyncio.Redis:
        """A `redis.asyncio.Redis` for the same server and database, closed with the driver."""
        if self._native is None:
            place = self._place
            host, port = place.dial(place.host, place.port)
            self._native = redis.asyncio.Redis(
                host=host,
                port=port,
                db=place.database,
                username=place.username,
                password=place.password,
                retry=Retry(NoBackoff(), 0),
                socket_connect_timeout=place.connect_timeout,
                protocol=2,
                **self._native_tls(),
            )
        return self._native

    # Topics

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """See `Driver.create_topic`."""
        if spec.retention.max_bytes is not None:
            raise self.capabilities.unsupported("retention", "max_bytes is asked for", topic=spec.name)
        keys = TopicKeys.of(spec)
        with translate(f"create topic {spec.name!r}", spec.name):
            there = await self._link.call("HGETALL", keys.meta)
            if there:
                # Its streams are those of its own record, which may not be the ones asked for.
                keys = TopicKeys.of(topic_spec(spec.name, there))
            streams = [stream.stream for stream in keys.streams]
            await self._link.call("SADD", TOPICS, spec.name)
            record = await self._link.run(CREATE_TOPIC, [keys.meta, keys.groups, *streams], topic_fields(spec))
            return topic_spec(spec.name, record)

    async def delete_topic(self, name: str) -> None:
        """See `Driver.delete_topic`."""
        with translate(f"delete topic {name!r}", name):
            record = await self._link.call("HGETALL", TopicKeys(name).meta)
            keys = TopicKeys.of(topic_spec(name, record)) if record else TopicKeys(name)
            streams = [stream.stream for stream in keys.streams]
            prefixes = dict.fromkeys([keys.prefix, *(stream.prefix for stream in keys.streams)])
            await self._link.run(DELETE_TOPIC, [keys.meta, keys.groups, keys.ephemeral, *streams], list(prefixes))
            await self._link.call("SREM", TOPICS, name)

    async def topic(self, name: str) -> TopicSpec:
        """See `Driver.topic`. A stream that a foreign program made is a topic with all defaults."""
        with translate(f"topic {name!r}", name):
            record = await self._link.call("HGETALL", TopicKeys(name).meta)
            spec = topic_spec(name, record) if record else TopicSpec(name)
            streams = [keys.stream for keys in TopicKeys.of(spec).streams]
            if await self._link.call("EXISTS", *streams) < len(streams):
                raise self._no_topic(name)
        return spec

    async def topics(self) -> Sequence[TopicSpec]:
        """See `Driver.topics`. Streams of foreign programs appear once they were created here too."""
        found = []
        with translate("topics"):
            for name in sorted(await self._link.call("SMEMBERS", TOPICS)):
                with suppress(TopicMissingError):  # deleted while we look, or by a foreign program
                    found.append(await self.topic(name.decode()))
        return found

    # Groups

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """See `Driver.create_group`."""
        topic = await self.topic(spec.topic)
        return await self._create_group(spec, topic, group_record(spec))

    async def _create_group(self, spec: GroupSpec, topic: TopicSpec, record: str) -> GroupSpec:
        keys = TopicKeys.of(topic)
        places = [place_of(spec.start, partition) for partition in range(len(keys.streams))]
        with translate(f"create group {spec.name!r} of topic {spec.topic!r}", spec.topic):
            streams = [stream.stream for stream in keys.streams]
            stands = await self._link.run(
                CREATE_GROUP, [keys.groups, keys.ephemeral, *streams], [spec.name, record, *places]
            )
            if stands == 0:
                raise self._no_topic(spec.topic)
            return group_spec(spec.topic, spec.name, stands) if record else spec

    async def delete_group(self, topic: str, name: str) -> None:
        """See `Driver.delete_group`."""
        try:
            keys = TopicKeys.of(await self.topic(topic))
        except TopicMissingError:
            return
        with translate(f"delete group {name!r} of topic {topic!r}", topic):
            await delete_groups(self._link, keys, [name])

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """See `Driver.groups`. A group that a foreign program made has all defaults."""
        keys = TopicKeys.of(await self.topic(topic))
        with translate(f"groups of topic {topic!r}", topic):
            flat = await self._link.call("HGETALL", keys.groups)
            records = {flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)}
            told = await self._link.call("XINFO", "GROUPS", keys.streams[0].stream)
        names = sorted(fields[1].decode() for fields in told)
        return [
            group_spec(topic, name, records[name]) if name in records else GroupSpec(topic, name)
            for name in names
            if not name.startswith(_FOREIGN)
        ]

    async def lag(self, topic: str, group: str) -> Lag:
        """See `Driver.lag`."""
        keys = TopicKeys.of(await self.topic(topic))
        with translate(f"lag of group {group!r} of topic {topic!r}", topic):
            messages, exact = await self._link.run(LAG, [stream.stream for stream in keys.streams], [group])
        return Lag(messages, bool(exact))

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """See `Driver.members`."""
        spec = await self._group(topic, group)
        keys = TopicKeys.of(await self.topic(topic))
        with translate(f"members of group {group!r} of topic {topic!r}", topic):
            seconds, microseconds = await self._link.call("TIME")
            since = int(seconds) * 1000 + int(microseconds) // 1000 - int(alive_for(spec) * 1000)
            names = await self._link.call("ZRANGE", keys.members(group), since, "+inf", "BYSCORE")
            held: dict[bytes, int] = {}
            for stream in keys.streams:
                for fields in await self._link.call("XINFO", "CONSUMERS", stream.stream, group):
                    told = dict(zip(fields[::2], fields[1::2], strict=True))
                    held[told[b"name"]] = held.get(told[b"name"], 0) + told[b"pending"]
        # In an ordered group entries are pending for the partition, whoever owns it.
        unknown = None if spec.ordering == "key" else 0
        return [Member(name.decode(), held.get(name, unknown)) for name in sorted(names)]

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """See `Driver.seek`."""
        spec = await self._group(topic, group)
        keys = TopicKeys.of(await self.topic(topic))
        arguments: list[str | int] = [group, int(alive_for(spec) * 1000)]
        for partition, stream in enumerate(keys.streams):
            arguments += (place_of(to, partition), stream.due(group), stream.held(group))
        with translate(f"seek group {group!r} of topic {topic!r}", topic):
            moved = await self._link.run(
                SEEK, [keys.members(group), *(stream.stream for stream in keys.streams)], arguments
            )
        if not moved:
            raise UnsupportedError(
                f"seek group {group!r} of topic {topic!r}: members are joined; close them first",
                capability="seek",
                driver="redis",
                topic=topic,
            )

    async def _group(self, topic: str, name: str) -> GroupSpec:
        for spec in await self.groups(topic):
            if spec.name == name:
                return spec
        raise GroupMissingError(f"topic {topic!r} has no group {name!r}", driver="redis", topic=topic)

    # Producers and consumers

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """See `Driver.producer`."""
        await self.topic(topic.name)
        scripts = (PUBLISH, RETAIN) if topic.max_backlog is not None or topic.retention else ()
        link = Link(self._place, f"{self.target} producer of {topic.name}", self.emit, scripts)
        await link.wire()
        return RedisProducer(link, topic, self._server.most_bytes)

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
        with translate(f"join group {group.name!r} of topic {topic.name!r}", topic.name):
            await sweep(self._link, TopicKeys.of(topic))
        if group.ephemeral:
            group = GroupSpec(
                group.topic, f"{_FOREIGN}{secrets.token_hex(12)}", group.ordering, "latest", group.lease, ephemeral=True
            )
            await self._create_group(group, topic, "")
        setting = Setting(
            place=self._place,
            commands=self._link,
            server=self._server,
            group=group,
            topic=topic,
            emit=self.emit,
        )
        consumer = OrderedConsumer(setting, lost) if group.ordering == "key" else SharedConsumer(setting)
        await consumer.join()
        return consumer

    # Where

    def _find(self) -> Place:
        target, options = self.target, self.target.options
        host, port = target.hosts[0] if target.hosts else ("localhost", None)
        return Place(
            label=str(target),
            host=host,
            port=6379 if port is None else port,
            database=int(target.path or "0"),
            username=target.username,
            password=target.password,
            tls=self._tls() if target.scheme == "rediss" else None,
            connect_timeout=options["connect_timeout"],
            dead_peer_after=options["dead_peer_after"],
            dial=self.dial,
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

    def _native_tls(self) -> dict[str, Any]:
        if self._place.tls is None:
            return {}
        options = self.target.options
        return {
            "ssl": True,
            "ssl_ca_certs": options["ca_file"],
            "ssl_certfile": options["cert_file"],
            "ssl_keyfile": options["key_file"],
            "ssl_check_hostname": options["check_hostname"],
        }

    def _no_topic(self, name: str) -> TopicMissingError:
        return TopicMissingError(f"there is no topic {name!r}", driver="redis", topic=name)
