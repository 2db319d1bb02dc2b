"""Connections and channels as futures over pika's callbacks; knows AMQP, nothing of topics or groups.

pika 1.4.4 runs on the caller's loop but has no awaitables, no reconnect, and notices a black hole only after twice the
heartbeat plus ten seconds. Here every pending answer fails when its channel or connection ends, and a silent peer is
given up after one and a half heartbeats.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pika import ConnectionParameters, PlainCredentials, SSLOptions
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.exceptions import (
    AMQPConnectionError,
    AMQPHeartbeatTimeout,
    ChannelWrongStateError,
    ConnectionWrongStateError,
)
from pika.frame import Body, Header, Method
from pika.spec import Basic

__all__ = ["DEAD_AFTER_HEARTBEATS", "Channel", "Line", "Place", "Wire"]

DEAD_AFTER_HEARTBEATS = 1.5
"""RabbitMQ sends a heartbeat every half interval, so this is two missed ones and some slack."""
_CLOSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the server is and how to log in. `heartbeat` in whole seconds, `connect_timeout` in seconds."""

    host: str
    port: int
    vhost: str
    username: str
    password: str = field(repr=False)
    dial: Callable[[str, int], tuple[str, int]] = field(repr=False)
    connect_timeout: float = 5.0
    heartbeat: int = 10
    tls: ssl.SSLContext | None = None

    def parameters(self, name: str) -> ConnectionParameters:
        """pika's parameters; `name` is what the server's own tools show for the connection."""
        host, port = self.dial(self.host, self.port)
        return ConnectionParameters(
            host=host,
            port=port,
            virtual_host=self.vhost,
            credentials=PlainCredentials(self.username, self.password),
            heartbeat=self.heartbeat,
            socket_timeout=self.connect_timeout,
            stack_timeout=self.connect_timeout,
            ssl_options=None if self.tls is None else SSLOptions(self.tls, self.host),
            client_properties={"connection_name": name},
        )


class _Connection(AsyncioConnection):  # type: ignore[misc]
    """Puts right what pika 1.4.4 does while connecting and receiving."""

    def _process_frame(self, value: Any) -> None:
        """Pass on a message or a part of one; pika would look for callbacks by its name first, and there are none."""
        kind = type(value)
        if kind is Body or kind is Header or (kind is Method and type(value.method) is Basic.Deliver):
            self.frames_received += 1
            self._deliver_frame_to_channel(value)
        else:
            super()._process_frame(value)

    def _on_connection_workflow_done(self, result: Any) -> None:
        """Take the end of an attempt; for one given up in the handshake pika passes the error's class, and trips."""
        super()._on_connection_workflow_done(result() if isinstance(result, type) else result)


