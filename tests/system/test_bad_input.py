"""Every wrong call is a clear error within its time, on every broker; no password is printed and nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import warnings
from collections.abc import Coroutine, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

import unistream
from tests.system.conftest import TARGETS, url_of

LIMIT = 15.0
ASKS_FOR_PASSWORD = ("redis", "amqp")
"""Brokers that refuse unknown users as the tests start them; the adapters' tests cover the others."""
SECRET = "correct-horse-battery-staple"


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's body within the time that every clear error must come in."""
    asyncio.run(asyncio.wait_for(work, LIMIT))


def with_address(url: str, port: int | None = None, password: str | None = None) -> str:
    """The URL with another port or password."""
    parts = urlsplit(url)
    user = parts.username or "somebody"
    credentials = f"{user}:{password}@" if password else ""
    return urlunsplit(parts._replace(netloc=f"{credentials}{parts.hostname}:{port or parts.port}"))


@pytest.fixture
def leaks_of_clients() -> Iterator[None]:
    """Collect in silence what a client leaked: kafka-python 3.0.12 leaves refused sockets to the collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def closed_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_unknown_scheme_names_the_nearest() -> None:
    """A typing error in the scheme is answered with the scheme that was meant."""
    with pytest.raises(unistream.UnknownSchemeError, match="memory://"):
        unistream.connect("memroy://x")


def test_unknown_option_names_itself_and_the_known(real_url: str) -> None:
    """A misspelt option is refused before anything is contacted, with the one that was meant."""
    with pytest.raises(unistream.ConfigError, match=r"conect_timeout.*connect_timeout"):
        unistream.connect(f"{real_url}?conect_timeout=3")


def test_option_of_the_wrong_kind_is_refused(real_url: str) -> None:
    """A value that can't be read is refused with the option's name."""
    with pytest.raises(unistream.ConfigError, match="connect_timeout"):
        unistream.connect(f"{real_url}?connect_timeout=soon")


@pytest.mark.usefixtures("leaks_of_clients")
def test_dead_server_is_unavailable_and_names_the_address(real_url: str) -> None:
    """Where nothing listens, connecting fails at once with the address and no password."""
    port = closed_port()

    async def work() -> None:
        with pytest.raises(unistream.BrokerUnavailableError, match=str(port)) as raised:
            async with unistream.connect(with_address(real_url, port, SECRET) + "?connect_timeout=3"):
                pytest.fail("connected to nothing")
        assert SECRET not in str(raised.value)
        assert raised.value.retryable

    run(work())


@pytest.mark.usefixtures("leaks_of_clients")
def test_silent_server_is_unavailable_within_the_timeout(real_url: str) -> None:
    """A server that accepts and never answers is given up after `connect_timeout`."""

    async def work() -> None:
        async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(swallow, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(unistream.BrokerUnavailableError):
                async with unistream.connect(with_address(real_url, port) + "?connect_timeout=2"):
                    pytest.fail("connected to a server that never answers")

    run(work())


def test_publishing_to_an_unknown_topic_is_surely_not_stored(url: str, name: str) -> None:
    """A topic that does not exist is TopicMissingError, for producers and groups alike."""

    async def work() -> None:
        async with unistream.connect(url) as client:
            with pytest.raises(unistream.TopicMissingError, match=name):
                async with client.producer(name) as producer:
                    await producer.publish(b"x")
            with pytest.raises(unistream.TopicMissingError, match=name):
                await client.group("g", name).create()

    run(work())


def test_conflicting_topic_and_group_keep_the_old_settings(url: str, name: str) -> None:
    """Creating with other settings is refused, names the difference, and changes nothing."""

    async def work() -> None:
        async with unistream.connect(url) as client:
            await client.create_topic(name, partitions=2, ordering="key")
            try:
                await client.create_topic(name, partitions=2, ordering="key")
                with pytest.raises(unistream.TopicConflictError, match="partitions is 2, not 3"):
                    await client.create_topic(name, partitions=3, ordering="key")
                await client.group("g", name, lease=30).create()
                with pytest.raises(unistream.GroupConflictError, match=r"lease is 30(\.0)?, not 45(\.0)?"):
                    await client.group("g", name, lease=45).create()
                [spec] = [spec for spec in await client.topics() if spec.name == name]
                assert spec.partitions == 2
            finally:
                await client.delete_topic(name)

    run(work())


def test_oversize_message_is_refused_and_the_next_one_goes_through(url: str, name: str) -> None:
    """A message over the limit is TooLargeError, surely not stored, and harms nothing after it."""

    async def work() -> None:
        async with unistream.connect(url) as client:
            limit = client.capabilities.max_message_bytes.limit
            await client.create_topic(name)
            try:
                async with client.producer(name) as producer:
                    if limit <= 256 * 1024 * 1024:
                        with pytest.raises(unistream.TooLargeError) as raised:
                            await producer.publish(bytes(int(limit) + 1))
                        assert raised.value.stored == "no"
                    receipt = await producer.publish(b"small")
                    assert receipt.id
            finally:
                await client.delete_topic(name)

    run(work())


def test_use_after_close_is_closed_error(url: str, name: str) -> None:
    """Client, producer and consumer say that they are closed, and publish says that nothing was stored."""

    async def work() -> None:
        async with unistream.connect(url) as client:
            await client.create_topic(name)
            async with client.producer(name) as producer:
                await producer.publish(b"x")
            with pytest.raises(unistream.ClosedError) as raised:
                await producer.publish(b"y")
            assert raised.value.stored == "no"
            async with client.group("g", name).consumer() as consumer:
                await consumer.receive(0)
            with pytest.raises(unistream.ClosedError):
                await consumer.receive(0)
            await client.delete_topic(name)
        with pytest.raises(unistream.ClosedError):
            await client.topics()

    run(work())


@pytest.mark.parametrize("target", [target for target in TARGETS if target in ASKS_FOR_PASSWORD])
def test_wrong_password_is_access_error_and_is_not_printed(target: str, caplog: pytest.LogCaptureFixture) -> None:
    """Refused credentials are AccessError at once; the password is in no error, repr or log line."""
    caplog.set_level(logging.DEBUG)
    real_url = url_of(target)

    async def work() -> None:
        client = unistream.connect(with_address(real_url, password=SECRET))
        with pytest.raises(unistream.AccessError) as raised:
            await client.__aenter__()
        assert SECRET not in str(raised.value) + repr(raised.value) + repr(client)
        assert SECRET not in caplog.text

    run(work())


def test_forked_child_is_told_to_connect_again(url: str, name: str) -> None:
    """A child process that uses its parent's client gets ClosedError; the parent goes on."""

    async def work() -> None:
        async with unistream.connect(url) as client:
            await client.create_topic(name)
            async with client.producer(name) as producer:
                await producer.publish(b"before")
                reader, writer = os.pipe()
                child = os.fork()
                if child == 0:
                    answer = b"no error"
                    try:
                        producer.publish(b"from the child").send(None)
                    except unistream.ClosedError as error:
                        answer = str(error).encode()
                    finally:
                        os.write(writer, answer)
                        os._exit(0)
                await asyncio.to_thread(os.waitpid, child, 0)
                assert b"forked" in os.read(reader, 1000)
                await producer.publish(b"after")
            await client.delete_topic(name)

    run(work())
