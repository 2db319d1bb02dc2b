"""One connection to a NATS server: what is written goes out at once, or never; knows nothing of streams.

The client library buffers what is written while it is disconnected and sends it later, although its caller was told
that it failed; and it closes for good when a message is too large with its headers. Here nothing outlives the
connection that it was written to.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Protocol

__all__ = ["Call", "Gone", "Handler", "Refused", "Waiter", "Wire"]

Handler = Callable[[bytes, bytes, bytes, bytes], None]
"""Takes a message: subject, reply subject or `b""`, the block of headers or `b""`, body."""

_VIOLATION = re.compile(r'permissions violation for (?:publish|subscription) to "([^"]*)"', re.IGNORECASE)
_H, _M, _P, _I, _MINUS, _G = b"HMPI-G"


class Gone(Exception):  # noqa: N818 - never leaves the adapter; `translate` makes it BrokerUnavailableError
    """The connection is gone; nothing, or nobody knows what, of the request reached the server."""


class Refused(Exception):  # noqa: N818 - never leaves the adapter; `translate` makes it AccessError
    """The server refused the credentials, or the right to use a subject."""


class Waiter(Protocol):
    """Somebody who waits for replies."""

    def answer(self, number: int, head: bytes, body: bytes) -> None:
        """A reply came."""

    def fail(self, error: Exception) -> None:
        """The connection is gone: no reply will come."""

    def refuse(self, subject: str, error: Exception) -> None:
        """What was published to `subject`, if anything was, had not the right to."""


class Call:
    """One request; `future` is done with the headers and body of its reply."""

    __slots__ = ("_subject", "future")

    def __init__(self, subject: str, future: asyncio.Future[tuple[bytes, bytes]]) -> None:
        self._subject = subject
        self.future = future

    def answer(self, number: int, head: bytes, body: bytes) -> None:
        """See `Waiter`."""
        if not self.future.done():
            self.future.set_result((head, body))

    def fail(self, error: Exception) -> None:
        """See `Waiter`."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # marked as seen: its caller may have left

    def refuse(self, subject: str, error: Exception) -> None:
        """See `Waiter`."""
        if subject == self._subject:
            self.fail(error)


