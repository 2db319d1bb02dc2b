"""Turns whatever NATS, JetStream or the network raise into errors of `unistream.errors`; nothing else leaves."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    GroupMissingError,
    NotPublishedError,
    PublishError,
    TooLargeError,
    TopicFullError,
    TopicMissingError,
    UnistreamError,
    UnsupportedError,
)
from unistream_nats.wire import Gone, Refused

__all__ = ["ApiError", "Code", "NoResponder", "refusal", "translate", "translated"]


class Code:
    """Error codes of JetStream that something depends on (server/errors.json of nats-server)."""

    STREAM_MISSING = 10059
    STREAM_EXISTS = 10058
    CONSUMER_MISSING = 10014
    # 10012 is what 2.9 says when another start is asked for: it takes a creation for a change.
    CONSUMER_EXISTS = frozenset({10012, 10013, 10105, 10148})
    MESSAGE_MISSING = 10037
    FULL = frozenset({10077})
    TOO_LARGE = frozenset({10054})
    NO_SPACE = frozenset({10023, 10028, 10047})
    NOT_ENABLED = frozenset({10039, 10076})
    LATER = frozenset({10008, 10009, 10074, 10118, 10123})


class ApiError(Exception):
    """JetStream answered with an error."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.code = int(told.get("err_code", 0))
        self.status = int(told.get("code", 0))
        super().__init__(f"{told.get('description', 'no description')} ({self.code})")


class NoResponder(Exception):  # noqa: N818 - never leaves the adapter
    """Nobody listens on the subject: no JetStream, no stream, or no consumer."""


_THEIRS = (
    ApiError,
    NoResponder,
    Gone,
    Refused,
    OSError,
    TimeoutError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
)


def translated(error: Exception, what: str, topic: str | None = None) -> UnistreamError:
    """Our error for one of theirs."""
    made: UnistreamError
    text = f"{what}: {error or type(error).__name__}"
    if isinstance(error, ApiError):
        made = _of_api(error, what, topic)
    elif isinstance(error, NoResponder):
        made = UnsupportedError(
            f"{what}: no JetStream answers here; enable it with `jetstream {{ store_dir: … }}`, or for this account",
            capability="jetstream",
            driver="nats",
            topic=topic,
        )
    elif isinstance(error, Refused):
        made = AccessError(f"{what}: NATS refused: {error}", driver="nats", topic=topic)
    elif isinstance(error, ssl.SSLCertVerificationError):
        made = AccessError(
            f"{what}: the server's certificate is not trusted ({error.verify_message}); see the option ca_file",
            driver="nats",
            topic=topic,
        )
    elif isinstance(error, (Gone, OSError, TimeoutError)):
        made = BrokerUnavailableError(text, driver="nats", topic=topic)
    else:
        made = UnistreamError(f"{what}: {type(error).__name__}: {error}", driver="nats", topic=topic)
    made.__cause__ = error
    return made


def _of_api(error: ApiError, what: str, topic: str | None) -> UnistreamError:
    text = f"{what}: {error}"
    if error.code == Code.STREAM_MISSING:
        return TopicMissingError(f"{what}: there is no such topic", driver="nats", topic=topic)
    if error.code == Code.CONSUMER_MISSING:
        return GroupMissingError(f"{what}: there is no such group", driver="nats", topic=topic)
    if error.code in Code.NOT_ENABLED:
        return UnsupportedError(text, capability="jetstream", driver="nats", topic=topic)
    if error.code in Code.LATER or error.code in Code.NO_SPACE or error.status == 503:
        return BrokerUnavailableError(text, driver="nats", topic=topic)
    return UnistreamError(text, driver="nats", topic=topic)


@contextmanager
def translate(what: str, topic: str | None = None) -> Iterator[None]:
    """Raise our errors for theirs; total: every `Exception` that comes through is one of ours."""
    try:
        yield
    except UnistreamError:
        raise
    except _THEIRS as error:
        raise translated(error, what, topic) from error


def refusal(error: ApiError, topic: str) -> PublishError | TopicMissingError:
    """The outcome of one message that JetStream answered with an error: surely not stored."""
    made: PublishError | TopicMissingError
    if error.code in Code.FULL:
        made = TopicFullError(
            f"publish to {topic!r}: as many messages as max_backlog allows wait for the slowest group",
            driver="nats",
            topic=topic,
        )
    elif error.code in Code.TOO_LARGE:
        made = TooLargeError(f"publish to {topic!r}: {error}", driver="nats", topic=topic)
    elif error.code == Code.STREAM_MISSING:
        made = TopicMissingError(f"publish to {topic!r}: there is no such topic", driver="nats", topic=topic)
        made.stored = "no"
    else:
        later = error.code in Code.LATER or error.code in Code.NO_SPACE or error.status == 503
        made = NotPublishedError(f"publish to {topic!r}: {error}", driver="nats", topic=topic, retryable=later)
    made.__cause__ = error
    return made
