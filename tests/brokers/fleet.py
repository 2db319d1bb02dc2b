"""Finds or starts the brokers that are asked for: a given URL, else one that is up, else Docker, else local."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from tests.brokers import containers
from tests.brokers.broker import Broker, BrokerError
from tests.brokers.server import STATE, LocalServer, Server
from tests.brokers.table import BROKERS


def home() -> Path:
    """Return the directory of the servers that `up` starts: $UNISTREAM_BROKERS_DIR, else .brokers/ here."""
    given = os.environ.get("UNISTREAM_BROKERS_DIR")
    return Path(given) if given else Path(__file__).resolve().parents[2] / ".brokers"


def given_url(broker: Broker, environment: Mapping[str, str]) -> str | None:
    """Return the URL that the environment gives for a broker, after a look whether somebody listens there."""
    url = environment.get(broker.variable)
    if not url:
        return None
    place = urlsplit(url)
    try:
        socket.create_connection((place.hostname or "", place.port or 0), timeout=5).close()
    except (OSError, ValueError) as error:
        raise BrokerError(
            f"{broker.variable} is set, but nothing answers at {place.hostname}:{place.port} ({error}); "
            f"unset it to have a server started"
        ) from error
    return url


class Fleet:
    """The servers in one directory, each in a folder of its name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def known(self) -> dict[str, Server]:
        """Return the servers that were started here, dead ones included, in the table's order."""
        return {name: self.server(name) for name in BROKERS if (self.directory / name / STATE).exists()}

    def server(self, name: str) -> Server:
        """Return the handle of one server, started or not."""
        directory = self.directory / name
        if containers.is_container(directory):
            return containers.ContainerServer(BROKERS[name], directory)
        return LocalServer(BROKERS[name], directory)

    def up(self, names: Iterable[str]) -> None:
        """
        Start side by side what doesn't run; ready on return.

        Raises:
            BrokerError: What could not be had, one sentence per broker. What was started stays.
        """
        docker = containers.engine_answers()
        servers = []
        for name in names:
            fresh = not (self.directory / name / STATE).exists()
            if fresh and docker:
                servers.append(containers.ContainerServer(BROKERS[name], self.directory / name))
            else:
                servers.append(self.server(name))
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            starts = {server.broker.name: pool.submit(_start, server) for server in servers}
            try:
                _raise_all(starts)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def down(self, names: Iterable[str] | None = None) -> list[str]:
        """Stop the named servers (all by default) and remove their folders; return the names of those that ran."""
        servers = self.known()
        chosen = [server for name, server in servers.items() if names is None or name in names]
        with ThreadPoolExecutor(max_workers=len(chosen) or 1) as pool:
            list(pool.map(lambda server: server.stop(), chosen))
        for server in chosen:
            server.remove()
            shutil.rmtree(server.directory)
        return [server.broker.name for server in chosen]
