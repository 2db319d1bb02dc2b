"""One connection to Redis: commands go out at once, replies come back in order; knows nothing of streams.

redis-py's own connection serves one command at a time and must be dropped when its caller is cancelled. Here any
number of requests is outstanding, and the replies of one whose caller was cancelled are read and dropped.
The protocol is pinned to RESP2; hiredis packs and parses.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

__all__ = ["Request", "Wire", "pack"]

Argument = str | bytes | int
_NOTHING = object()


pack = cast("Callable[[tuple[Argument, ...]], bytes]", hiredis.pack_command)
"""One command as it goes over the wire."""


class Request:
    """
    Some commands written in one go.

    Attributes:
        wanted: How many replies it takes.
        replies: Those that came; error replies are `ResponseError` objects.
        future: Done with `replies` when all are there, or with `RedisConnectionError`: what has no reply then may have
            happened. With `TimeoutError` when they are not there in time; they are read and dropped.
        patience: Seconds without a byte that it allows.
        until: When they have to be there, by the loop's clock.
    """

    __slots__ = ("future", "patience", "replies", "until", "wanted")

    def __init__(self, wanted: int, patience: float, until: float, future: asyncio.Future[list[Any]]) -> None:
        self.wanted = wanted
        self.replies: list[Any] = []
        self.patience = patience
        self.until = until
        self.future = future


class Wire(asyncio.Protocol):
    """
    The connection itself; made by `Link`.

    Attributes:
        ended: Done when the socket is closed.

    Args:
        patience: Seconds without a byte, while replies are due, after which the connection counts as dead.
        lost: Called once when it ends, with the reason, or `None` if `close` ended it.
    """

    def __init__(self, patience: float, lost: Callable[[str | None], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience = patience
        self._lost = lost
        self._reader = hiredis.Reader(
            protocolError=RedisConnectionError, replyError=ResponseError, notEnoughData=_NOTHING
        )
        self._transport: asyncio.Transport | None = None
        self._pending: deque[Request] = deque()
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False
        self._reason: str | None = None
        self.ended = self._loop.create_future()

    @property
    def usable(self) -> bool:
        """Whether a request can be written."""
        # A transport whose peer has gone may not be written to: asyncio before 3.13.1 would watch its old descriptor.
        return self._transport is not None and not self._closing and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def request(self, payload: Iterable[bytes], wanted: int, wait: float = 0.0, until: float = math.inf) -> Request:
        """
        Write commands; their replies arrive in `Request.future`.

        Args:
            payload: The packed commands.
            wanted: How many there are.
            wait: Seconds for which the server itself may hold the answer back.
            until: When the answer has to be there, by the loop's clock.

        Raises:
            RedisConnectionError: The connection is gone; nothing was written.
        """
        if self._transport is None or not self.usable:
            raise RedisConnectionError("the connection is closed")
        request = Request(wanted, self._patience + wait, until, self._loop.create_future())
        if not self._pending:
            self._heard = self._loop.time()
        self._pending.append(request)
        self._transport.writelines(payload)
        if self._watch is None:
            self._watch = self._loop.call_at(min(self._heard + request.patience, until), self._check)
        elif until < self._watch.when():
            self._watch.cancel()
            self._watch = self._loop.call_at(until, self._check)
        return request

    def data_received(self, data: bytes) -> None:
        """Hand replies to their requests."""
        self._heard = self._loop.time()
        self._reader.feed(data)
        pending = self._pending
        gets = self._reader.gets
        try:
            while pending:
                head = pending[0]
                replies = head.replies
                missing = head.wanted - len(replies)
                while missing:
                    reply = gets()
                    if reply is _NOTHING:
                        return
                    replies.append(reply)
                    missing -= 1
                pending.popleft()
                if not head.future.done():
                    head.future.set_result(replies)
        except RedisConnectionError as error:
            self._abort(f"not the Redis protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is outstanding."""
        self._transport = None
        if self._watch is not None:
            self._watch.cancel()
        reason = self._reason or (str(exc) if exc else None) or "the server closed the connection"
        asked = self._closing and self._reason is None
        self._closing = True
        while self._pending:
            future = self._pending.popleft().future
            if not future.done():
                future.set_exception(RedisConnectionError(reason))
                future.exception()  # marked as seen: its caller may have left
        self._lost(None if asked else reason)
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Close without waiting; what is outstanding fails."""
        if self._transport is not None and not self._closing:
            self._closing = True
            self._transport.abort()

    def _abort(self, reason: str) -> None:
        if self._transport is not None and not self._closing:
            self._reason = reason
            self._closing = True
            self._transport.abort()

    def _check(self) -> None:
        """The timer of all requests: whether the connection is dead, and what is late."""
        self._watch = None
        if not self._pending:
            return
        now = self._loop.time()
        patience = self._pending[0].patience
        quiet = now - self._heard
        if quiet >= patience:
            self._abort(f"no answer for {quiet:.1f} s")
            return
        soonest = self._heard + patience
        for request in self._pending:
            if request.until > now:
                soonest = min(soonest, request.until)
            elif not request.future.done():
                request.future.set_exception(TimeoutError())
                request.future.exception()  # marked as seen: its caller may have left
        self._watch = self._loop.call_at(soonest, self._check)
