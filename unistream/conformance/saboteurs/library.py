"""Saboteurs of the library itself: promises that no driver can break, because they are kept above every driver."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import unistream
from unistream import _client, _declare, _registry, config, errors
from unistream._loans import Loans
from unistream.capabilities import Capabilities, LagReport, Level
from unistream.conformance.saboteurs.table import mutation
from unistream.conformance.wrap import DriverLayer
from unistream.message import Receipt


@mutation("timeout-ignored", "END-2", "PUB-2", "PUB-5", by=("net.publish-timeout",))
@contextmanager
def timeout_ignored() -> Iterator[None]:
    """Publishes without the caller's timeout."""
    publish = unistream.Producer.publish

    async def patient(self: unistream.Producer, value: bytes, **options: Any) -> Receipt:
        return await publish(self, value, **{**options, "timeout": 1e6})

    with patch.object(unistream.Producer, "publish", patient):
        yield


@mutation("use-after-close-ok", "END-6", "PUB-2")
@contextmanager
def use_after_close_ok() -> Iterator[None]:
    """Hands out receipts on a closed producer."""
    publish = unistream.Producer.publish

    async def obliging(self: unistream.Producer, value: bytes, **options: Any) -> Receipt:
        try:
            return await publish(self, value, **options)
        except errors.ClosedError:
            return Receipt("never-stored")

    with patch.object(unistream.Producer, "publish", obliging):
        yield


@mutation("receive-gives-up", "END-2", "BPC-5")
@contextmanager
def receive_gives_up() -> Iterator[None]:
    """Returns from `receive` at once, whatever the timeout."""
    receive = unistream.Consumer.receive

    async def hasty(self: unistream.Consumer, timeout: float | None = None) -> unistream.Delivery | None:
        return await receive(self, 0.0)

    with patch.object(unistream.Consumer, "receive", hasty):
        yield


@mutation("swallows-cancel", "END-2", by=("can.prompt",))
@contextmanager
def swallows_cancel() -> Iterator[None]:
    """Goes on waiting for a delivery although it was cancelled."""
    receive = unistream.Consumer.receive

    async def stubborn(self: unistream.Consumer, timeout: float | None = None) -> unistream.Delivery | None:
        waiting = asyncio.ensure_future(receive(self, timeout))
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            return await waiting

    with patch.object(unistream.Consumer, "receive", stubborn):
        yield


@mutation("reject-gives-back", "DEL-3", by=("red.reject-without-topic",))
@contextmanager
def reject_gives_back() -> Iterator[None]:
    """Takes a reject for a nack."""

    async def lenient(self: unistream.Delivery, reason: str) -> None:
        await self.nack(0.0, reason)

    with patch.object(unistream.Delivery, "reject", lenient):
        yield


@mutation("handler-error-acks", "DEL-10", "DEL-11")
@contextmanager
def handler_error_acks() -> Iterator[None]:
    """Acks what a handler failed on."""
    conclude = Loans.conclude

    async def forgiving(self: Loans, delivery: unistream.Delivery, error: BaseException | None) -> None:
        await conclude(self, delivery, None)

    with patch.object(Loans, "conclude", forgiving):
        yield


def _client_method(name: str, **changed: Any) -> Any:
    """Return a patch of a client's method that overrides some of its arguments."""
    method = getattr(unistream.Client, name)

    def stubborn(self: unistream.Client, *args: Any, **options: Any) -> Any:
        return method(self, *args, **{**options, **{key: changed[key] for key in changed if key in options}})

    return patch.object(unistream.Client, name, stubborn)


@mutation("full-always-blocks", "PUB-5", by=("bpp.outage-fail", "bpp.outage-drop-newest", "bpp.outage-drop-oldest"))
@contextmanager
def full_always_blocks() -> Iterator[None]:
    """Waits for room whatever `when_full` says."""
    with _client_method("producer", when_full="block"):
        yield


@mutation("window-unbounded", "PUB-5", by=("bpp.memory-bounded", "bpp.outage-block"))
@contextmanager
def window_unbounded() -> Iterator[None]:
    """Takes whatever it is given."""
    with _client_method("producer", max_unconfirmed=1 << 40, max_unconfirmed_bytes=1 << 40):
        yield


@mutation("stored-unsaid", "PUB-2")
@contextmanager
def stored_unsaid() -> Iterator[None]:
    """Leaves it open whether a message that failed may be stored."""
    publish = unistream.Producer.publish

    async def vague(self: unistream.Producer, value: bytes, **options: Any) -> Receipt:
        try:
            return await publish(self, value, **options)
        except errors.UnistreamError as error:
            vars(error)["stored"] = None
            raise

    with patch.object(unistream.Producer, "publish", vague):
        yield


