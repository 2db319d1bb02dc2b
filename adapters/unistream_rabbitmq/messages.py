"""How a message travels over AMQP: body, properties, headers; and what is written on one that comes back.

`docs/wire.md` is the normative text. `message_id` repeats the id for foreign consumers. Two reserved headers of this
adapter are on a message that was put back into its group: `unistream-attempts` (the lendings that count) and
`unistream-partition`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from pika import BasicProperties

from unistream.driver.envelope import Envelope, binary_fits
from unistream.driver.types import RawMessage
from unistream.message import HeaderPairs

__all__ = ["HEADER_ROOM", "Arrived", "arrived", "header_bytes", "properties_of", "put_back"]

ATTEMPTS = "unistream-attempts"
PARTITION = "unistream-partition"
HEADER_ROOM = 1024
"""Bytes of a header frame that are not headers: properties and framing."""

# What the broker adds; hidden from applications, and never sent back.
_BROKER = frozenset(
    {
        "x-death",
        "x-delivery-count",
        "x-acquired-count",
        "x-first-death-exchange",
        "x-first-death-queue",
        "x-first-death-reason",
        "x-last-death-exchange",
        "x-last-death-queue",
        "x-last-death-reason",
        "x-opt-rabbitmq-broadcast-queues",
        "x-stream-offset",
    }
)
_SAID = _BROKER | {ATTEMPTS, PARTITION}
# With these the broker routes: it closes the channel when their values are not lists of text.
_ROUTING = frozenset({"CC", "BCC"})
_PERSISTENT = 2
_DEATHS = "x-death"


def _fits(headers: HeaderPairs) -> bool:
    return binary_fits(headers) and not any(name in _BROKER or name in _ROUTING for name, _ in headers)


_ENVELOPE = Envelope(fits=_fits)


def properties_of(message: RawMessage, time_ms: int) -> BasicProperties:
    """The properties of a message on its way to the exchange; persistent."""
    return BasicProperties(
        headers=dict(_ENVELOPE.wrap(message, time_ms)),
        delivery_mode=_PERSISTENT,
        message_id=message.id,
    )


def header_bytes(message: RawMessage) -> int:
    """About how many bytes of a header frame key and headers take; the frame can't be split (AMQP 0-9-1, 4.2.6.1)."""
    size = len(message.key or b"") + 2 * len(message.id) + HEADER_ROOM
    for name, value in message.headers:
        size += len(name) + len(value) + 16
    return size if _fits(message.headers) else size * 4 // 3 + HEADER_ROOM


class Arrived(NamedTuple):
    """
    What a delivery says.

    Attributes:
        message: The message.
        published_at: Seconds since the epoch, by the publisher's clock.
        spent: Lendings of it that are known to count; one for each time that it was rejected.
        lost: Times that it came back because a member or connection was lost, or gave it back unasked.
    """

    message: RawMessage
    published_at: float | None
    spent: int
    lost: int


def arrived(method: Any, properties: BasicProperties, body: bytes) -> Arrived:
    """Read a delivery."""
    spent = lost = 0
    partition, placed = method.routing_key, None
    pairs: list[tuple[str, bytes]] = []
    headers: Mapping[str, Any] | None = properties.headers
    if headers:
        for name, value in headers.items():
            if name not in _SAID:
                pairs.append((name, value if type(value) is bytes else _bytes(value)))
            elif name == "x-delivery-count":
                lost = int(value)
            elif name == _DEATHS:
                for death in value:
                    if death["reason"] == "rejected":  # moved to the queue of suspects, after a lending each time
                        spent += death["count"]
                        partition = death["routing-keys"][0]
            elif name == ATTEMPTS:
                spent += _number(value)
            elif name == PARTITION:
                placed = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    if method.redelivered and not lost:
        lost = 1  # a queue that does not count
    partition = placed or partition
    said = _ENVELOPE.unwrap(pairs)
    time_ms = said.time_ms
    if time_ms is None and properties.timestamp:
        time_ms = int(properties.timestamp) * 1000
    return Arrived(
        RawMessage(
            said.id or properties.message_id or "",
            body,
            said.key,
            said.headers,
            int(partition) if partition.isascii() and partition.isdigit() else 0,
        ),
        None if time_ms is None else time_ms / 1000,
        spent,
        lost,
    )


def put_back(properties: BasicProperties, spent: int, partition: int) -> BasicProperties:
    """The properties of a message that is put back into its group, with what counts of its lendings."""
    headers = {name: value for name, value in (properties.headers or {}).items() if name not in _BROKER}
    headers[ATTEMPTS] = b"%d" % spent
    headers[PARTITION] = b"%d" % partition
    return BasicProperties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=headers,
        delivery_mode=_PERSISTENT,
        priority=properties.priority,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        message_id=properties.message_id,
        timestamp=properties.timestamp,
        type=properties.type,
        app_id=properties.app_id,
    )


def _number(value: Any) -> int:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    return int(text) if text.isdigit() else 0


def _bytes(value: Any) -> bytes:
    """A foreign header's value: text as UTF-8, numbers in decimal, what is nested as JSON."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if value is None:
        return b""
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, (int, Decimal)):
        return f"{value:d}".encode() if isinstance(value, int) else str(value).encode()
    return json.dumps(value, default=str).encode()
