"""Finds or starts the brokers that are asked for: a given URL, else one that is up, else Docker, else local."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import urlsplit

from tests.brokers import containers
from tests.brokers.broker import Broker, BrokerError
from tests.brokers.server import STATE, LocalServer, Server
from tests.brokers.table import BROKERS


def home() -> Path:
    """Return the directory of the servers that `up` starts: $UNISTREAM_BROKERS_DIR, else .brokers/ here."""
    given = os.environ.get("UNISTREAM_BROKERS_DIR")
    return Path(given).absolute() if given else Path(__file__).resolve().parents[2] / ".brokers"


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
            f"{broker.name}: {broker.variable} is set, but nothing answers at {place.hostname}:{place.port} "
            f"({error}); unset it to have a server started"
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
        """Return the handle of one server that was started here, or of one to be started."""
        directory = self.directory / name
        known = (directory / STATE).exists()
        if containers.is_container(directory) if known else containers.engine_answers():
            return containers.ContainerServer(BROKERS[name], directory)
        return LocalServer(BROKERS[name], directory)

    def up(self, names: Iterable[str]) -> None:
        """
        Start side by side what doesn't run; on return all of it answers.

        Raises:
            BrokerError: What could not be had, a sentence for each. The others stay up.
        """
        servers = [self.server(name) for name in names]
        pool = ThreadPoolExecutor(max_workers=len(servers) or 1)
        starts = [pool.submit(_start, server) for server in servers]
        try:
            wait(starts)
        except BaseException:  # interrupted: a start whose process is gone ends at once
            for server in servers:
                server.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        failures = [error for start in starts if (error := start.exception())]
        for error in failures:
            if not isinstance(error, BrokerError):
                raise error
        if failures:
            raise BrokerError("\n".join(map(str, failures)))

    def down(self, names: Iterable[str]) -> list[str]:
        """Stop the named servers and remove their data; return the names of those that were known here."""
        servers = [server for name, server in self.known().items() if name in set(names)]
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            list(pool.map(_destroy, servers))
        return [server.broker.name for server in servers]


def _start(server: Server) -> None:
    if server.state == "paused":
        raise BrokerError(f"{server.broker.name} is paused; `python -m tests.brokers resume {server.broker.name}`")
    server.start()
    print(f"{server.broker.name} is ready at {server.url}", file=sys.stderr)


def _destroy(server: Server) -> None:
    if server.directory.is_symlink():  # lent by another fleet
        server.directory.unlink()
        return
    server.destroy()
    shutil.rmtree(server.directory)
