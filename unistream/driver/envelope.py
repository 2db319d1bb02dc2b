"""The wire format of key, headers, id and time, one for all brokers and readable by foreign clients.

The body is always the broker's own body. What a broker's native headers carry without loss goes into them; what they
don't goes into reserved headers, whose names start with `unistream-`. `docs/wire.md` is the normative text.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from unistream.driver.types import RawMessage
from unistream.message import HeaderPairs

__all__ = ["DEAD_PREFIX", "RESERVED_PREFIX", "VERSION", "Envelope", "Unwrapped", "binary_fits", "text_fits"]

RESERVED_PREFIX = "unistream-"
DEAD_PREFIX = "unistream-dead-"
VERSION = b"1"

_ID = "unistream-id"
_VERSION = "unistream-v"
_KEY = "unistream-key"
_TIME = "unistream-time"
_HEADERS = "unistream-headers"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# An id as producers take it.
_ID_TEXT = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]{0,126}[\x21-\x7e])?")
# Milliseconds until the year 9999.
_MOST_TIME_DIGITS = 14
_PRINTABLE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class Unwrapped(NamedTuple):
    """What the reserved headers said; `time_ms` and `key` are `None`, and `id` is `""`, where they said nothing."""

    id: str
    key: bytes | None
    headers: HeaderPairs
    time_ms: int | None


def binary_fits(headers: HeaderPairs) -> bool:
    """Whether a mapping `str -> bytes` without duplicates (an AMQP table) carries these headers without loss."""
    return len({name for name, _ in headers}) == len(headers) and all(
        0 < len(name.encode()) <= 255 for name, _ in headers
    )


def text_fits(headers: HeaderPairs) -> bool:
    """Whether one-line ASCII headers (NATS) carry these without loss: token names, no duplicates, no edge spaces."""
    return len({name.lower() for name, _ in headers}) == len(headers) and all(
        _TOKEN.fullmatch(name) and _PRINTABLE.fullmatch(value) for name, value in headers
    )


def _always(headers: HeaderPairs) -> bool:
    return True


class Envelope:
    """Wraps messages into native headers, and back.

    Args:
        key: Whether the broker has a key of its own, so that none is written.
        time: Whether the broker tells when it took a message, so that none is written.
        fits: Whether the broker's headers carry an application's headers without loss. Default: always.
        text: Whether header values are one-line ASCII text: keys are percent-encoded then.
    """

    def __init__(
        self,
        *,
        key: bool = False,
        time: bool = False,
        fits: Callable[[HeaderPairs], bool] = _always,
        text: bool = False,
    ) -> None:
        self._key = key
        self._time = time
        self._fits = fits
        self._text = text

    def wrap(self, message: RawMessage, time_ms: int) -> list[tuple[str, bytes]]:
        """The native headers of a message, reserved ones last; `time_ms` is the publisher's clock since the epoch."""
        headers = message.headers
        pairs: list[tuple[str, bytes]]
        if not headers:
            pairs = []
        elif self._fits(headers):
            pairs = list(headers)
        else:
            # The portable layer's own reserved headers are plain, so they stay readable beside the blob.
            pairs = [pair for pair in headers if pair[0].startswith(RESERVED_PREFIX)]
            pairs.append((_HEADERS, _pack(pair for pair in headers if not pair[0].startswith(RESERVED_PREFIX))))
        pairs.append((_ID, message.id.encode()))
        pairs.append((_VERSION, VERSION))
        key = message.key
        if key is not None and not self._key:
            pairs.append((_KEY, quote_from_bytes(key).encode() if self._text else key))
        if not self._time:
            pairs.append((_TIME, b"%d" % time_ms))
        return pairs

    def unwrap(self, pairs: Iterable[tuple[str, bytes]]) -> Unwrapped:
        """
        Take native headers apart.

        Headers of a message that no unistream wrote are all the application's. Garbage in a reserved header is
        treated as if the header were absent, so that no message can block its group.
        """
        identity = ""
        key: bytes | None = None
        time_ms: int | None = None
        blob: bytes | None = None
        headers: list[tuple[str, bytes]] = []
        for name, value in pairs:
            # The most frequent names first.
            if name == _ID:
                identity = value.decode() if _ID_TEXT.fullmatch(value) else ""
            elif name == _TIME:
                time_ms = int(value) if value.isdigit() and len(value) <= _MOST_TIME_DIGITS else None
            elif name == _KEY:
                key = unquote_to_bytes(value) if self._text else value
            elif name == _HEADERS:
                blob = value
            elif not name.startswith(RESERVED_PREFIX) or name.startswith(DEAD_PREFIX):
                headers.append((name, value))
        if blob is not None:
            headers = [*_unpack(blob), *headers]
        return Unwrapped(identity, key, tuple(headers), time_ms)


def _pack(headers: Iterable[tuple[str, bytes]]) -> bytes:
    return json.dumps([[name, b64encode(value).decode()] for name, value in headers], separators=(",", ":")).encode()


def _unpack(blob: bytes) -> list[tuple[str, bytes]]:
    try:
        pairs = json.loads(blob)
        if not all(isinstance(name, str) for name, _ in pairs):
            return []
        return [(name, b64decode(value, validate=True)) for name, value in pairs]
    except (ValueError, TypeError, RecursionError):
        return []
