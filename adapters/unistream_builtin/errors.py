"""The broker's refusals in unistream's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unistream.broker import (
    BrokerError,
    GroupMissing,
    InvalidRequest,
    PositionOutOfRange,
    SessionEnded,
    TopicMissing,
)
from unistream.errors import (
    ClosedError,
    ConfigError,
    GroupMissingError,
    TopicMissingError,
    UnistreamError,
)

__all__ = ["DRIVER", "translated", "translating"]

DRIVER = "memory"

_KINDS: dict[type[BrokerError], type[UnistreamError]] = {
    TopicMissing: TopicMissingError,
    GroupMissing: GroupMissingError,
    SessionEnded: ClosedError,
    InvalidRequest: ConfigError,
    PositionOutOfRange: ConfigError,
}


def translated(error: BrokerError, topic: str | None = None) -> UnistreamError:
    """The error to raise in place of the broker's own: `raise translated(error) from error`."""
    kind = _KINDS.get(type(error), UnistreamError)
    return kind(str(error), driver=DRIVER, topic=topic)


@contextmanager
def translating(topic: str) -> Iterator[None]:
    """Raise the broker's refusals as unistream's errors."""
    try:
        yield
    except BrokerError as error:
        raise translated(error, topic) from error
