"""What the launcher has to know about one broker; knows no broker and starts nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

PROBES = Path(__file__).with_name("probes.py")
PROBE_WITHIN = 40.0  # seconds


class BrokerError(Exception):
    """A broker can't be had, started or reached; the text says which one, why, and what to do."""


class NotReadyError(Exception):
    """A server doesn't do its work, or not yet."""


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
    command: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


class Broker(ABC):
    """
    One row of the table: a broker in one version and one configuration.

    Attributes:
        name: What the command line calls it, for example `redis-volatile`.
        ports: Names of the TCP ports that it listens on; the first is the one clients connect to.
        default_port: The port of a URL that names none, and the one inside a container.
    """

    name: str
    ports: ClassVar[tuple[str, ...]] = ("client",)
    default_port: ClassVar[int]

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

    def probe(self, port: int) -> None:
        """
        Make one round trip with the server at a port of 127.0.0.1: store a message, read or confirm it, remove it.

        Raises:
            NotReadyError: What went wrong.
        """
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            command = [sys.executable, "-P", str(PROBES), self.url(port)]
            subprocess.run(command, capture_output=True, text=True, timeout=PROBE_WITHIN, check=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotReadyError(str(error)) from error
        except subprocess.CalledProcessError as error:
            raise NotReadyError(error.stderr[-500:]) from error