@mutation("failures-unsaid", "PUB-5")
@contextmanager
def failures_unsaid() -> Iterator[None]:
    """Closes a producer without a word of the failures that nobody looked at."""
    close = unistream.Producer.close

    async def discreet(self: unistream.Producer, *args: Any, **options: Any) -> None:
        try:
            await close(self, *args, **options)
        except ExceptionGroup:
            return

    with patch.object(unistream.Producer, "close", discreet):
        yield


@mutation("bytes-unbounded", "BPC-1")
@contextmanager
def bytes_unbounded() -> Iterator[None]:
    """Counts messages, and never their bytes."""
    consumer = unistream.Group.consumer

    def careless(self: unistream.Group, **options: Any) -> unistream.Consumer:
        return consumer(self, **{**options, "max_in_flight_bytes": 1 << 40})

    with patch.object(unistream.Group, "consumer", careless):
        yield


@mutation("accepts-unordered", "ORD-2", "ORD-4")
@contextmanager
def accepts_unordered() -> Iterator[None]:
    """Takes a group that asks for an order, and gives none."""
    with _client_method("group", ordering="none"):
        yield


@mutation("drops-without-a-word", "DEL-3", "END-6")
@contextmanager
def drops_without_a_word() -> Iterator[None]:
    """Takes `max_attempts` without a dead letter topic, and drops."""
    method = unistream.Client.group

    def generous(self: unistream.Client, *args: Any, **options: Any) -> unistream.Group:
        if options.get("retry") is not None and options.get("dead_letter") is None:
            options["dead_letter"] = unistream.DROP
        return method(self, *args, **options)

    with patch.object(unistream.Client, "group", generous):
        yield


@mutation("any-name", "END-6")
@contextmanager
def any_name() -> Iterator[None]:
    """Takes any text for a name."""

    def obliging(what: str, name: str) -> str:
        return name

    with patch.object(_client, "name_of", obliging), patch.object(_declare, "name_of", obliging):
        yield


@mutation("any-option", "END-6")
@contextmanager
def any_option() -> Iterator[None]:
    """Takes unknown options in a URL without a word."""
    parse = config.parse_target

    def deaf(url: str, driver: Any) -> Any:
        return parse(url.partition("?")[0], driver)

    with patch.object(_client, "parse_target", deaf):
        yield


@mutation("any-scheme", "END-6")
@contextmanager
def any_scheme() -> Iterator[None]:
    """Takes a misspelt scheme for the one that is near."""
    find = _registry.find_driver

    def guessing(scheme: str) -> Any:
        try:
            return find(scheme)
        except errors.UnknownSchemeError:
            return find(scheme[:-1])

    with patch.object(_client, "find_driver", guessing):
        yield


@mutation("require-ignored", "CAP-1", "END-6", by=("cfg.require",))
@contextmanager
def require_ignored() -> Iterator[None]:
    """Never looks at what a program requires."""
    with patch.object(Capabilities, "require", lambda self, needs: None):
        yield


@mutation("always-healthy", "END-3")
@contextmanager
def always_healthy() -> Iterator[None]:
    """Says that all is well, whatever happens."""

    async def cheerful(self: unistream.Client) -> unistream.Health:
        return unistream.Health(True, "connected", ())

    with patch.object(unistream.Client, "health", cheerful):
        yield


@mutation("close-does-nothing", "END-1", "END-6")
@contextmanager
def close_does_nothing() -> Iterator[None]:
    """Leaves a client open that was closed."""

    async def lazy(self: unistream.Client) -> None:
        return None

    with patch.object(unistream.Client, "close", lazy):
        yield


@mutation("retryable-unsaid", "END-5")
@contextmanager
def retryable_unsaid() -> Iterator[None]:
    """Leaves it open whether trying again may help."""
    with patch.object(errors.WindowFullError, "retryable", None):
        yield


class _WithoutLag(DriverLayer):
    """Claims no lag."""

    def claims(self, capabilities: Capabilities) -> Capabilities:
        """Withdraw the claim."""
        return replace(capabilities, lag=LagReport(level=Level.NONE, exact=False))


@mutation("silently-accepts", "CAP-2", by=("cap.refused",), layer=_WithoutLag)
@contextmanager
def silently_accepts() -> Iterator[None]:
    """Goes on with a call whose capability is missing."""
    with patch.object(unistream.Group, "_require", lambda self, capability, wanted: None):
        yield
