"""Turns whatever RabbitMQ, pika or the network raise into errors of `unistream.errors`; nothing else leaves."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import (
    AMQPConnectionError,
    AMQPError,
    AuthenticationError,
    ChannelClosed,
    ChannelWrongStateError,
    ConnectionClosed,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from unistream.errors import AccessError, BrokerUnavailableError, TopicMissingError, UnistreamError

# rabbit_amqqueue:absent/2 and rabbit_misc:absent: while a server starts, and while a queue has no leader.
_THERE = re.compile("down or inaccessible|crashed|stopped by supervisor|due to timeout")

__all__ = ["NOT_FOUND", "PRECONDITION", "RESOURCE_LOCKED", "UNREACHABLE", "code_of", "translate", "translated"]

ACCESS_REFUSED = 403
NOT_FOUND = 404
RESOURCE_LOCKED = 405
PRECONDITION = 406
_CONNECTION_FORCED = 320
_NOT_ALLOWED = 530
_INTERNAL_ERROR = 541
UNREACHABLE = -404
"""Not a code of AMQP: RabbitMQ says 404 too of a queue that is there and that nobody serves just now."""
_PASSING = (_CONNECTION_FORCED, _INTERNAL_ERROR, RESOURCE_LOCKED, UNREACHABLE)


def code_of(error: BaseException | None) -> int:
    """The AMQP reply code that closed a channel or connection, 0 if it was something else; 404 if nothing is there."""
    if not isinstance(error, (ChannelClosed, ConnectionClosed)):
        return 0
    if error.reply_code == NOT_FOUND and _THERE.search(error.reply_text):
        return UNREACHABLE
    return int(error.reply_code)


def translated(error: BaseException, what: str, topic: str | None = None) -> UnistreamError:
    """
    The error of ours for one of theirs.

    Args:
        error: What was raised; RabbitMQ repeats user names, never passwords.
        what: What was being done, on what.
        topic: The topic concerned.
    """
    if isinstance(error, UnistreamError):
        return error
    kind, hint = _kind(error)
    made = kind(f"{what}: {hint or error or type(error).__name__}", driver="amqp", topic=topic)
    made.__cause__ = error
    return made


def _kind(error: BaseException) -> tuple[type[UnistreamError], str]:
    if isinstance(error, (ProbableAuthenticationError, ProbableAccessDeniedError)):
        # pika's guess at any connection that ends in the handshake, one that was cut too; RabbitMQ says it when it
        # refuses (authentication_failure_close), and pika keeps that only as text.
        refused = "(403)" in str(error) or "(530)" in str(error)
        return (AccessError, f"RabbitMQ refused to let us in ({error})") if refused else (BrokerUnavailableError, "")
    if isinstance(error, AMQPConnectorException) or (isinstance(error, AMQPConnectionError) and error.args):
        # pika wraps what really happened, sometimes several times.
        inner = getattr(error, "exception", None) or (error.args[0] if error.args else None)
        if isinstance(inner, BaseException) and inner is not error:
            return _kind(inner)
    code = code_of(error)
    if isinstance(error, AuthenticationError) or code == ACCESS_REFUSED:
        return AccessError, f"RabbitMQ refused the credentials, or the right to do this ({_text(error)})"
    if code == _NOT_ALLOWED:
        return AccessError, f"RabbitMQ refused the virtual host ({_text(error)})"
    if code == NOT_FOUND:
        return TopicMissingError, _text(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessError, f"the server's certificate is not trusted ({error.verify_message}); see the option ca_file"
    if isinstance(error, ChannelClosed) and code not in _PASSING:
        return UnistreamError, _text(error)
    if isinstance(error, (AMQPError, AMQPConnectorException, OSError, TimeoutError, asyncio.IncompleteReadError)):
        return BrokerUnavailableError, _text(error)
    return UnistreamError, f"{type(error).__name__}: {error}"


def _text(error: BaseException) -> str:
    if isinstance(error, (ChannelClosed, ConnectionClosed)):
        return f"{error.reply_code} {error.reply_text}"
    if isinstance(error, ChannelWrongStateError):
        return "the channel is closed"
    return str(error) or type(error).__name__


@contextmanager
def translate(what: str, topic: str | None = None) -> Iterator[None]:
    """Raise our errors for theirs; total: every `Exception` that comes through is one of ours."""
    try:
        yield
    except UnistreamError:
        raise
    except Exception as error:
        raise translated(error, what, topic) from error
