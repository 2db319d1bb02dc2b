"""Knows one connection through the proxy: what it carries, how it is harmed, and who ended it."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, get_args

Direction = Literal["up", "down"]
"""`up`: from the client to the broker."""
BOTH: tuple[Direction, ...] = get_args(Direction)

CHUNK = 64 * 1024
PACKET = 1400
"""Bytes that go over a thin wire at a time, so that connections share it fairly."""
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
        rate: Bytes a second and direction that all connections share; zero is as fast as it goes.
        free: By direction the time when the wire has carried everything that was promised to it.
        cut: After so many more bytes in a direction the connection is cut off.
    """

    hold: set[Direction] = field(default_factory=set)
    drop: set[Direction] = field(default_factory=set)
    latency: float = 0.0
    jitter: float = 0.0
    slice: bool = False
    rate: int = 0
    free: dict[Direction, float] = field(default_factory=dict)
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
            abort(self._broker)
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
                abort(writer) if abruptly else writer.close()

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
            rate = self.rules.rate
            step = 1 if self.rules.slice else min(len(data), PACKET) if rate else len(data)
            for start in range(0, len(data), step or 1):
                if rate:
                    await self._turn(direction, step / rate)
                if writer.transport.is_closing():
                    return
                writer.write(data[start : start + step])
                await writer.drain()
                if step == 1:
                    await asyncio.sleep(0)  # one byte a packet: the receiver's turn comes in between
            self.passed[direction] += len(data)
            self._moved.note()

    async def _turn(self, direction: Direction, seconds: float) -> None:
        """Wait until a thin wire has carried what it owes to all, and so many seconds of this one's."""
        now = asyncio.get_running_loop().time()
        free = self.rules.free[direction] = max(now, self.rules.free.get(direction, now)) + seconds
        await asyncio.sleep(free - now)

    def _cut(self, direction: Direction) -> None:
        # The broker must get what was sent before the cut, so its side ends in good order; the client sees a reset.
        del self.rules.cut[direction]
        self.ended = self.ended or "proxy"
        if self._client is not None:
            abort(self._client)
        self.end("proxy")


def abort(writer: asyncio.StreamWriter) -> None:
    """End one side at once with RST."""
    handle = writer.get_extra_info("socket")
    if handle is not None and handle.fileno() >= 0:
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
