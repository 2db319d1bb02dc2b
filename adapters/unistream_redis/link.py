"""Knows how to reach Redis: opens a `Wire` when one is needed, once per call that finds it gone, and runs scripts."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ResponseError

from unistream.driver.types import Connected, Disconnected, Event
from unistream_redis.errors import code_of, translate
from unistream_redis.scripts import Script
from unistream_redis.wire import Argument, Wire, pack

__all__ = ["Link", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a Redis is, and how to enter it."""

    label: str
    host: str
    port: int
    database: int
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None
    connect_timeout: float
    dead_peer_after: float
    dial: Callable[[str, int], tuple[str, int]]


class Link:
    """
    One connection that is opened anew when it is found gone; callers that find it so share one attempt.

    Args:
        place: Where to.
        what: What it is for, in events.
        emit: Takes events.
        scripts: To be known to the server whenever the connection stands.
    """

    def __init__(self, place: Place, what: str, emit: Callable[[Event], None], scripts: Sequence[Script] = ()) -> None:
        self._place = place
        self._what = what
        self._emit = emit
        self._scripts = scripts
        self._wire: Wire | None = None
        self._opening = asyncio.Lock()
        self._was_lost = False
        self.client_id = 0

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

    async def call(self, *arguments: Argument) -> Any:
        """One command and its reply; an error reply is raised as `ResponseError`."""
        wire = await self.wire()
        (reply,) = await wire.request([pack(arguments)], 1).future
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run a script and return what it returns."""
        try:
            return await self.call("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except ResponseError as error:
            if code_of(error) != "NOSCRIPT":
                raise
        # The server was restarted, or its scripts were flushed: the script surely did not run.
        return await self.call("EVAL", script.text, len(keys), *keys, *arguments)

    async def close(self) -> None:
        """Close, without any farewell to the server."""
        if self._wire is not None:
            self._wire.close()
            await asyncio.shield(self._wire.ended)

    async def _open(self) -> Wire:
        place = self._place
        wire: Wire | None = None
        opened = False
        with translate(f"connect to {place.label}"):
            try:
                async with asyncio.timeout(place.connect_timeout):
                    host, port = place.dial(place.host, place.port)
                    _, wire = await asyncio.get_running_loop().create_connection(
                        lambda: Wire(place.dead_peer_after, self._lost),
                        host,
                        port,
                        ssl=place.tls,
                        server_hostname=place.host if place.tls else None,
                    )
                    await self._enter(wire)
                opened = True
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {place.connect_timeout:g} s") from error
            finally:
                if wire is not None and not opened:
                    wire.close()
        if self._was_lost:
            self._was_lost = False
            self._emit(Connected(self._what))
        return wire

    async def _enter(self, wire: Wire) -> None:
        place = self._place
        commands: list[tuple[Argument, ...]] = []
        if place.password is not None:
            commands.append(("AUTH", *([place.username] if place.username else []), place.password))
        commands.append(("SELECT", place.database))
        commands.append(("CLIENT", "ID"))
        replies = await wire.request([pack(command) for command in commands], len(commands)).future
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise reply
        self.client_id = replies[-1]
        if not self._scripts:
            return
        (known,) = await wire.request([pack(("SCRIPT", "EXISTS", *(one.sha for one in self._scripts)))], 1).future
        if isinstance(known, ResponseError):  # LOADING: it takes connections before it has read its file
            raise known
        missing = [one for one, there in zip(self._scripts, known, strict=True) if not there]
        if missing:
            for reply in await wire.request(
                [pack(("SCRIPT", "LOAD", one.text)) for one in missing], len(missing)
            ).future:
                if isinstance(reply, ResponseError):
                    raise reply

    def _lost(self, reason: str | None) -> None:
        if reason is not None:
            self._was_lost = True
            self._emit(Disconnected(self._what, reason))
