"""Knows how a message lies in a stream entry, so that foreign clients can read and write it.

An entry's first field is `value`, the body; then come the headers as they are, order and duplicates kept, then the
reserved ones. The entry's id is the broker's clock, so no time is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from unistream.driver.envelope import Envelope
from unistream.driver.types import RawMessage
from unistream.message import HeaderPairs

__all__ = ["fields_of", "message_of", "size_of"]

_VALUE = "value"


def _fits(headers: HeaderPairs) -> bool:
    return all(name != _VALUE for name, _ in headers)


_ENVELOPE = Envelope(time=True, fits=_fits)


def fields_of(message: RawMessage) -> list[str | bytes]:
    """The fields and values of a message's entry, alternating."""
    if not message.headers:
        fields: list[str | bytes] = ["value", message.value, "unistream-id", message.id, "unistream-v", b"1"]
        if message.key is not None:
            fields += ("unistream-key", message.key)
        return fields
    fields = ["value", message.value]
    for name, value in _ENVELOPE.wrap(message, 0):
        # A foreign message may have had a field name that is no UTF-8; it is published again as it was.
        fields += (name if name.isascii() else name.encode("utf-8", "surrogateescape"), value)
    return fields


def size_of(message: RawMessage) -> int:
    """Bytes of value, key and headers."""
    size = len(message.value) + (len(message.key) if message.key else 0)
    for name, value in message.headers:
        size += len(name) + len(value)
    return size


def message_of(fields: Sequence[bytes], partition: int) -> RawMessage:
    """
    The message of an entry.

    An entry of a foreign program: its field `value` is the body and the rest are headers; without one, the only
    field's value is the body; else the body is empty and all fields are headers.
    """
    count = len(fields)
    if (count == 6 or count == 8) and fields[0] == b"value" and fields[2] == b"unistream-id":
        if count == 6:
            if fields[4] == b"unistream-v":
                return RawMessage(fields[3].decode("ascii", "replace"), fields[1], None, (), partition)
        elif fields[4] == b"unistream-v" and fields[6] == b"unistream-key":
            return RawMessage(fields[3].decode("ascii", "replace"), fields[1], fields[7], (), partition)
    pairs = [(fields[at].decode("utf-8", "surrogateescape"), fields[at + 1]) for at in range(0, count - count % 2, 2)]
    body = b""
    for at, (name, value) in enumerate(pairs):
        if name == _VALUE:
            body = value
            del pairs[at]
            break
    else:
        if len(pairs) == 1:
            body = pairs.pop()[1]
    identity, key, headers, _ = _ENVELOPE.unwrap(pairs)
    return RawMessage(identity, body, key, headers, partition)