class Wire(asyncio.Protocol):
    """
    The connection itself; made by `Link`.

    Args:
        patience: Seconds without a byte after which the connection counts as dead; a PING asks for one before.
        lost: Called once when it ends, with the reason, or `None` if `close` ended it.

    Attributes:
        info: What the server said of itself.
        greeted: Done when `info` is there.
        inbox: Subject of replies, without their number.
    """

    def __init__(self, patience: float, lost: Callable[[str | None], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience = patience
        self._lost = lost
        self.info: dict[str, Any] = {}
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        self.inbox = f"_INBOX.{secrets.token_hex(11)}."
        self._inbox_size = len(self.inbox)
        self.transport: asyncio.Transport | None = None
        self._chunks: list[bytes] = []
        self._have = 0
        self._need = 0
        self._handlers: dict[bytes, Handler] = {}
        self._sid = 0
        self._replies: dict[int, Waiter] = {}
        self._number = 0
        self._pongs: list[asyncio.Future[None]] = []
        self._heard = self._loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False
        self._reason: str | None = None

    @property
    def usable(self) -> bool:
        """Whether something can be written."""
        # A transport whose peer has gone may not be written to: asyncio before 3.13.1 would watch its old descriptor.
        return self.transport is not None and not self._closing and not self.transport.is_closing()

    # Out

    def write(self, data: Iterable[bytes]) -> None:
        """
        Write protocol lines.

        Raises:
            Gone: The connection is gone; nothing was written.
        """
        if self.transport is None or not self.usable:
            raise Gone(self._reason or "the connection is closed")
        self.transport.writelines(data)

    def expect(self, waiter: Waiter, count: int = 1) -> int:
        """Numbers, from the one returned on, that `count` replies will carry behind `inbox`."""
        first = self._number
        self._number += count
        for number in range(first, self._number):
            self._replies[number] = waiter
        return first

    def expect_none(self) -> int:
        """A number for a reply that nobody waits for."""
        self._number += 1
        return self._number - 1

    def forget(self, first: int, count: int = 1) -> None:
        """Nobody waits for these replies any more."""
        for number in range(first, first + count):
            self._replies.pop(number, None)

    def request(self, subject: str, body: bytes = b"") -> tuple[int, Call]:
        """Publish a request; its number, to `forget` it by, and what waits for the reply."""
        call = Call(subject, self._loop.create_future())
        number = self.expect(call)
        try:
            self.write(
                (b"PUB %b %b%d %d\r\n" % (subject.encode(), self.inbox.encode(), number, len(body)), body, b"\r\n")
            )
        except Gone:
            self.forget(number)
            raise
        return number, call

    def subscribe(self, subject: str, handler: Handler) -> int:
        """Let messages to `subject` go to `handler`; the number of the subscription."""
        self._sid += 1
        self.write((b"SUB %b %d\r\n" % (subject.encode(), self._sid),))
        self._handlers[b"%d" % self._sid] = handler
        return self._sid

    def unsubscribe(self, sid: int) -> None:
        """End a subscription; what is on its way is dropped."""
        self._handlers.pop(b"%d" % sid, None)
        if self.usable:
            self.write((b"UNSUB %d\r\n" % sid,))

    async def flush(self) -> None:
        """Wait until the server has taken everything written, and we what it had written by then."""
        pong = self._loop.create_future()
        self.write((b"PING\r\n",))
        self._pongs.append(pong)
        await pong

    def start(self) -> None:
        """The handshake is over: listen for replies, and watch the line."""
        self.subscribe(f"{self.inbox}*", self._reply)
        self._heard = self._loop.time()
        self._watch = self._loop.call_later(self._patience / 4, self._check)

    def close(self) -> None:
        """Close without waiting; what was written before still goes out."""
        if self.transport is not None and not self._closing:
            self._closing = True
            self.transport.close()

    def abort(self, reason: str) -> None:
        """Close as broken."""
        if self.transport is not None and not self._closing:
            self._reason = reason
            self._closing = True
            self.transport.abort()

    def _check(self) -> None:
        self._watch = None
        quiet = self._loop.time() - self._heard
        if quiet >= self._patience * 0.74:
            self.abort(f"no answer for {quiet:.1f} s")
        elif self.usable:
            if quiet >= self._patience * 0.24:
                self.write((b"PING\r\n",))
                self._pongs.append(self._loop.create_future())
            self._watch = self._loop.call_later(self._patience / 4, self._check)

    # In

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is outstanding."""
        self.transport = None
        if self._watch is not None:
            self._watch.cancel()
        asked = self._closing and self._reason is None
        self._reason = self._reason or (str(exc) if exc else None) or "the connection was closed"
        self._closing = True
        error = Gone(self._reason)
        for waiter in dict.fromkeys(self._replies.values()):
            waiter.fail(error)
        self._replies.clear()
        for future in (self.greeted, *self._pongs):
            if not future.done():
                future.set_exception(error)
                future.exception()
        self._handlers.clear()
        self._lost(None if asked else self._reason)

    def data_received(self, data: bytes) -> None:
        """Take protocol lines apart."""
        self._heard = self._loop.time()
        if self._chunks:
            # A message larger than one read: joined once it is all there.
            self._chunks.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._chunks)
            self._chunks = []
        try:
            rest = self._parse(data)
        except (ValueError, IndexError, KeyError) as error:
            self.abort(f"not the NATS protocol: {error!r}")
            return
        if rest < len(data):
            self._chunks = [data[rest:] if rest else data]
            self._have = len(data) - rest

    def _parse(self, data: bytes) -> int:
        """Handle all that is complete; where the rest begins, of which `_need` bytes are wanted."""
        at = 0
        size = len(data)
        find = data.find
        handlers = self._handlers
        while at < size:
            end = find(b"\r\n", at)
            if end < 0:
                self._need = 0
                return at
            kind = data[at]
            if kind in (_M, _H):
                words = data[at:end].split()
                begin = end + 2
                stop = begin + int(words[-1])
                if stop + 2 > size:
                    self._need = stop + 2 - at
                    return at
                handler = handlers.get(words[2])
                if handler is not None:
                    if kind == _M:
                        handler(words[1], words[3] if len(words) == 5 else b"", b"", data[begin:stop])
                    else:
                        body = begin + int(words[-2])
                        handler(words[1], words[3] if len(words) == 6 else b"", data[begin:body], data[body:stop])
                at = stop + 2
                continue
            self._control(kind, data[at:end])
            at = end + 2
        return at

    def _control(self, kind: int, line: bytes) -> None:
        if kind == _P and line[:4].upper() == b"PING":
            if self.usable:
                self.write((b"PONG\r\n",))
        elif kind == _P:
            if self._pongs and not (pong := self._pongs.pop(0)).done():
                pong.set_result(None)
        elif kind == _I:
            self.info = json.loads(line[4:])
            if not self.greeted.done():
                self.greeted.set_result(None)
        elif kind == _MINUS:
            self._error(line[4:].strip().strip(b"'").decode("utf-8", "replace"))
        elif line[:1] not in (b"+", b""):
            raise ValueError(line[:20])

    def _error(self, text: str) -> None:
        violation = _VIOLATION.search(text)
        if violation:
            # The connection stands; whoever published there gets no reply.
            for waiter in dict.fromkeys(self._replies.values()):
                waiter.refuse(violation[1], Refused(text))
            return
        if "auth" in text.lower():
            for future in (self.greeted, *self._pongs):
                if not future.done():
                    future.set_exception(Refused(text))
                    future.exception()
        self.abort(text)

    def _reply(self, subject: bytes, reply: bytes, head: bytes, body: bytes) -> None:
        number = int(subject[self._inbox_size :])
        waiter = self._replies.pop(number, None)
        if waiter is not None:
            waiter.answer(number, head, body)
