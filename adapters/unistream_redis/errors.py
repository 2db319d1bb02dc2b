"""Turns whatever Redis, its client or the network raise into errors of `unistream.errors`; nothing else leaves."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    GroupMissingError,
    NotPublishedError,
    PublishError,
    TooLargeError,
    TopicMissingError,
    UnistreamError,
)

__all__ = ["code_of", "refusal", "translate", "translated", "unavailable"]

_ACCESS = frozenset({"NOAUTH", "WRONGPASS", "NOPERM", "DENIED"})
# The server is there and can't serve just now; the same command may succeed later without any change.
_LATER = frozenset(
    {
        "LOADING",
        "BUSY",
        "NOSCRIPT",
        "READONLY",
        "MASTERDOWN",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "NOREPLICAS",
        "MISCONF",
        "UNBLOCKED",
        "OOM",
    }
)
_OUT_OF_MEMORY = "OOM"


def code_of(error: ResponseError) -> str:
    """The first word of an error reply, which is its code; Redis wraps it when a script met the error."""
    words = str(error).split()
    return words[0].lstrip("-") if words else ""


def unavailable(error: object) -> bool:
    """Whether a reply says that the server serves nobody just now."""
    return isinstance(error, ResponseError) and code_of(error) in _LATER - {_OUT_OF_MEMORY}


def translated(error: BaseException, what: str, topic: str | None = None) -> UnistreamError:
    """
    The error of ours for one of theirs.

    Args:
        error: What was raised; its text may be shown, Redis never repeats a password in one.
        what: What was being done, on what.
        topic: The topic concerned.
    """
    if isinstance(error, UnistreamError):
        return error
    kind, hint = _kind(error)
    made = kind(f"{what}: {hint or error}", driver="redis", topic=topic)
    made.__cause__ = error
    return made


def _kind(error: BaseException) -> tuple[type[UnistreamError], str]:
    if isinstance(error, ResponseError):
        code = code_of(error)
        if code in _ACCESS or str(error).startswith("ERR AUTH"):
            return AccessError, f"Redis refused the credentials, or the right to do this ({code})"
        if code == "NOGROUP":
            return GroupMissingError, "there is no such group, it was deleted"
        if code == _OUT_OF_MEMORY:
            return BrokerUnavailableError, "Redis has reached its maxmemory; remove data or raise the limit"
        if code in _LATER:
            return BrokerUnavailableError, ""
        return UnistreamError, ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessError, f"the server's certificate is not trusted ({error.verify_message}); see the option ca_file"
    if isinstance(error, (RedisConnectionError, OSError, TimeoutError, hiredis.HiredisError)):
        return BrokerUnavailableError, str(error) or type(error).__name__
    return UnistreamError, f"{type(error).__name__}: {error}"


@contextmanager
def translate(what: str, topic: str | None = None) -> Iterator[None]:
    """Raise our errors for theirs; total: every `Exception` that comes through is one of ours."""
    try:
        yield
    except UnistreamError:
        raise
    except (
        RedisError,
        hiredis.HiredisError,
        OSError,
        TimeoutError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
    ) as error:
        raise translated(error, what, topic) from error


def refusal(error: ResponseError, topic: str) -> PublishError | TopicMissingError | AccessError:
    """The outcome of one message that Redis answered with an error: surely not stored."""
    code = code_of(error)
    if code == _OUT_OF_MEMORY:
        made: PublishError | AccessError = NotPublishedError(
            f"publish to {topic!r}: Redis has reached its maxmemory; remove data or raise the limit",
            driver="redis",
            topic=topic,
            retryable=True,
        )
    elif code in _ACCESS:
        made = AccessError(
            f"publish to {topic!r}: Redis refused the right to publish ({code})", driver="redis", topic=topic
        )
        made.stored = "no"
    elif "too large" in str(error):
        made = TooLargeError(f"publish to {topic!r}: {error}", driver="redis", topic=topic)
    else:
        made = NotPublishedError(
            f"publish to {topic!r}: {error}", driver="redis", topic=topic, retryable=unavailable(error)
        )
    made.__cause__ = error
    return made
