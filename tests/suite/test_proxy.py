"""The proxy is the wire that it says it is: every fault is felt, nothing is felt without one, and bytes are counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from unistream.conformance.proxy import Proxy

LIMIT = 10.0
QUIET = 0.2
"""Seconds for which nothing must come; always paid in full."""


class Peer:
    """A server that answers every line with itself in capitals, and the wire to it."""

    def __init__(self, proxy: Proxy, port: int) -> None:
        self.proxy = proxy
        self.port = port
        self.heard: list[bytes] = []
        self.over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer until the other side goes; the last piece may be a torn line."""
        try:
            while line := await reader.readline():
                self.heard.append(line)
                writer.write(line.upper())
                await writer.drain()
        except ConnectionError:
            self.heard.append(b"<reset>")
        finally:
            self.over.set()
            writer.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect through the proxy."""
        return await asyncio.open_connection(*self.proxy.dial("127.0.0.1", self.port))


@asynccontextmanager
async def peer() -> AsyncIterator[Peer]:
    """A server behind a proxy."""
    async with Proxy() as proxy:
        it = Peer(proxy, 0)
        server = await asyncio.start_server(it.serve, "127.0.0.1", 0)
        it.port = server.sockets[0].getsockname()[1]
        yield it
        server.close()


def run(test: Callable[[Peer], Awaitable[None]]) -> None:
    """Run a test with a peer, to its end or its limit."""

    async def main() -> None:
        async with asyncio.timeout(LIMIT), peer() as it:
            await test(it)

    asyncio.run(main())


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes) -> bytes:
    """Send a line and return the answer."""
    writer.write(line)
    return await reader.readline()


def test_a_healthy_wire_carries_and_counts() -> None:
    """Bytes arrive as they are, and are counted in both directions."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        assert await ask(reader, writer, b"hello\n") == b"HELLO\n"
        (connection,) = it.proxy.connections
        assert connection.passed == {"up": 6, "down": 6}
        assert it.proxy.carried == 12
        writer.close()
        await connection.over.wait()
        assert connection.ended == "client"

    run(test)


def test_every_address_has_a_link_of_its_own_on_demand() -> None:
    """The same address gives the same place, another address another one, at once and also from a thread."""

    async def test(it: Peer) -> None:
        first = it.proxy.dial("127.0.0.1", it.port)
        assert await asyncio.to_thread(it.proxy.dial, "127.0.0.1", it.port) == first
        assert await asyncio.to_thread(it.proxy.dial, "localhost", it.port) != first
        reader, writer = await asyncio.open_connection(*it.proxy.dial("localhost", it.port))
        assert await ask(reader, writer, b"x\n") == b"X\n"
        writer.close()

    run(test)


def test_held_bytes_arrive_after_healing() -> None:
    """A held wire ends nothing and loses nothing."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        it.proxy.hold()
        answer = asyncio.create_task(ask(reader, writer, b"hello\n"))
        done, _ = await asyncio.wait({answer}, timeout=QUIET)
        assert not done
        assert it.heard == []
        it.proxy.heal()
        assert await answer == b"HELLO\n"
        writer.close()

    run(test)


def test_a_dropped_reply_is_gone_although_the_request_arrived() -> None:
    """One direction can be lost alone; healing resets what is torn."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        it.proxy.drop("down")
        answer = asyncio.create_task(ask(reader, writer, b"hello\n"))
        await it.proxy.moved.until(lambda: it.proxy.lost == 6)
        assert it.heard == [b"hello\n"]
        it.proxy.heal()
        with pytest.raises(ConnectionResetError):
            await answer
        writer.close()

    run(test)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_cut_request_arrives_in_part(count: int) -> None:
    """The broker gets exactly so many bytes, the client a reset."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        it.proxy.cut_after(count, "up")
        with pytest.raises(ConnectionResetError):
            await ask(reader, writer, b"hello\n")
        writer.close()
        await it.over.wait()
        assert it.heard == ([b"hello"[:count]] if count else [])
        assert it.proxy.connections[0].passed["up"] == count

    run(test)


def test_a_cut_reply_arrives_in_part() -> None:
    """The client gets no more than so many bytes."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        it.proxy.cut_after(3, "down")
        writer.write(b"hello\n")
        got = b""
        try:
            while piece := await reader.read(100):
                got += piece
        except ConnectionResetError:
            got += b"!"
        assert b"HEL".startswith(got.rstrip(b"!"))
        assert it.heard == [b"hello\n"]
        assert it.proxy.connections[0].ended == "proxy"
        writer.close()

    run(test)


def test_a_reset_is_felt_and_the_next_connection_works() -> None:
    """What stands is reset; who comes again is served."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        await ask(reader, writer, b"a\n")
        assert it.proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            await reader.readline()
        writer.close()
        reader, writer = await it.connect()
        assert await ask(reader, writer, b"b\n") == b"B\n"
        writer.close()

    run(test)


def test_one_stranded_connection_leaves_the_next_alone() -> None:
    """A half-open connection answers nothing and does not end, while new ones work."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        await ask(reader, writer, b"a\n")
        assert it.proxy.strand() == 1
        answer = asyncio.create_task(ask(reader, writer, b"b\n"))
        fresh = await it.connect()
        assert await ask(*fresh, b"c\n") == b"C\n"
        done, _ = await asyncio.wait({answer}, timeout=QUIET)
        assert not done
        answer.cancel()
        writer.close()
        fresh[1].close()

    run(test)


def test_refused_and_slammed_doors() -> None:
    """A refusing proxy is nobody listening; a slamming one accepts, resets and counts; both heal on the same place."""

    async def test(it: Peer) -> None:
        place = it.proxy.dial("127.0.0.1", it.port)
        reader, writer = await it.connect()
        await ask(reader, writer, b"a\n")
        it.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await it.connect()
        assert await ask(reader, writer, b"b\n") == b"B\n"
        writer.close()
        it.proxy.heal()
        it.proxy.slam()
        reader, writer = await it.connect()
        with pytest.raises(ConnectionResetError):
            await reader.readline()
        writer.close()
        assert len(it.proxy.tries) == 1
        it.proxy.heal()
        assert it.proxy.dial("127.0.0.1", it.port) == place
        reader, writer = await it.connect()
        assert await ask(reader, writer, b"c\n") == b"C\n"
        writer.close()

    run(test)


def test_latency_and_slices_change_times_only() -> None:
    """Bytes arrive late, or one by one, in order and whole."""

    async def test(it: Peer) -> None:
        reader, writer = await it.connect()
        it.proxy.delay(0.1, 0.02)
        began = asyncio.get_running_loop().time()
        assert await ask(reader, writer, b"hello\n") == b"HELLO\n"
        assert asyncio.get_running_loop().time() - began >= 0.16
        it.proxy.heal()
        it.proxy.slice()
        assert await ask(reader, writer, b"x" * 500 + b"\n") == b"X" * 500 + b"\n"
        writer.close()

    run(test)


def test_the_brokers_own_end_is_told_from_the_clients() -> None:
    """A connection that the broker ends is marked so: the proof that a restart took effect."""

    async def test(it: Peer) -> None:
        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(leave, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*it.proxy.dial("127.0.0.1", server.sockets[0].getsockname()[1]))
        assert await reader.read() == b""
        await it.proxy.connections[-1].over.wait()
        assert it.proxy.connections[-1].ended == "broker"
        writer.close()
        server.close()

    run(test)
