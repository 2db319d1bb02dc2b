"""Asks a live Kafka what it can promise, and states it as capabilities. Runs in the control thread; blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import AuthorizationError

from unistream.capabilities import (
    AckConfirm,
    Attempts,
    Capabilities,
    Dedupe,
    Durability,
    Fencing,
    LagReport,
    Lease,
    Level,
    MaxBacklog,
    MaxMessageBytes,
    NackDelay,
    OrderingByKey,
    Parallelism,
    RetentionLimits,
    Seek,
    Start,
)
from unistream.errors import ConfigError, UnsupportedError
from unistream_kafka.client import Place
from unistream_kafka.producer import OVERHEAD_BYTES

__all__ = ["Server", "probe"]

_PLACES = frozenset({"latest", "earliest", "time", "position"})
_LEAST = (2, 4)
_TEXT_BYTES = 4096
_MESSAGE_BYTES = 1_048_588
_MOST_DELAY = 3600.0
_LEAST_LEASE = 0.2


@dataclass(frozen=True, slots=True)
class Server:
    """What `probe` found out: the most bytes of a message, and of the text that is stored with a cursor."""

    most_bytes: int
    text_bytes: int


def probe(admin: KafkaAdminClient, place: Place, session: float, replication: int) -> tuple[Server, Capabilities]:
    """
    Ask the cluster for its version and settings.

    Raises:
        UnsupportedError: The cluster is older than Kafka 2.4.
        ConfigError: It does not take sessions as short, or as long, as asked for.
    """
    version = admin._manager.broker_version
    # What the client concludes from the requests that the broker understands; a newer one understands those too.
    product = f"Kafka {'.'.join(map(str, version))}+"
    if version < _LEAST:
        raise UnsupportedError(
            f"{product} is too old: 2.4 is the first with cooperative rebalances", capability="version", driver="kafka"
        )
    settings = _settings(admin)
    shortest, longest = (
        int(settings.get(f"group.{end}.session.timeout.ms", default)) / 1000
        for end, default in (("min", 0), ("max", 86_400_000))
    )
    if not shortest <= session <= longest:
        raise ConfigError(
            f"{place.label}: session_timeout={session:g}, and the cluster takes {shortest:g} to {longest:g} seconds"
        )
    server = Server(
        int(settings.get("message.max.bytes", _MESSAGE_BYTES)) - OVERHEAD_BYTES,
        int(settings.get("offset.metadata.max.bytes", _TEXT_BYTES)),
    )
    kept_minutes = settings.get("offsets.retention.minutes")
    return server, Capabilities(
        driver="kafka",
        product=product,
        durability=_durability(settings, replication),
        ordering=OrderingByKey(blocks="key", note="partitions are native; keys take turns in the member that owns one"),
        parallelism=Parallelism(bound="partitions", ordered_bound="partitions"),
        start=Start(at=_PLACES, group_kept_for=float(kept_minutes or 10080) * 60),
        seek=Seek(to=_PLACES, with_members=False),
        nack_delay=NackDelay(
            level=Level.EMULATED,
            max=_MOST_DELAY,
            note="the owner of the partition holds the message; Kafka holds until when",
        ),
        lease=Lease(
            level=Level.EMULATED,
            scope="member",
            least=_LEAST_LEASE,
            recover_within=session + 5.0,
            dead_peer_after=max(place.dead_peer_after, max(session, 5.0) + 5.0),
            note="a dead member is put out after the session_timeout, and its partitions go to the others",
        ),
        fencing=Fencing(level=Level.EMULATED, note="by the generation of the group, checked by Kafka at every commit"),
        attempts=Attempts(
            level=Level.EMULATED,
            count="exact",
            off_by=1,
            note="written down before a message is lent: one fetched when its member died may count one too many",
        ),
        ack_confirm=AckConfirm(note="an offset commit, coalesced"),
        dedupe=Dedupe(
            level=Level.NONE, note="only the producer's own resends are recognised; consumers can compare ids"
        ),
        retention=RetentionLimits(by=frozenset({"max_age", "max_bytes"}), note="Kafka removes whole segments"),
        max_backlog=MaxBacklog(
            level=Level.NONE, overflow=frozenset(), note="Kafka never refuses for a backlog; Redis and NATS can"
        ),
        max_message_bytes=MaxMessageBytes(
            limit=float(server.most_bytes), note=f"message.max.bytes less {OVERHEAD_BYTES} for what is around it"
        ),
        lag=LagReport(exact=True, note="counts transaction markers and compacted messages of foreign topics too"),
    )


def _settings(admin: KafkaAdminClient) -> Mapping[str, str]:
    """The settings of one broker; nothing where reading them is forbidden, as hosted services do."""
    node = admin.describe_cluster()["brokers"][0]["broker_id"]
    resource = ConfigResource(ConfigResourceType.BROKER, str(node))
    try:
        told = admin.describe_configs([resource], config_filter="all")["broker"][str(node)]
    except AuthorizationError:
        return {}
    return {name: entry["value"] for name, entry in told.items() if entry["value"] is not None}


def _durability(settings: Mapping[str, str], replication: int) -> Durability:
    if not settings:
        return Durability(kind="memory", note="reading the broker's settings is forbidden here")
    wanted = int(settings.get("default.replication.factor", 1)) if replication < 0 else replication
    copies = min(int(settings.get("min.insync.replicas", 1)), wanted)
    if copies > 1:
        return Durability(kind="replicated", copies=copies, note=f"replication factor {wanted}, min.insync.replicas")
    if settings.get("log.flush.interval.messages") == "1":
        return Durability(kind="fsync", note="log.flush.interval.messages 1")
    return Durability(
        kind="process_crash",
        note="one copy, in the page cache; use three replicas and min.insync.replicas 2",
    )
