"""Passwords and TLS against a broker with listeners for each; what is refused is said, and no password shown."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from kafka.admin import KafkaAdminClient, ScramMechanism, UserScramCredentialUpsertion

import unistream
from tests.adapters.kafka.support import LIMIT, run
from tests.brokers.broker import Command
from tests.brokers.kafka_server import Kafka
from tests.brokers.server import LocalServer
from unistream.driver.checked import checked
from unistream.errors import AccessError, BrokerUnavailableError
from unistream_kafka import KafkaDriver

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

PASSWORD = "s3cret/x"
QUOTED = "s3cret%2Fx"
JAAS = "listener.name.{}.{}.sasl.jaas.config=org.apache.kafka.common.security.{} required {};\n"
PLAIN = f'user_joe="{PASSWORD}"'


class Guarded(Kafka):
    """A node that asks for a password on one port, a certificate on another, and a password under TLS on a third."""

    ports: ClassVar[tuple[str, ...]] = ("client", "controller", "password", "certificate", "both")

    def commands(self, directory: Path, ports: Mapping[str, int]) -> Sequence[Command]:
        """Write the other listeners into server.properties, too; of two lines for a name the last counts."""
        found = super().commands(directory, ports)
        certificates(directory)
        listeners = {
            "PLAINTEXT": ("PLAINTEXT", "127.0.0.1", "client"),
            "PASSWORD": ("SASL_PLAINTEXT", "localhost", "password"),
            "CERTIFICATE": ("SSL", "localhost", "certificate"),
            "BOTH": ("SASL_SSL", "localhost", "both"),
        }
        advertised = ",".join(f"{name}://{host}:{ports[port]}" for name, (_, host, port) in listeners.items())
        protocols = ",".join(f"{name}:{protocol}" for name, (protocol, _, _) in listeners.items())
        lines = (
            f"listeners={advertised},CONTROLLER://127.0.0.1:{ports['controller']}\n"
            f"advertised.listeners={advertised}\n"
            f"listener.security.protocol.map={protocols},CONTROLLER:PLAINTEXT\n"
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512\n"
            "ssl.keystore.type=PEM\nssl.truststore.type=PEM\n"
            f"ssl.keystore.location={directory}/server.both.pem\nssl.truststore.location={directory}/ca.pem\n"
            "listener.name.certificate.ssl.client.auth=required\n"
        )
        for listener in ("password", "both"):
            lines += JAAS.format(listener, "plain", "plain.PlainLoginModule", PLAIN)
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                lines += JAAS.format(listener, mechanism, "scram.ScramLoginModule", "")
        with (directory / "server.properties").open("a") as config:
            config.write(lines)
        return found


def certificates(directory: Path) -> None:
    """An authority, and certificates of it for a server called localhost and for a client."""
    openssl = shutil.which("openssl")
    assert openssl, "no openssl on this machine"

    def make(name: str, *words: str) -> None:
        made = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        made += ["-days", "2", "-subj", f"/CN={name}", "-keyout", f"{directory}/{name}.key", *words]
        subprocess.run([*made, "-out", f"{directory}/{name}.pem"], check=True, capture_output=True)

    if (directory / "ca.pem").exists():
        return
    make("ca")
    signed = ("-CA", f"{directory}/ca.pem", "-CAkey", f"{directory}/ca.key")
    make("client", *signed)
    make("server", *signed, "-addext", "subjectAltName=DNS:localhost")
    both = (directory / "server.key").read_text() + (directory / "server.pem").read_text()
    (directory / "server.both.pem").write_text(both)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The node, with joe's password known to every mechanism."""
    server = LocalServer(Guarded("kafka"), tmp_path_factory.mktemp("guarded"))
    try:
        server.start()
        admin = KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{server.ports['client']}")
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            credential = UserScramCredentialUpsertion("joe", mechanism, PASSWORD.encode())
            assert admin.alter_user_scram_credentials([credential]) == {"joe": None}
        admin.close()
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            # The node takes note of a password a moment after it has agreed to; this client knocks until then.
            KafkaAdminClient(
                bootstrap_servers=f"localhost:{server.ports['password']}",
                security_protocol="SASL_PLAINTEXT",
                sasl_mechanism=mechanism.name.replace("_", "-"),
                sasl_plain_username="joe",
                sasl_plain_password=PASSWORD,
            ).close()
        yield server
    finally:
        server.destroy()


async def round_trip(address: str) -> None:
    """Publish and receive one message, on every kind of connection that the adapter makes."""
    async with unistream.connect(address, driver=checked(KafkaDriver)) as client:
        await client.create_topic("t")
        try:
            group = client.group("g", "t")
            await group.create()
            async with client.producer("t") as producer, group.consumer() as consumer:
                await producer.publish(b"x")
                delivery = await consumer.receive(LIMIT)
                assert delivery is not None
                await delivery.ack(confirm=True)
        finally:
            await client.delete_topic("t")


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_password_by_every_mechanism(guarded: LocalServer, mechanism: str) -> None:
    """The right password works; a wrong one is AccessError, soon, and is not shown."""
    there = f"localhost:{guarded.ports['password']}/?sasl_mechanism={mechanism}"
    run(lambda: round_trip(f"kafka://joe:{QUOTED}@{there}"))

    with pytest.raises(AccessError) as caught:
        asyncio.run(round_trip(f"kafka://joe:wr0ng@{there}"))
    assert "wr0ng" not in str(caught.value)


def test_no_password_where_one_is_asked_for(guarded: LocalServer) -> None:
    """Without a password the server, which answers nothing then, counts as out of reach within connect_timeout."""
    with pytest.raises(BrokerUnavailableError):
        asyncio.run(round_trip(f"kafka://localhost:{guarded.ports['password']}?connect_timeout=2"))


def test_a_password_under_tls(guarded: LocalServer) -> None:
    """Both together work, with the authority that is named."""
    there = f"localhost:{guarded.ports['both']}?ca_file={guarded.directory}/ca.pem"

    run(lambda: round_trip(f"kafkas://joe:{QUOTED}@{there}&sasl_mechanism=SCRAM-SHA-256"))


def test_a_certificate_is_checked_and_shown(guarded: LocalServer) -> None:
    """The server's must be of a known authority and for its host, unless told otherwise; the client's is shown."""
    port, files = guarded.ports["certificate"], guarded.directory
    ours = f"cert_file={files}/client.pem&key_file={files}/client.key"
    trusting = f"ca_file={files}/ca.pem&connect_timeout=3"
    run(lambda: round_trip(f"kafkas://localhost:{port}?{trusting}&{ours}"))
    run(lambda: round_trip(f"kafkas://127.0.0.1:{port}?{trusting}&{ours}&check_hostname=false"))

    for refused, kind in {
        f"localhost:{port}?connect_timeout=3&{ours}": AccessError,  # of an authority that nobody knows
        f"127.0.0.1:{port}?{trusting}&{ours}": AccessError,  # for another host
        f"localhost:{port}?{trusting}": BrokerUnavailableError,  # the server hangs up on who shows none
        f"localhost:{guarded.ports['client']}?{trusting}&{ours}": BrokerUnavailableError,  # no TLS there
    }.items():
        with pytest.raises(kind):
            asyncio.run(round_trip(f"kafkas://{refused}"))
