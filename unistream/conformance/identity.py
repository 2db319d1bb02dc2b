"""Knows how a message of the suite proves who it is: run, producer, number, key and checksum in its own body.

A body carries everything a checker must know, so that a message is recognised on whatever path it comes back:
by another group, from a dead-letter topic, from another process, after a restart. It knows nothing of brokers.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from zlib import crc32

_MAGIC = b"us1"
_NO_KEY = b"-"


class ForeignBodyError(ValueError):
    """The body was not made by this run: another run's message, or somebody else's."""


class CorruptBodyError(ValueError):
    """The body was made by this suite, but its bytes are not those that were published."""


def new_run() -> str:
    """Return a fresh run name of eight characters; it tells this run's messages from all others."""
    return secrets.token_hex(4)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a message is. `name` is its short form in a history: `producer.number`."""

    run: str
    producer: str
    number: int
    key: bytes | None

    @property
    def name(self) -> str:
        """The message's name in a history."""
        return f"{self.producer}.{self.number}"

    def body(self, size: int = 0) -> bytes:
        """
        Return the message's body, padded to `size` bytes.

        The checksum covers the padding too, so a truncated body is a corrupt one. A `size` below the
        least possible length is raised to it.
        """
        key = _NO_KEY if self.key is None else self.key.hex().encode()
        head = b"|".join((_MAGIC, self.run.encode(), self.producer.encode(), str(self.number).encode(), key))
        padding = b"." * max(0, size - len(head) - 10)
        return b"%b|%08x|%b" % (head, crc32(head + padding), padding)


def read_body(body: bytes, run: str) -> Identity:
    """
    Return the identity that `body` carries.

    Raises:
        ForeignBodyError: The body belongs to another run, or to no run at all.
        CorruptBodyError: It begins like one of this run's, but the checksum or the shape is wrong.
    """
    if not body.startswith(b"%b|%b|" % (_MAGIC, run.encode())):
        raise ForeignBodyError(f"not a body of run {run}: {body[:40]!r}")
    parts = body.split(b"|", 6)
    if len(parts) != 7:
        raise CorruptBodyError(f"body cut short at {len(body)} bytes: {body[:60]!r}")
    head = b"|".join(parts[:5])
    if b"%08x" % crc32(head + parts[6]) != parts[5]:
        raise CorruptBodyError(f"checksum differs in a body of {len(body)} bytes: {body[:60]!r}")
    key = None if parts[4] == _NO_KEY else bytes.fromhex(parts[4].decode())
    return Identity(run, parts[2].decode(), int(parts[3]), key)
