"""Knows how to stand between a client and its broker on the wire, and to be a bad wire there.

A proxy is what a driver's `dial` answers with: every address that the driver wants, also an advertised one, is given a
link of its own, opened on demand. It counts what it carries, so that a case can prove that traffic went through it. It
knows no protocol.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, get_args

from unistream.driver.contract import Driver

Direction = Literal["up", "down"]
"""`up`: from the client to the broker."""
BOTH: tuple[Direction, ...] = get_args(Direction)

CHUNK = 64 * 1024
QUEUE = 64
"""Chunks that may wait for their time in one direction; then the sender feels it, as on a real wire."""


class Signal:
    """Wakes those who wait for something to become true."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def note(self) -> None:
        """Something changed."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it is true."""
        while not holds():
            await self._event.wait()


@dataclass(slots=True)
class Rules:
    """
    What a connection does with its bytes. Changes take effect at once, also for bytes that wait.

    Attributes:
        hold: Directions in which nothing moves and nothing ends; what waits goes on afterwards.
        drop: Directions in which bytes vanish. What follows would make no sense, so `heal` resets such a connection.
        latency: Seconds that every byte takes.
        jitter: So many seconds more or less, drawn for every chunk; the order stays.
        slice: Bytes go on one by one.
        cut: After so many more bytes in a direction the connection is cut off.
    """

    hold: set[Direction] = field(default_factory=set)
    drop: set[Direction] = field(default_factory=set)
    latency: float = 0.0
    jitter: float = 0.0
    slice: bool = False
    cut: dict[Direction, int] = field(default_factory=dict)
    changed: Signal = field(default_factory=Signal)

    async def released(self, direction: Direction) -> None:
        """Wait until the direction is not held."""
        await self.changed.until(lambda: direction not in self.hold)


class Connection:
    """
    One connection through the proxy.

    Attributes:
        address: Where the client wanted to go.
        passed: Bytes that were handed on, by direction.
        lost: Bytes that vanished.
        ended: Who ended it: `client`, `broker` or `proxy`; None while it stands.
    """

    def __init__(self, address: tuple[str, int], rules: Rules, moved: Signal) -> None:
        self.address = address
        self.rules = rules
        self._moved = moved
        self.passed: dict[Direction, int] = {"up": 0, "down": 0}
        self.lost: dict[Direction, int] = {"up": 0, "down": 0}
        self.ended: str | None = None
        self.over = asyncio.Event()
        self._dice = random.Random(address[1])
        self._client: asyncio.StreamWriter | None = None
        self._broker: asyncio.StreamWriter | None = None

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes both ways until one side ends it, or the proxy does."""
        self._client = writer
        try:
            upstream, self._broker = await asyncio.open_connection(*self.address)
        except OSError:
            self.end("broker")
            return
        if self.ended is not None:  # reset while connecting
            _reset(self._broker)
            return
        for each in (self._client, self._broker):
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pumps = [
            asyncio.create_task(self._pump("up", reader, self._broker)),
            asyncio.create_task(self._pump("down", upstream, self._client)),
            asyncio.create_task(self.over.wait()),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            self.end("proxy")

    def strand(self) -> None:
        """Let nothing pass any more, without a word to either side: a half-open connection."""
        self.rules = Rules(hold=set(BOTH))

    def reset(self) -> None:
        """End it at once with RST on both sides."""
        if self.ended is None:
            self.end("proxy", abruptly=True)

    def end(self, by: str, *, abruptly: bool = False) -> None:
        """Close both sides; the first one to end it is remembered."""
        if self.ended is None:
            self.ended = by
            self._moved.note()
        self.over.set()
        for writer in (self._client, self._broker):
            if writer is not None:
                _reset(writer) if abruptly else writer.close()

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE)
        sending = asyncio.create_task(self._send(direction, queue, writer))
        loop = asyncio.get_running_loop()
        try:
            data = b" "
            while data:
                try:
                    data = await reader.read(CHUNK)
                except OSError:
                    data = b""
                rules = self.rules
                if direction in rules.drop:
                    self.lost[direction] += len(data)
                    self._moved.note()
                    if data:
                        continue
                delay = rules.latency and max(0.0, rules.latency + self._dice.uniform(-rules.jitter, rules.jitter))
                await queue.put((loop.time() + delay, data))
            await sending
        finally:
            sending.cancel()

    async def _send(
        self, direction: Direction, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self.rules.released(direction)
            if not data:
                self.end("client" if direction == "up" else "broker")
                return
            left = self.rules.cut.get(direction)
            if left is not None and left <= len(data):
                await self._write(direction, data[:left], writer)
                self._cut(direction)
                return
            if left is not None:
                self.rules.cut[direction] = left - len(data)
            await self._write(direction, data, writer)

    async def _write(self, direction: Direction, data: bytes, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # the other side is gone; its own pump sees the end
            step = 1 if self.rules.slice else len(data) or 1
            for start in range(0, len(data), step):
                if writer.transport.is_closing():
                    return
                writer.write(data[start : start + step])
                await writer.drain()
                if step == 1:
                    await asyncio.sleep(0)  # one byte a packet: the receiver's turn comes in between
            self.passed[direction] += len(data)
            self._moved.note()

    def _cut(self, direction: Direction) -> None:
        # The broker must get what was sent before the cut, so its side ends in good order; the client sees a reset.
        del self.rules.cut[direction]
        self.ended = self.ended or "proxy"
        if self._client is not None:
            _reset(self._client)
        self.end("proxy")


def _reset(writer: asyncio.StreamWriter) -> None:
    handle = writer.get_extra_info("socket")
    if handle is not None and handle.fileno() >= 0:
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


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
            link.shut()
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
            _reset(writer)
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
        # A place is chosen now and kept, so that it is the same before and after a time of refusal.
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.place: tuple[str, int] = chosen.getsockname()

    def listen(self) -> None:
        """Take knocks from now on; they wait in the machine's queue until `serve`."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(self.place)
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


def via(driver: type[Driver], proxy: Proxy) -> type[Driver]:
    """Return `driver` with every one of its connections through the proxy."""

    def dial(self: Driver, host: str, port: int) -> tuple[str, int]:
        return proxy.dial(host, port)

    return type(f"{driver.__name__}ViaProxy", (driver,), {"dial": dial})
