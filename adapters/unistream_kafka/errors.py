"""Turns whatever Kafka, its client or the network raise into errors of `unistream.errors`; nothing else leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ssl import SSLCertVerificationError

from kafka import errors

from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ConfigError,
    GroupMissingError,
    NotPublishedError,
    PublishError,
    PublishUnknownError,
    TooLargeError,
    TopicMissingError,
    UnistreamError,
    UnsupportedError,
)

__all__ = ["refusal", "translate", "translated"]

_ACCESS = (
    errors.AuthorizationError,
    errors.SaslAuthenticationFailedError,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    errors.SecurityDisabledError,
)
_MISSING_TOPIC = (errors.UnknownTopicOrPartitionError, errors.UnknownTopicIdError)
# Not retriable in the client's own eyes, yet nothing of the caller's doing: the next connection may succeed.
_LATER = (
    errors.RetriableError,
    errors.KafkaConnectionError,
    errors.BrokerNotAvailableError,
    errors.UnknownBrokerIdError,
    errors.KafkaProtocolError,
    errors.IllegalStateError,
    errors.TransactionAbortedError,
    OSError,
    # kafka-python raises it from an event loop that was closed or has crashed.
    RuntimeError,
)
_TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)
# The broker checked the batch and appended nothing of it.
_REFUSED = (
    errors.InvalidRecordError,
    errors.CorruptRecordError,
    errors.InvalidTimestampError,
    errors.PolicyViolationError,
    errors.UnsupportedForMessageFormatError,
    errors.UnsupportedCompressionTypeError,
    errors.InvalidTopicError,
    errors.InvalidRequiredAcksError,
)


def translated(error: BaseException, what: str, topic: str | None = None) -> UnistreamError:
    """
    The error of ours for one of theirs.

    Args:
        error: What was raised; its text may be shown, neither Kafka nor the client repeats a password in one.
        what: What was being done, on what.
        topic: The topic concerned.
    """
    if isinstance(error, UnistreamError):
        return error
    kind, hint = _kind(error)
    made = kind(f"{what}: {hint}", driver="kafka", topic=topic)
    made.__cause__ = error
    return made


def _kind(error: BaseException) -> tuple[type[UnistreamError], str]:
    text = str(error) or type(error).__name__
    if isinstance(error, SSLCertVerificationError):
        return AccessError, f"the server's certificate was not accepted; name its authority as `ca_file` ({text})"
    if isinstance(error, _ACCESS):
        return AccessError, f"Kafka refused the credentials, or the right to do this ({text})"
    if isinstance(error, _MISSING_TOPIC):
        return TopicMissingError, "there is no such topic"
    if isinstance(error, errors.GroupIdNotFoundError):
        return GroupMissingError, "there is no such group"
    if isinstance(error, (errors.UnsupportedVersionError, errors.UnrecognizedBrokerVersion)):
        return UnsupportedError, f"this Kafka is too old, or too new for the client ({text})"
    if isinstance(error, errors.KafkaConfigurationError):
        return ConfigError, text
    if isinstance(error, _LATER):
        return BrokerUnavailableError, text
    return UnistreamError, f"{type(error).__name__}: {text}"


@contextmanager
def translate(what: str, topic: str | None = None) -> Iterator[None]:
    """Raise our errors for theirs; total: every `Exception` that comes through is one of ours."""
    try:
        yield
    except UnistreamError:
        raise
    except Exception as error:
        raise translated(error, what, topic) from error


def refusal(error: BaseException, topic: str) -> PublishError | TopicMissingError | AccessError:
    """The outcome of one message that the client failed: surely not stored where the broker said so, else unknown."""
    made: PublishError | TopicMissingError | AccessError
    if isinstance(error, _TOO_LARGE):
        made = TooLargeError(f"publish to {topic!r}: {error}", driver="kafka", topic=topic)
    elif isinstance(error, _ACCESS):
        made = AccessError(
            f"publish to {topic!r}: Kafka refused the right to publish ({error})", driver="kafka", topic=topic
        )
        made.stored = "no"
    elif isinstance(error, _REFUSED):
        made = NotPublishedError(f"publish to {topic!r}: {error}", driver="kafka", topic=topic)
    else:
        made = PublishUnknownError(
            f"publish to {topic!r}: {error or type(error).__name__}; the message may be stored",
            driver="kafka",
            topic=topic,
        )
    made.__cause__ = error
    return made
