"""Knows how to reach NATS: opens a `Wire` when one is needed, once per call that finds it gone, and asks JetStream."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unistream.driver.types import Connected, Disconnected, Event
from unistream_nats.errors import ApiError, NoResponder, translate
from unistream_nats.wire import Gone, Wire

__all__ = ["Link", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where NATS servers are, and how to enter them."""

    label: str
    hosts: Sequence[tuple[str, int]]
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None
    domain: str | None
    connect_timeout: float
    dead_peer_after: float
    dial: Callable[[str, int], tuple[str, int]]

    @property
    def api(self) -> str:
        """In front of the subjects of JetStream's API."""
        return f"$JS.{self.domain}.API." if self.domain else "$JS.API."


class Link:
    """
    One connection that is opened anew when it is found gone; callers that find it so share one attempt.

    Attributes:
        watchers: Called when the connection is lost.
    """

    def __init__(self, place: Place, what: str, emit: Callable[[Event], None]) -> None:
        self.place = place
        self._what = what
        self._emit = emit
        self._wire: Wire | None = None
        self._opening = asyncio.Lock()
        self._was_lost = False
        self._closed = False
        self._last_host = -1
        self.watchers: set[Callable[[], None]] = set()

    @property
    def current(self) -> Wire | None:
        """The connection, if it stands."""
        return self._wire if self._wire is not None and self._wire.usable else None

    async def wire(self) -> Wire:
        """
        The connection, opened if need be.

        Raises:
            AccessError, BrokerUnavailableError: It can't be opened, or not within `connect_timeout`.
        """
        if self._wire is not None and self._wire.usable:
            return self._wire
        async with self._opening:
            if self._wire is None or not self._wire.usable:
                self._wire = await self._open()
            return self._wire

    async def request(self, subject: str, body: bytes = b"", timeout: float | None = None) -> tuple[bytes, bytes]:
        """
        One request and the headers and body of its reply.

        Args:
            timeout: Seconds; by default those after which the server counts as dead.

        Raises:
            NoResponder: Nobody listens there.
            Gone, TimeoutError: The connection was lost, or no answer came; it may have been done.
        """
        wire = await self.wire()
        number, call = wire.request(subject, body)
        try:
            async with asyncio.timeout(self.place.dead_peer_after if timeout is None else timeout):
                head, answer = await call.future
        except TimeoutError as error:
            raise TimeoutError(f"no answer to {subject}") from error
        finally:
            wire.forget(number)
        if head.startswith(b"NATS/1.0 503"):
            raise NoResponder(subject)
        return head, answer

    async def api(
        self, verb: str, asked: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """
        One request to JetStream's API.

        Raises:
            ApiError: JetStream refused.
            NoResponder: There is no JetStream.
        """
        body = json.dumps(asked).encode() if asked else b""
        _, answer = await self.request(self.place.api + verb, body, timeout)
        told: dict[str, Any] = json.loads(answer)
        if "error" in told:
            raise ApiError(told["error"])
        return told

    async def flush(self) -> None:
        """Wait until the server has taken what was written, if the connection stands."""
        wire = self.current
        if wire is not None:
            async with asyncio.timeout(self.place.dead_peer_after):
                await wire.flush()

    def close(self) -> None:
        """Close without waiting."""
        self._closed = True
        if self._wire is not None:
            self._wire.close()

    async def _open(self) -> Wire:
        place = self.place
        with translate(f"connect to {place.label}"):
            if self._closed:
                raise Gone("the link is closed")
            try:
                async with asyncio.timeout(place.connect_timeout):
                    wire = await self._open_any()
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {place.connect_timeout:g} s") from error
        if self._was_lost:
            self._was_lost = False
            self._emit(Connected(self._what))
        return wire

    async def _open_any(self) -> Wire:
        """Connect to the first server that answers, beginning behind the one that was lost."""
        count = len(self.place.hosts)
        for turn in range(1, count + 1):
            at = (self._last_host + turn) % count
            try:
                wire = await self._enter(*self.place.hosts[at])
            except (OSError, Gone):
                if turn == count:
                    raise
            else:
                self._last_host = at
                return wire
        raise Gone("no server")

    async def _enter(self, host: str, port: int) -> Wire:
        place = self.place
        loop = asyncio.get_running_loop()
        to_host, to_port = place.dial(host, port)
        _, wire = await loop.create_connection(lambda: Wire(place.dead_peer_after, self._lost), to_host, to_port)
        entered = False
        try:
            await wire.greeted
            if place.tls is not None or wire.info.get("tls_required"):
                await self._start_tls(wire, host)
            wire.write((b"CONNECT " + json.dumps(self._credentials()).encode() + b"\r\n",))
            await wire.flush()
            wire.start()
            entered = True
        finally:
            if not entered:
                wire.close()
        return wire

    async def _start_tls(self, wire: Wire, host: str) -> None:
        assert wire.transport is not None
        context = self.place.tls or ssl.create_default_context()
        transport = await asyncio.get_running_loop().start_tls(wire.transport, wire, context, server_hostname=host)
        if transport is None:
            raise Gone("the connection was closed while TLS began")
        wire.transport = transport

    def _credentials(self) -> dict[str, Any]:
        place = self.place
        said: dict[str, Any] = {
            "verbose": False,
            "pedantic": False,
            "lang": "python3",
            "version": "1",
            "protocol": 1,
            "headers": True,
            "no_responders": True,
            "name": self._what,
        }
        if place.password is not None:
            said |= {"user": place.username or "", "pass": place.password}
        elif place.username is not None:
            said["auth_token"] = place.username
        return said

    def _lost(self, reason: str | None) -> None:
        if reason is not None and not self._closed:
            self._was_lost = True
            self._emit(Disconnected(self._what, reason))
            for watcher in list(self.watchers):
                watcher()
