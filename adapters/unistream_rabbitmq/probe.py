"""States what a live RabbitMQ can promise; AMQP tells its version, and nothing of its configuration."""

from __future__ import annotations

import re
from typing import Any

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
from unistream.errors import UnsupportedError
from unistream_rabbitmq.delays import MAX_DELAY
from unistream_rabbitmq.link import DEAD_AFTER_HEARTBEATS

__all__ = ["capabilities_of", "most_bytes", "version_of"]

_LEAST = (3, 10)
_MIB = 1024 * 1024


_MAKING_SECONDS = 0.5
"""What it takes to make a queue."""


def version_of(properties: dict[str, Any]) -> tuple[int, ...]:
    """
    The server's version.

    Raises:
        UnsupportedError: It is no RabbitMQ, or too old.
    """
    product, text = _text(properties.get("product")), _text(properties.get("version"))
    if product != "RabbitMQ":
        raise UnsupportedError(
            f"this is {product or 'an unknown product'} {text}, not RabbitMQ; quorum queues and streams are needed",
            capability="product",
            driver="amqp",
        )
    version = tuple(int(number) for number in re.findall(r"\d+", text)[:3])
    if version < _LEAST:
        raise UnsupportedError(
            f"RabbitMQ {text} is too old: 3.10 is the first that moves expired messages of quorum queues without loss",
            capability="version",
            driver="amqp",
        )
    return version


def most_bytes(version: tuple[int, ...]) -> int:
    """The server's default `max_message_size`; a lower setting can't be read and closes the channel."""
    return 16 * _MIB if version >= (4,) else 128 * _MIB


def capabilities_of(version: tuple[int, ...], heartbeat: int, settles: float) -> Capabilities:
    """What this version offers, to a client with these `heartbeat` and `creation_settles`."""
    return Capabilities(
        driver="amqp",
        product=f"RabbitMQ {'.'.join(map(str, version))}",
        durability=Durability(
            kind="fsync",
            note="quorum queues sync before they confirm; AMQP does not tell how many nodes hold a copy",
        ),
        ordering=OrderingByKey(
            level=Level.EMULATED,
            blocks="partition",
            note="a quorum queue per partition with one active member; other keys keep flowing until a window is full",
        ),
        parallelism=Parallelism(bound="unlimited", ordered_bound="partitions"),
        start=Start(at=frozenset({"latest"}), note="queues hold what was published after the group was created"),
        seek=Seek(level=Level.NONE, to=frozenset(), note="queues keep nothing that was settled"),
        nack_delay=NackDelay(
            level=Level.EMULATED,
            max=MAX_DELAY,
            twice=True,
            kept_for=settles + _MAKING_SECONDS,
            note="queues with a TTL; in ordered groups, and while the broker takes no messages, kept by the member",
        ),
        lease=Lease(
            level=Level.EMULATED,
            scope="connection",
            recover_within=3.0 * heartbeat + 2.0,
            dead_peer_after=DEAD_AFTER_HEARTBEATS * heartbeat,
            note="a killed member's deliveries return at once, a frozen one's after two to three heartbeats; the "
            "server's consumer_timeout (30 minutes by default) bounds every lease",
        ),
        fencing=Fencing(note="a delivery can be settled only on the channel that it came on"),
        attempts=Attempts(
            count="exact", off_by=1, note="one too many where a message was only prefetched by a lost member"
        ),
        ack_confirm=AckConfirm(level=Level.NONE, note="AMQP 0-9-1 has no reply to an ack"),
        dedupe=Dedupe(level=Level.NONE, note="consumers can compare ids"),
        retention=RetentionLimits(
            level=Level.NONE, by=frozenset(), note="RabbitMQ would drop messages without saying how many"
        ),
        max_backlog=MaxBacklog(
            overflow=frozenset({"reject"}),
            decides="group",
            note="a queue counts what waits, not what is in flight, and may take one or two messages too many",
        ),
        max_message_bytes=MaxMessageBytes(
            limit=float(most_bytes(version)),
            note="key and headers together below frame_max, 128 KiB by default; a lower max_message_size can't be read",
        ),
        lag=LagReport(exact=False, note="what waits, and what this client has in flight"),
    )


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
