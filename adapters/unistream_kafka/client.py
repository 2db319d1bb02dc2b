"""Makes kafka-python's clients: where they connect to, what they are told, and how they end when they fail.

kafka-python 3.0.12 has no address map, hides a refused password behind a timeout, leaves a thread behind when a
constructor fails, and spins while a node is connecting. All of it is put right here, through its `kafka_client` option.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ssl import SSLCertVerificationError
from typing import Any, TypeVar

from kafka import KafkaProducer
from kafka.errors import (
    AuthorizationError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.net.compat import KafkaNetClient
from kafka.net.inet import KafkaNetSocket
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

__all__ = ["Place", "Secret", "abandon", "connect", "connected", "discard", "losses"]

C = TypeVar("C")

# Without a handler of its own Python prints the client's warnings, several per attempt to connect, to stderr.
logging.getLogger("kafka").addHandler(logging.NullHandler())

REFUSALS = (
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
    # A listener that asks for no password takes none.
    IllegalSaslStateError,
    AuthorizationError,
    SSLCertVerificationError,
)
_PIECE_BYTES = 256 * 1024
_SPIN_MS = 20.0
_JOIN_SECONDS = 5.0
_YOUNG_SECONDS = 1.0
_LEAST_PAUSE_SECONDS = 0.05
_MOST_PAUSE_SECONDS = 1.0


class Secret(str):
    """A password that does not show: kafka-python logs its whole configuration at level DEBUG."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster is, and how to enter it.

    Attributes:
        label: The URL without password.
        hosts: `(host, port)` pairs to begin with.
        connect_timeout: Seconds for one attempt to connect.
        dead_peer_after: Seconds without an answer after which a connection counts as dead.
        security: kafka-python's options for TLS and SASL.
        dial: Maps addresses.
    """

    label: str
    hosts: tuple[tuple[str, int], ...]
    connect_timeout: float
    dead_peer_after: float
    security: Mapping[str, Any] = field(repr=False)
    dial: Callable[[str, int], tuple[str, int]] = field(repr=False)

    def config(self) -> dict[str, Any]:
        """Options that every kind of client takes."""
        return {
            "bootstrap_servers": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts],
            "bootstrap_timeout_ms": int(self.connect_timeout * 1000),
            "request_timeout_ms": int(self.dead_peer_after * 1000),
            "reconnect_backoff_max_ms": 1000,
            **self.security,
        }


class _Plain(KafkaTCPTransport):  # type: ignore[misc]
    """Reads in large pieces (the client's are of 4096 bytes), and what came before the end of a connection, too."""

    def _sock_recv(self) -> tuple[bytes, BaseException | None]:
        pieces: list[bytes] = []
        error: BaseException | None = None
        try:
            while piece := self._sock.recv(_PIECE_BYTES):
                pieces.append(piece)
            error = KafkaConnectionError("socket disconnected")
        except (BlockingIOError, InterruptedError):
            error = None
        except OSError as failed:
            error = KafkaConnectionError(failed)
        # The end shows again at the next look. Kafka closes a connection right after the word that refuses it.
        return b"".join(pieces), None if pieces else error


class _Secure(KafkaSSLTransport):  # type: ignore[misc]
    """The same over TLS, in the client's pieces."""

    def _sock_recv(self) -> tuple[bytes, BaseException | None]:
        data, error = super()._sock_recv()
        return data, None if data else error


class _Manager(KafkaConnectionManager):  # type: ignore[misc]
    """Connections that go where `dial` says; certificates are still checked against the address itself."""

    def __init__(self, net: Any, place: Place, **configs: Any) -> None:
        super().__init__(net, socket_connection_setup_timeout_ms=int(place.connect_timeout * 1000), **configs)
        self._place = place
        self.losses = 0
        self.refusal: BaseException | None = None
        # Node -> connections to it in a row that ended young.
        self._young: dict[Any, int] = {}

    def get_connection(self, node_id: Any, *args: Any, **kwargs: Any) -> Any:
        """The connection to a node, its end counted."""
        known = node_id in self._conns
        connection = super().get_connection(node_id, *args, **kwargs)
        if not known:
            begun = time.monotonic()
            connection.close_future.add_both(lambda _: self._ended(node_id, begun))
            connection.close_future.add_errback(self._refused)
        return connection

    def _refused(self, error: BaseException) -> None:
        if isinstance(error, REFUSALS):
            self.refusal = error

    def maybe_raise_auth_failure(self, node_id: Any) -> None:
        """End the first search for the cluster at a refusal, which the client otherwise forgets and repeats."""
        if self.refusal is not None and self.cluster.is_bootstrap(node_id):
            raise self.refusal

    def _ended(self, node_id: Any, begun: float) -> None:
        self.losses += 1
        young = time.monotonic() - begun < _YOUNG_SECONDS
        self._young[node_id] = self._young.get(node_id, 0) + 1 if young else 0

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        if young := self._young.get(node.node_id):
            # The client's own backoff begins anew with every connection that is accepted, also by who then closes it.
            pause = min(_LEAST_PAUSE_SECONDS * 2**young, _MOST_PAUSE_SECONDS)
            await self._net.sleep(pause * random.uniform(0.8, 1.2))
        host, port = self._place.dial(node.host, node.port)
        sock = await self._connected(host, port, timeout_at)
        if not self.ssl_enabled:
            return _Plain(self._net, sock, host=node.host)
        options = {name: value for name, value in self.config.items() if name.startswith("ssl_")}
        try:
            transport = _Secure(self._net, sock, host=node.host, **options)
        except BaseException:
            sock.close()
            raise
        try:
            await transport.handshake()
        except BaseException as error:
            transport.abort(error)
            raise
        return transport

    async def _connected(self, host: str, port: int, timeout_at: float | None) -> Any:
        """A connected socket; kafka-python's own `create_connection` leaves those that fail open."""
        maker = KafkaNetSocket()
        error: BaseException = KafkaConnectionError(f"{host} has no address")
        for family, kind, protocol, _, address in maker.dns_lookup(host, port):
            sock = maker.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                for option in self.config["socket_options"]:
                    sock.setsockopt(*option)
                return await maker.sock_connect(self._net, sock, address, timeout_at=timeout_at)
            except (OSError, KafkaError) as refused:
                sock.close()
                error = refused
            except BaseException:
                sock.close()
                raise
        raise KafkaConnectionError(f"{host}:{port}: {error}") from error


class _Client(KafkaNetClient):  # type: ignore[misc]
    def connection_delay(self, node_id: Any) -> float:
        """
        Seconds until a node may be asked again, which the producer takes for milliseconds.

        So it would poll a node that is connecting without a pause, at 70 % of a core (`Sender._send_producer_data`).
        """
        delay: float = super().connection_delay(node_id)
        return max(delay * 1000, _SPIN_MS) if self.is_disconnected(node_id) else delay


def connect(kind: Callable[..., C], place: Place, *, producer: bool = False, **options: Any) -> C:
    """
    Make a KafkaProducer, KafkaConsumer or KafkaAdminClient. Blocks for up to `connect_timeout`.

    Raises:
        KafkaError: It can't be made; nothing is left behind. A refusal of the credentials is raised as such.
    """
    made: list[KafkaNetClient] = []

    def make(**configs: Any) -> KafkaNetClient:
        net = NetworkSelector(**configs)
        manager = _Manager(net, place, **configs)
        made.append((_Client if producer else KafkaNetClient)(net=net, manager=manager, **configs))
        return made[-1]

    try:
        return kind(**{**place.config(), **options}, kafka_client=make)
    except Exception as error:
        refused = [client._manager.refusal for client in made if client._manager.refusal is not None]
        for client in made:
            abandon(client)
        if refused:
            raise refused[0] from error
        raise


def abandon(client: KafkaNetClient) -> None:
    """Close a client's connections, and its thread, without a word to the broker."""
    client._manager.close()
    client._net.close()


def discard(client: KafkaProducer) -> None:
    """
    Close a KafkaProducer, giving up what it holds: every future of it is resolved on return.

    Its own `close` raises when something is undecided, and then leaves its thread behind.
    """
    client._unregister_cleanup()
    client._closed = True
    client._sender.force_close()
    client._sender.join(_JOIN_SECONDS)


def losses(client: KafkaNetClient) -> int:
    """How many of its connections have ended so far."""
    return int(client._manager.losses)


def connected(client: KafkaNetClient) -> bool:
    """Whether any connection stands; may be called from any thread."""
    return any(connection.connected for connection in list(client._manager._conns.values()))
