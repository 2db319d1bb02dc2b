"""Knows how to stand between a client and its broker on the wire, and to be a bad wire there.

A proxy is what a driver's `dial` answers with: every address that the driver wants, also an advertised one, is given a
link of its own, opened on demand. It counts what it carries, so that a case can prove that traffic went through it. It
knows no protocol.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator
from types import TracebackType
from typing import Self

from unistream.conformance.connection import BOTH, CHUNK, Connection, Direction, Rules, Signal, abort
from unistream.driver.contract import Driver


class Proxy:
    """
    A wire between one client and its broker. An async context manager.

    Faults hold for every connection, those to come included; a single one is harmed through `connections`.

    Attributes:
        connections: Every connection that was ever made, in order.
        tries: How many times a client knocked while the proxy turned everybody away.
        faults: How many faults were switched on.
        moved: Tells of every change: bytes carried or lost, connections made or ended.
    """

    def __init__(self) -> None:
        self.rules = Rules()
        self.moved = Signal()
        self.connections: list[Connection] = []
        self.tries: list[float] = []
        self.faults = 0
        self._slamming = False
        self._refusing = False
        self._links: dict[tuple[str, int], _Link] = {}
        self._lock = threading.Lock()
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in self._links.values():
            link.close()
        self._refusing = False
        for connection in self.live:
            connection.end("proxy")
        self.heal()
        if self._carrying:
            await asyncio.wait(set(self._carrying))

    def dial(self, host: str, port: int) -> tuple[str, int]:
        """Return where to go instead; from any thread, at once."""
        with self._lock:
            link = self._links.get((host, port))
            if link is None:
                link = self._links[host, port] = _Link((host, port), self._arrived)
                if not self._refusing:
                    link.listen()
                    self._loop.call_soon_threadsafe(link.serve)
        return link.place

    @property
    def live(self) -> Iterator[Connection]:
        """The connections that stand."""
        return (each for each in self.connections if each.ended is None)

    @property
    def carried(self) -> int:
        """Bytes that went through, both ways."""
        return sum(sum(each.passed.values()) for each in self.connections)

    @property
    def lost(self) -> int:
        """Bytes that vanished."""
        return sum(sum(each.lost.values()) for each in self.connections)

    @property
    def broken(self) -> int:
        """Connections that the proxy ended."""
        return sum(each.ended == "proxy" for each in self.connections)

    def more_lost(self) -> Awaitable[None]:
        """Return what waits until more bytes have vanished than at the time of this call."""
        before = self.lost
        return self.moved.until(lambda: self.lost > before)

    def more_broken(self) -> Awaitable[None]:
        """Return what waits until more connections are broken than at the time of this call."""
        before = self.broken
        return self.moved.until(lambda: self.broken > before)

    # Faults

    def hold(self, *directions: Direction) -> None:
        """Let nothing move and nothing end, both ways unless told; `heal` lets it go on."""
        self._change(lambda: self.rules.hold.update(directions or BOTH))

    def drop(self, *directions: Direction) -> None:
        """Let bytes vanish, both ways unless told."""
        self._change(lambda: self.rules.drop.update(directions or BOTH))

    def delay(self, latency: float, jitter: float = 0.0) -> None:
        """Let every byte take its time."""
        self.rules.latency, self.rules.jitter = latency, jitter
        self._change(lambda: None)

    def slice(self) -> None:
        """Hand on byte by byte."""
        self.rules.slice = True
        self._change(lambda: None)

    def thin(self, rate: int) -> None:
        """Carry so many bytes a second in each direction, all connections together."""
        self.rules.rate = rate
        self._change(lambda: None)

    def cut_after(self, count: int, direction: Direction) -> None:
        """Cut the first connection that has carried `count` more bytes in a direction, between two bytes."""
        self._change(lambda: self.rules.cut.update({direction: count}))

    def reset(self, connections: Collection[Connection] | None = None) -> int:
        """Reset what stands, or those given; return how many."""
        chosen = list(self.live if connections is None else connections)
        for each in chosen:
            each.reset()
        self.faults += 1
        return len(chosen)

    def strand(self) -> int:
        """Leave what stands half open; connections to come are not touched. Return how many."""
        chosen = list(self.live)
        for each in chosen:
            each.strand()
        self.faults += 1
        return len(chosen)

    def refuse(self) -> None:
        """Listen no more: who knocks is refused by the machine itself. What stands goes on."""
        self._refusing = True
        for link in self._links.values():
            link.shut()
        self.faults += 1

    def slam(self) -> None:
        """Accept and reset at once whoever comes, and note when; what stands is reset."""
        self._slamming = True
        self.reset()

    def heal(self) -> None:
        """End every fault; connections that lost bytes are reset."""
        self.rules.hold.clear()
        self.rules.drop.clear()
        self.rules.cut.clear()
        self.rules.latency = self.rules.jitter = 0.0
        self.rules.slice = self._slamming = False
        self.rules.rate = 0
        self.rules.changed.note()
        for each in list(self.live):
            if sum(each.lost.values()):
                each.reset()
        if self._refusing:
            self._refusing = False
            for link in self._links.values():
                link.listen()
                link.serve()

    def _change(self, change: Callable[[], None]) -> None:
        change()
        self.faults += 1
        self.rules.changed.note()

    async def _arrived(
        self, address: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        if self._slamming:
            self.tries.append(self._loop.time())
            self.moved.note()
            abort(writer)
            return
        connection = Connection(address, self.rules, self.moved)
        self.connections.append(connection)
        self.moved.note()
        await connection.carry(reader, writer)


Arrived = Callable[[tuple[str, int], asyncio.StreamReader, asyncio.StreamWriter], object]


class _Link:
    """One address of the broker and the place on this machine that stands for it."""

    def __init__(self, address: tuple[str, int], arrived: Arrived) -> None:
        self._address = address
        self._arrived = arrived
        self._socket: socket.socket | None = None
        self._server: asyncio.Task[asyncio.Server] | None = None
        # The place is held, without listening, for as long as this lives: nobody else gets it in a time of refusal.
        self._holder = _bound(("127.0.0.1", 0))
        self.place: tuple[str, int] = self._holder.getsockname()

    def listen(self) -> None:
        """Take knocks from now on; they wait in the machine's queue until `serve`."""
        self._socket = _bound(self.place)
        self._socket.listen(128)
        self._socket.setblocking(False)

    def serve(self) -> None:
        """Answer knocks; on the proxy's loop."""
        handle = self._socket

        async def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._arrived(self._address, reader, writer)  # type: ignore[misc]

        self._server = asyncio.ensure_future(asyncio.start_server(arrived, sock=handle, limit=CHUNK))

    def shut(self) -> None:
        """Listen no more."""
        server, self._server = self._server, None
        if server is not None:
            if server.done():
                server.result().close()
            else:
                server.add_done_callback(lambda done: done.result().close())
        elif self._socket is not None:
            self._socket.close()
        self._socket = None

    def close(self) -> None:
        """Let go of the place."""
        self.shut()
        self._holder.close()


def _bound(place: tuple[str, int]) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(place)
    return made


def via(driver: type[Driver], proxy: Proxy) -> type[Driver]:
    """Return `driver` with every one of its connections through the proxy."""

    def dial(self: Driver, host: str, port: int) -> tuple[str, int]:
        return proxy.dial(host, port)

    return type(f"{driver.__name__}ViaProxy", (driver,), {"dial": dial})
