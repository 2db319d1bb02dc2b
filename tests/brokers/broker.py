"""What the launcher has to know about one broker; knows no broker and starts nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from uuid import uuid4


def probe_name() -> str:
    """Return a name for what a probe creates; two probes of one server don't meet."""
    return f"unistream-probe-{uuid4().hex[:8]}"


class BrokerError(Exception):
    """A broker can't be had, started or reached; the text says which one, why, and what to do."""


@dataclass(frozen=True)
class Command:
    """One process of a server: how to start it."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """The container that stands for a server where a Docker engine answers."""

    name: str
    port: int
    command: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


class Broker(ABC):
    """
    One row of the table: a broker in one version and one configuration.

    Attributes:
        name: What the command line calls it, for example `redis-volatile`.
        ports: Names of the TCP ports that it listens on; the first is the one clients connect to.
        not_ready: What `probe` raises while the server isn't there yet.
    """

    name: str
    ports: ClassVar[tuple[str, ...]] = ("client",)
    not_ready: ClassVar[tuple[type[Exception], ...]]

    @property
    def variable(self) -> str:
        """Return the environment variable that carries its URL."""
        return f"UNISTREAM_{self.name.upper().replace('-', '_')}_URL"

    @abstractmethod
    def install(self) -> None:
        """Make the program available on this machine; BrokerError says why it can't be had."""

    @abstractmethod
    def commands(self, directory: Path, ports: Mapping[str, int]) -> Sequence[Command]:
        """Write configuration into `directory` and return the processes to start; the last is the server."""

    @abstractmethod
    def image(self, ports: Mapping[str, int]) -> Image:
        """Return the container to start where a Docker engine answers; `ports` are those of the host."""

    @abstractmethod
    def url(self, port: int) -> str:
        """Return the URL that unistream is given for this server on 127.0.0.1."""

    @abstractmethod
    def probe(self, url: str) -> None:
        """Make one round trip in the broker's own protocol: store a message, read or confirm it, remove it."""
