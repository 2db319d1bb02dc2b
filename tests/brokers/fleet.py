"""Finds or starts the brokers that are asked for: a given URL, else one that is up, else Docker, else local."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.brokers import containers
from tests.brokers.broker import Broker, BrokerError
from tests.brokers.install import one_at_a_time
from tests.brokers.server import STATE, LocalServer, Server
from tests.brokers.table import BROKERS, broker


def home() -> Path:
    """Return the directory of the servers that `up` starts: $UNISTREAM_BROKERS_DIR, else .brokers/ here."""
    given = os.environ.get("UNISTREAM_BROKERS_DIR")
    return Path(given).absolute() if given else Path(__file__).resolve().parents[2] / ".brokers"


def given_url(row: Broker, environment: Mapping[str, str]) -> str | None:
    """Return the URL that the environment gives for a broker, after a look whether somebody listens there."""
    url = environment.get(row.variable)
    if not url:
        return None
    refusals = []
    for place in urlsplit(url).netloc.rpartition("@")[2].split(","):  # Kafka's may name several
        try:
            address = urlsplit(f"//{place}")
            with socket.create_connection((address.hostname or "", address.port or row.default_port), timeout=5):
                return url
        except (OSError, ValueError) as error:
            refusals.append(f"{place}: {error}")
    raise BrokerError(
        f"{row.name}: {row.variable} is set, but nobody listens there ({'; '.join(refusals)}); "
        f"unset it to have a server started"
    )


@contextmanager
def local(name: str, directory: Path) -> Iterator[Server]:
    """
    Run a private instance of a broker on this machine; it is ready on entry and gone on exit.

    Entry and exit block for as long as the broker takes. In asyncio tests use it in a fixture that is not a
    coroutine, and call the server's methods by `asyncio.to_thread`.

    Args:
        name: A name of the table.
        directory: Where its data and logs go; they stay there.
    """
    fleet = Fleet(directory)
    server = fleet.server(broker(name).name)
    try:
        server.start()
        yield server
    finally:
        # As it stands now: a command of another process may have started it again.
        fleet.server(server.broker.name).destroy()


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
        self.directory.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(self.directory):
            servers = [self.server(name) for name in names]
            failures = _start_all(servers)
        if failures:
            raise BrokerError("\n".join(map(str, failures)))

    def down(self, names: Iterable[str]) -> list[str]:
        """Stop the named servers and remove their data; return the names of those that were known here."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(self.directory), ThreadPoolExecutor() as pool:
            servers = [server for name, server in self.known().items() if name in set(names)]
            list(pool.map(_destroy, servers))
        return [server.broker.name for server in servers]


def _start_all(servers: Sequence[Server]) -> list[BrokerError]:
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
    failures = []
    for start in starts:
        try:
            start.result()
        except BrokerError as error:
            failures.append(error)
    return failures


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
