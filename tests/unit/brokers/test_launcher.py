"""The launcher's pure parts: the table, the files it writes, identity of processes, ports, the command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.brokers import BROKERS, BrokerError
from tests.brokers.__main__ import main, parser
from tests.brokers.broker import Broker, Command
from tests.brokers.fleet import Fleet, given_url
from tests.brokers.ports import RANGE, free_ports
from tests.brokers.processes import Process
from tests.brokers.server import LocalServer
from tests.brokers.table import broker


def commands(name: str, directory: Path) -> list[Command]:
    """Return what would be started for a broker whose client port is 20001."""
    ports = {port: 20001 + index for index, port in enumerate(BROKERS[name].ports)}
    return list(BROKERS[name].commands(directory, ports))


def test_names_and_variables_are_distinct() -> None:
    """Every row of the table has its own name and its own environment variable."""
    assert len({row.variable for row in BROKERS.values()}) == len(BROKERS)
    assert BROKERS["redis-volatile"].variable == "UNISTREAM_REDIS_VOLATILE_URL"


@pytest.mark.parametrize("row", BROKERS.values(), ids=BROKERS)
def test_urls_stay_on_this_machine(row: Broker) -> None:
    """A started broker is reached at 127.0.0.1 only."""
    assert "127.0.0.1:20001" in row.url(20001)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("redis", ["--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"]),
        ("redis8", ["--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"]),
        ("redis-volatile", ["--appendonly no"]),
        ("redis-evicting", ["--appendonly yes", "--maxmemory 64mb", "--maxmemory-policy allkeys-lru"]),
    ],
)
def test_redis_durability_is_what_the_name_says(name: str, words: list[str]) -> None:
    """Each Redis gets the persistence and eviction settings of its row."""
    line = " ".join(BROKERS[name].image({"client": 20001}).command)
    assert [word for word in words if word not in line] == []


def test_nats_stores_in_its_directory(tmp_path: Path) -> None:
    """JetStream has a store directory of the server's own, and syncs always only where the row says so."""
    commands("nats", tmp_path)
    plain = (tmp_path / "nats.conf").read_text()
    assert f'store_dir: "{tmp_path}/data"' in plain
    assert "sync_interval" not in plain
    commands("nats-sync", tmp_path)
    assert "sync_interval: always" in (tmp_path / "nats.conf").read_text()


def test_unknown_broker_is_named_with_the_known_ones() -> None:
    """A misspelt name is an error that lists what there is."""
    with pytest.raises(BrokerError, match=r"no broker 'reddis'.*redis8.*nats-old"):
        broker("reddis")


def test_given_url_that_nobody_answers_is_refused() -> None:
    """A URL in the environment where nobody listens is an error, not a reason to look elsewhere."""
    port = free_ports(["closed"])["closed"]
    with pytest.raises(BrokerError, match="UNISTREAM_REDIS_URL is set, but nobody listens"):
        given_url(BROKERS["redis"], {"UNISTREAM_REDIS_URL": f"redis://user:secret@127.0.0.1:{port}/0"})


def test_given_url_error_shows_no_password() -> None:
    """The error about a given URL names host and port, never the password."""
    port = free_ports(["closed"])["closed"]
    with pytest.raises(BrokerError) as caught:
        given_url(BROKERS["kafka"], {"UNISTREAM_KAFKA_URL": f"kafka://user:secret@127.0.0.1:{port},127.0.0.1:x"})
    assert "secret" not in str(caught.value)


def test_no_url_given() -> None:
    """An unset or empty variable gives nothing, so that a server is started."""
    assert given_url(BROKERS["redis"], {}) is None
    assert given_url(BROKERS["redis"], {"UNISTREAM_REDIS_URL": ""}) is None


def test_ports_are_distinct_and_below_the_ephemeral_range() -> None:
    """Ports are told apart by name and come from where the kernel takes none for clients."""
    ports = free_ports(["a", "b", "c"])
    assert len(set(ports.values())) == 3
    assert all(port in RANGE for port in ports.values())


def test_process_is_known_by_its_birth() -> None:
    """A process id with another start time is another process, and gets no signal."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process.of(child.pid)
        stranger = Process(child.pid, process.birth + 1)
        assert (process.state, stranger.state) == ("running", "dead")
        assert not stranger.signal(signal.SIGKILL)
        assert not process.wait(0)
        child.communicate(b"\n")
    assert (process.state, child.returncode) == ("dead", 0)
    assert process.wait(0)


def test_server_that_was_never_started(tmp_path: Path) -> None:
    """It is dead, has a port and a URL already, and refuses a signal with a sentence."""
    server = LocalServer(BROKERS["redis"], tmp_path)
    assert server.state == "dead"
    assert server.url == f"redis://127.0.0.1:{server.ports['client']}/0"
    with pytest.raises(BrokerError, match="never started"):
        server.kill9()


def test_state_file_of_another_boot(tmp_path: Path) -> None:
    """A state file whose process is gone gives a dead server with its old port, not somebody else's process."""
    (tmp_path / "redis").mkdir()
    state = f'{{"broker": "redis", "ports": {{"client": 20007}}, "processes": {{"redis": [{os.getpid()}, 1]}}}}'
    (tmp_path / "redis" / "server.json").write_text(state)
    server = Fleet(tmp_path).known()["redis"]
    assert (server.state, server.url) == ("dead", "redis://127.0.0.1:20007/0")
    server.stop()
    with pytest.raises(BrokerError, match="not running"):
        server.kill9()


def test_a_command_keeps_its_own_options() -> None:
    """What follows `--` belongs to the command, options included."""
    options = parser().parse_args(["run", "--only", "redis,nats", "--", "pytest", "-q", "--only", "x"])
    assert options.only == "redis,nats"
    assert options.words == ["pytest", "-q", "--only", "x"]


def test_action_on_a_broker_that_is_not_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill9` of what was never brought up says how to bring it up."""
    monkeypatch.setenv("UNISTREAM_BROKERS_DIR", str(tmp_path))
    with pytest.raises(BrokerError, match=r"tests\.brokers up redis"):
        main(["kill9", "redis"])