class Channel:
    """
    One AMQP channel.

    Attributes:
        raw: pika's channel.
        wire: Its connection.
        error: Why it ended; `None` while it stands.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.error: BaseException | None = None
        self._ended: list[Callable[[BaseException], None]] = []
        self._waiting: set[asyncio.Future[Any]] = set()
        self.raw: Any = None

    async def open(self) -> Channel:
        """Open it on its connection."""
        opened: asyncio.Future[Any] = self.wire.loop.create_future()
        self._waiting.add(opened)
        self.raw = self.wire.connection.channel(on_open_callback=lambda _: _finish(opened, None))
        self.raw.add_on_close_callback(self._closed)
        try:
            await opened
        finally:
            self._waiting.discard(opened)
        return self

    def on_end(self, told: Callable[[BaseException], None]) -> None:
        """Call `told` with the reason once the channel has ended, at once if it has."""
        if self.error is not None:
            told(self.error)
        else:
            self._ended.append(told)

    async def call(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """
        Make one of pika's calls that take a `callback`, and wait for the server's answer.

        Raises:
            pika's errors: The channel ended before the answer, or because of this call.
        """
        if self.error is not None:
            raise self.error
        answer: asyncio.Future[Any] = self.wire.loop.create_future()
        self._waiting.add(answer)
        try:
            method(*arguments, callback=lambda frame: _finish(answer, frame), **named)
            return await answer
        finally:
            self._waiting.discard(answer)

    async def cancel(self, tag: str) -> None:
        """Stop a consumer; what is on its way until the server agrees is still delivered."""

        def cancel(tag: str, callback: Callable[[Any], None]) -> None:
            self.raw.basic_cancel(tag, callback=callback)
            # pika 1.4.4 would reject what arrives meanwhile, which counts against those messages.
            self.raw._cancelled.discard(tag)

        await self.call(cancel, tag)

    async def catch_up(self) -> None:
        """Wait until the server has dealt with everything that was written on this channel."""
        # Answered after everything before it; every consumer sets its own prefetch.
        await self.call(self.raw.basic_qos, prefetch_count=1)

    async def close(self) -> None:
        """Close it in good order; nothing happens when it has ended."""
        if self.error is not None or self.raw is None:
            return
        ended: asyncio.Future[Any] = self.wire.loop.create_future()
        self.on_end(lambda _: _finish(ended, None))
        with suppress(ChannelWrongStateError):  # its end is on the way already
            self.raw.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await ended

    def _closed(self, _: Any, reason: BaseException) -> None:
        if self.error is not None:
            return
        self.error = reason
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(reason)
        ended, self._ended = self._ended, []
        for told in ended:
            told(reason)


class Wire:
    """
    One AMQP connection; made by `Wire.open`.

    Attributes:
        connection: pika's connection.
        error: Why it ended; `None` while it stands.
        blocked: What the server says while it takes no messages from this connection (memory or disk alarm), or `None`.
    """

    def __init__(self, place: Place) -> None:
        self.loop = asyncio.get_running_loop()
        self.error: BaseException | None = None
        self.blocked: str | None = None
        self.connection: Any = None
        self._heartbeat = place.heartbeat
        self._opened: asyncio.Future[None] = self.loop.create_future()
        self._ended: asyncio.Future[None] = self.loop.create_future()
        self._watch: asyncio.TimerHandle | None = None
        self._heard = 0.0
        self._bytes = 0
        self._dropped = False

    @classmethod
    async def open(cls, place: Place, name: str) -> Wire:
        """
        Connect and log in.

        Raises:
            pika's errors, OSError, TimeoutError: As it happened.

        Cancellation: Leaves nothing open.
        """
        wire = cls(place)
        wire.connection = _Connection(
            place.parameters(name),
            on_open_callback=wire._on_open,
            on_open_error_callback=wire._on_closed,
            on_close_callback=wire._on_closed,
            custom_ioloop=wire.loop,
        )
        try:
            async with asyncio.timeout(place.connect_timeout):
                await wire._opened
        except BaseException:
            with suppress(ConnectionWrongStateError):  # it ended by itself
                wire.connection.close()
            raise
        return wire

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        return self.error is None and not self._dropped and bool(self.connection.is_open)

    @property
    def properties(self) -> dict[str, Any]:
        """What the server said of itself."""
        return dict(self.connection.server_properties or {})

    async def channel(self) -> Channel:
        """Open a channel."""
        return await Channel(self).open()

    async def close(self) -> None:
        """Close it in good order, within a bounded time."""
        if self.error is not None:
            return
        with suppress(ConnectionWrongStateError):  # its end is on the way already
            self.connection.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.shield(self._ended)
        self.abort("closed")

    def abort(self, why: str) -> None:
        """Drop the connection without a word; for the server its client is gone, and everything unsettled returns."""
        self._terminate(AMQPConnectionError(why))

    def _terminate(self, reason: AMQPConnectionError) -> None:
        if not self._dropped:
            self._dropped = True
            # Not at once: pika may be telling our caller just now that the connection is lost.
            self.loop.call_soon(self._drop, reason)

    def _drop(self, reason: AMQPConnectionError) -> None:
        if self.error is None:
            # There is no public way: pika's own heartbeat checker calls this when its peer is silent.
            self.connection._terminate_stream(reason)

    def _on_open(self, connection: Any) -> None:
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        self._heard = self.loop.time()
        self._watch = self.loop.call_later(self._heartbeat / 4, self._check)
        _finish(self._opened, None)

    def _on_closed(self, _: Any, reason: BaseException | str) -> None:
        self.error = reason if isinstance(reason, BaseException) else AMQPConnectionError(reason)
        if self._watch is not None:
            self._watch.cancel()
        if not self._opened.done():
            self._opened.set_exception(self.error)
        _finish(self._ended, None)

    def _on_blocked(self, _: Any, frame: Any) -> None:
        self.blocked = str(frame.method.reason)

    def _on_unblocked(self, _: Any, __: Any) -> None:
        self.blocked = None

    def _check(self) -> None:
        """The timer: give up a peer that has been silent for too long."""
        now = self.loop.time()
        timer, self._watch = self._watch, self.loop.call_later(self._heartbeat / 4, self._check)
        received = self.connection.bytes_received
        late = timer is not None and now - timer.when() > self._heartbeat / 4
        if received != self._bytes or late:  # a late timer: it was this loop that stood still
            self._bytes = received
            self._heard = now
        elif now - self._heard >= self._heartbeat * (DEAD_AFTER_HEARTBEATS - 0.25):
            self._watch.cancel()
            self._terminate(AMQPHeartbeatTimeout(f"no answer for {now - self._heard:.1f} s"))


class Line:
    """
    A connection that is made when it is needed, and again when it was lost; one attempt at a time, shared.

    Args:
        place: Where to.
        name: For the server's own tools.
    """

    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self._name = name
        self._wire: Wire | None = None
        self._attempt: asyncio.Task[Wire] | None = None

    @property
    def blocked(self) -> str | None:
        """Why the server takes no messages just now."""
        return self._wire.blocked if self._wire is not None and self._wire.alive else None

    @property
    def now(self) -> Wire | None:
        """The connection, if it stands."""
        return self._wire if self._wire is not None and self._wire.alive else None

    async def wire(self) -> Wire:
        """
        The connection, made by one attempt if it does not stand.

        Raises:
            pika's errors, OSError, TimeoutError: The attempt failed.

        Cancellation: The attempt goes on for others.
        """
        if self._wire is not None and self._wire.alive:
            return self._wire
        if self._attempt is None:
            self._attempt = asyncio.create_task(Wire.open(self._place, self._name))
            self._attempt.add_done_callback(self._attempted)
        return await asyncio.shield(self._attempt)

    def _attempted(self, attempt: asyncio.Task[Wire]) -> None:
        self._attempt = None
        if not attempt.cancelled() and attempt.exception() is None:
            self._wire = attempt.result()

    async def close(self) -> None:
        """Close it."""
        attempt = self._attempt
        if attempt is not None:
            attempt.cancel()
            await asyncio.wait([attempt])
        if self._wire is not None:
            await self._wire.close()


def _finish(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)
