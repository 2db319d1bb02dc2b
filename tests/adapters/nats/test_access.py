"""Credentials and TLS against servers of their own; what is refused is said, and no password shown."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import unistream
from tests.adapters.nats.support import run
from tests.brokers.nats_server import Nats
from tests.brokers.ports import free_ports
from unistream.driver.checked import checked
from unistream.errors import AccessError, BrokerUnavailableError, UnistreamError, UnsupportedError
from unistream_nats import NatsDriver

pytestmark = pytest.mark.nats


@contextlib.contextmanager
def server(directory: Path, settings: str) -> Iterator[int]:
    """A nats-server with these settings; its port."""
    port = free_ports(["client"])["client"]
    config = directory / "nats.conf"
    config.write_text(f"listen: 127.0.0.1:{port}\n{settings}\n")
    program = Nats("nats")._program()
    with subprocess.Popen([program, "--config", str(config)], stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if b"Server is ready" in line:
                    break
            yield port
        finally:
            process.terminate()


async def round_trip(address: str) -> None:
    """Publish and receive one message."""
    async with unistream.connect(address, driver=checked(NatsDriver)) as client:
        await client.create_topic("t")
        group = client.group("g", "t")
        await group.create()
        async with client.producer("t") as producer, group.consumer() as consumer:
            await producer.publish(b"x")
            delivery = await consumer.receive(10)
            assert delivery is not None
            await delivery.ack(confirm=True)
        native = client.native
        await native.connect()
        assert native.is_connected


def test_user_and_password(tmp_path: Path) -> None:
    """The right ones work, also for the native client; wrong ones and none are AccessError, without the password."""
    settings = f'jetstream {{ store_dir: "{tmp_path}/js" }}\nauthorization {{ user: joe, password: "s3cret/x" }}'
    with server(tmp_path, settings) as port:
        run(lambda: round_trip(f"nats://joe:s3cret%2Fx@127.0.0.1:{port}"))
        for who in ("joe:wr0ng@", ""):
            with pytest.raises(AccessError) as caught:
                asyncio.run(round_trip(f"nats://{who}127.0.0.1:{port}"))
            assert "wr0ng" not in str(caught.value)


def test_token(tmp_path: Path) -> None:
    """A user without a password is a token."""
    settings = f'jetstream {{ store_dir: "{tmp_path}/js" }}\nauthorization {{ token: "t0ken" }}'
    with server(tmp_path, settings) as port:
        run(lambda: round_trip(f"nats://t0ken@127.0.0.1:{port}"))


def test_a_server_without_jetstream_is_refused(tmp_path: Path) -> None:
    """Plain NATS keeps nothing: opening says what to switch on."""
    with server(tmp_path, "") as port, pytest.raises(UnsupportedError, match="JetStream"):
        asyncio.run(round_trip(f"nats://127.0.0.1:{port}"))


def test_a_right_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    """Publishing where the account may not is AccessError, surely not stored, long before any timeout."""
    joe = '{ user: joe, password: pw, permissions: { publish: { deny: ["us.t.>"] } } }'
    settings = f'jetstream {{ store_dir: "{tmp_path}/js" }}\nauthorization {{ users: [ {joe} ] }}'

    async def test(port: int) -> None:
        async with unistream.connect(f"nats://joe:pw@127.0.0.1:{port}", driver=checked(NatsDriver)) as client:
            await client.create_topic("t")
            async with client.producer("t") as producer, asyncio.timeout(5):
                with pytest.raises(AccessError) as caught:
                    await producer.publish(b"x")

        assert caught.value.stored == "no"

    with server(tmp_path, settings) as port:
        run(lambda: test(port))


def test_tls(tmp_path: Path) -> None:
    """`tls://` trusts the file that it is given, refuses an unknown certificate, and says so."""
    openssl = shutil.which("openssl")
    assert openssl is not None, "openssl is needed to make a certificate"
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x", *names, *files],
        check=True,
        capture_output=True,
    )
    tls = f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem" }}'
    with server(tmp_path, f'jetstream {{ store_dir: "{tmp_path}/js" }}\n{tls}') as port:
        run(lambda: round_trip(f"tls://127.0.0.1:{port}?ca_file={tmp_path}/cert.pem"))
        with pytest.raises(AccessError, match="certificate"):
            asyncio.run(round_trip(f"tls://127.0.0.1:{port}"))


def test_nobody_there() -> None:
    """A port that nobody listens on is BrokerUnavailableError, and names the place."""
    port = free_ports(["client"])["client"]
    with pytest.raises(BrokerUnavailableError, match=str(port)):
        asyncio.run(round_trip(f"nats://127.0.0.1:{port}"))


@pytest.mark.parametrize("wrong", ["/path", "?replicas=9", "?dead_peer_after=x", "?conect_timeout=1"])
def test_wrong_urls_are_refused_before_any_connection(wrong: str) -> None:
    """A path, a value out of range and an unknown option are errors that say so."""
    with pytest.raises(UnistreamError):
        asyncio.run(round_trip(f"nats://127.0.0.1:1{wrong}"))
