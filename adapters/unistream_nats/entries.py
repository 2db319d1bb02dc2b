"""Knows how a message lies in a NATS message, so that foreign clients can read and write it.

The payload is the body. Headers are the application's where one line of ASCII each carries them without loss, then the
reserved ones; `Nats-Msg-Id` is what the stream deduplicates by. The server's clock gives the time, so none is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote, quote_from_bytes

from unistream.driver.envelope import Envelope, text_fits
from unistream.driver.types import RawMessage
from unistream.message import HeaderPairs

__all__ = ["MOST_HEADERS", "OVERHEAD", "message_of", "payload_size", "written"]

MOST_HEADERS = 65535
"""Bytes that JetStream takes of headers, whatever its settings (error 10097 beyond)."""

OVERHEAD = 1024
"""Bytes that are set aside for reserved headers: a message of `max_payload` less these bytes always fits, if it has
neither a key that needs escaping nor headers that need base64."""

_PLAIN = re.compile(r"[!-~]+")
_IDENTITY = re.compile(rb"[!-~]{1,128}")
_HEAD = b"NATS/1.0\r\nNats-Msg-Id: %b\r\nunistream-id: %b\r\nunistream-v: 1\r\n\r\n"
_HEAD_KEY = b"NATS/1.0\r\nNats-Msg-Id: %b\r\nunistream-id: %b\r\nunistream-v: 1\r\nunistream-key: %b\r\n\r\n"
_MESSAGE_ID = "nats-msg-id"
_IN_BODY = "unistream-headers-bytes"
_BLOB = "unistream-headers"


def _fits(headers: HeaderPairs) -> bool:
    """Whether headers go as they are: not those that the server would act upon."""
    return text_fits(headers) and not any(name.lower().startswith("nats-") for name, _ in headers)


_ENVELOPE = Envelope(time=True, fits=_fits, text=True)
_PACKING = Envelope(time=True, fits=lambda headers: False, text=True)


def written(message: RawMessage) -> tuple[bytes, bytes]:
    """
    The block of headers of a message, and its payload.

    The payload is the body; only where the headers are more than JetStream takes they are in front of it, packed, and
    a header says how many bytes they are.
    """
    identity = message.id
    dedupe = message.dedupe or identity
    # The server trims the value before it compares.
    same = (dedupe if _PLAIN.fullmatch(dedupe) else quote(dedupe)).encode()
    key = message.key
    if not message.headers:
        if key is None:
            return _HEAD % (same, identity.encode()), message.value
        return _HEAD_KEY % (same, identity.encode(), quote_from_bytes(key).encode()), message.value
    head = _block(same, _ENVELOPE.wrap(message, 0))
    if len(head) <= MOST_HEADERS:
        return head, message.value
    pairs = dict(_PACKING.wrap(message, 0))
    blob = pairs.pop(_BLOB)
    pairs[_IN_BODY] = b"%d" % len(blob)
    return _block(same, pairs.items()), blob + message.value


def _block(same: bytes, pairs: Iterable[tuple[str, bytes]]) -> bytes:
    lines = [b"NATS/1.0\r\nNats-Msg-Id: ", same, b"\r\n"]
    for name, value in pairs:
        lines += (name.encode(), b": ", value, b"\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def payload_size(message: RawMessage) -> int:
    """Bytes of value, key and headers, before they are written as text."""
    size = len(message.value) + len(message.key or b"")
    for name, value in message.headers:
        size += len(name) + len(value)
    return size


def message_of(head: bytes, body: bytes, partition: int) -> RawMessage:
    """
    The message of headers and body.

    What a foreign program set is kept: headers in their order, repeated ones too, and its `Nats-Msg-Id`.
    """
    if not head:
        return RawMessage("", body, None, (), partition)
    pairs: list[tuple[str, bytes]] = []
    ours = False
    for line in head.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if not colon:
            continue
        text = name.decode("utf-8", "surrogateescape")
        ours = ours or text == "unistream-id"
        # One space belongs to the format; servers and clients of NATS ignore more.
        pairs.append((text, value[1:] if value[:1] == b" " else value))
    if ours:
        if len(pairs) == 3 and pairs[2][0] == "unistream-v" and _IDENTITY.fullmatch(pairs[1][1]):
            return RawMessage(pairs[1][1].decode(), body, None, (), partition)
        pairs = [pair for pair in pairs if pair[0].lower() != _MESSAGE_ID]
        before = next((value for name, value in pairs if name == _IN_BODY), b"0")
        if before.isdigit() and 0 < int(before) <= len(body):
            pairs.append((_BLOB, body[: int(before)]))
            body = body[int(before) :]
    identity, key, headers, _ = _ENVELOPE.unwrap(pairs)
    return RawMessage(identity, body, key, headers, partition)
