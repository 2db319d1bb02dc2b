"""The launcher on real servers: life, death, freezing, and commands run around them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.brokers import Server, local
from tests.brokers.fleet import Fleet
from tests.brokers.processes import Process

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, "-m", "tests.brokers"]
# Prints the URL and the server's process id, says so, and waits for its input to end.
WATCH = (
    "import os, redis, sys;"
    "url = os.environ['UNISTREAM_REDIS_URL'];"
    "print(redis.Redis.from_url(url).info()['process_id'], url, flush=True);"
    "sys.stdin.read(); sys.exit(7)"
)


def client_of(server: Server) -> redis.Redis:
    """Return a client that gives up after a second and never repeats itself."""
    return redis.Redis.from_url(server.url, socket_timeout=1, retry=Retry(NoBackoff(), 0))


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which no broker is given and none is up; what a test leaves up is stopped."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UNISTREAM_")}
    kept["UNISTREAM_BROKERS_DIR"] = str(tmp_path)
    kept["UNISTREAM_BROKERS_DOCKER"] = "never"  # the tests watch processes
    yield kept
    subprocess.run([*LAUNCHER, "down"], cwd=REPOSITORY, env=kept, check=True)


def start_watch(environment: dict[str, str]) -> tuple[subprocess.Popen[str], Process]:
    """Start `run` around a command that waits; return it, and the Redis that it started or found."""
    command = [*LAUNCHER, "run", "--only", "redis", "--", sys.executable, "-c", WATCH]
    pipe = subprocess.PIPE
    running = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdin=pipe,
        stdout=pipe,
        text=True,
        # A shell that puts these tests into the background has them ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout is not None
    return running, Process.of(int(running.stdout.readline().split()[0]))


@pytest.mark.redis
def test_redis_survives_kill9_with_port_and_data(tmp_path: Path) -> None:
    """A confirmed entry is there after SIGKILL and restart, at the same URL, in another process."""
    with local("redis", tmp_path) as server:
        before = (server.url, server.pid)
        with client_of(server) as client:
            client.xadd("topic", {"n": "1"})
        server.kill9()
        assert server.state == "dead"
        with client_of(server) as client, pytest.raises(redis.ConnectionError):
            client.ping()
        server.restart()
        with client_of(server) as client:
            assert client.xlen("topic") == 1
        assert server.url == before[0]
        assert server.pid != before[1]
    assert server.state == "dead"


@pytest.mark.redis
def test_a_server_that_another_handle_started_again_is_gone_at_the_end(tmp_path: Path) -> None:
    """The hooks restart it from processes of their own, under another process id."""
    with local("redis", tmp_path) as server:
        Fleet(tmp_path).server("redis").restart()
        assert server.state == "dead"
    assert Fleet(tmp_path).server("redis").state == "dead"


@pytest.mark.redis
def test_volatile_redis_forgets(tmp_path: Path) -> None:
    """The variant without persistence loses a confirmed entry by SIGKILL, as its name says."""
    with local("redis-volatile", tmp_path) as server:
        with client_of(server) as client:
            client.xadd("topic", {"n": "1"})
        server.kill9()
        server.restart()
        with client_of(server) as client:
            assert client.exists("topic") == 0


@pytest.mark.redis
def test_paused_redis_answers_after_resume(tmp_path: Path) -> None:
    """A frozen server accepts connections and answers nothing until it goes on; nothing is lost."""
    with local("redis", tmp_path) as server, client_of(server) as client:
        client.xadd("topic", {"n": "1"})
        server.pause()
        assert server.state == "paused"
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.resume()
        assert client.xlen("topic") == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("redis8", marks=pytest.mark.redis),
        pytest.param("nats", marks=pytest.mark.nats),
        pytest.param("nats-old", marks=pytest.mark.nats),
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        pytest.param("kafka", marks=pytest.mark.kafka),
    ],
)
def test_every_broker_comes_back(name: str, tmp_path: Path) -> None:
    """Each broker stands SIGKILL, restart, freezing and stopping while frozen, and answers a round trip after each."""
    with local(name, tmp_path) as server:
        url = server.url
        server.kill9()
        assert server.state == "dead"
        server.restart()
        server.pause()
        assert server.state == "paused"
        server.resume()
        server.probe()
        server.pause()
    assert server.state == "dead"
    assert server.url == url


@pytest.mark.redis
def test_run_gives_the_url_and_stops_its_server(environment: dict[str, str]) -> None:
    """`run` hands the URL to the command, returns its exit code, and its server ends with it."""
    running, server = start_watch(environment)
    assert server.state == "running"
    running.communicate("")
    assert running.returncode == 7
    assert server.state == "dead"


@pytest.mark.redis
def test_run_leaves_alone_what_is_up(environment: dict[str, str]) -> None:
    """`run` uses the server that `up` started, and the server outlives it with its data."""
    up = subprocess.run(
        [*LAUNCHER, "up", "redis"], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    variable, _, url = up.stdout.removeprefix("export ").strip().partition("=")
    assert variable == "UNISTREAM_REDIS_URL"
    with redis.Redis.from_url(url) as client:
        client.xadd("topic", {"n": "1"})
        running, server = start_watch(environment)
        assert server.pid == client.info()["process_id"]
        running.communicate("")
        assert client.xlen("topic") == 1


@pytest.mark.redis
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_stops_its_server(number: signal.Signals, environment: dict[str, str]) -> None:
    """A run that is interrupted passes the signal on, waits for its command, and stops its server."""
    running, server = start_watch(environment)
    running.send_signal(number)
    assert running.wait() == 128 + number  # its input stays open until then, so only the signal ends the command
    running.communicate()
    assert server.state == "dead"


@pytest.mark.redis
def test_servers_of_a_killed_run_are_swept(environment: dict[str, str]) -> None:
    """What a run leaves behind that was itself ended by SIGKILL is stopped by the next `down`."""
    running, server = start_watch(environment)
    running.kill()
    running.communicate()
    assert server.state == "running"
    subprocess.run([*LAUNCHER, "down"], cwd=REPOSITORY, env=environment, check=True)
    assert server.state == "dead"


@pytest.mark.redis
def test_command_reaches_the_servers_of_its_run(environment: dict[str, str]) -> None:
    """Inside of `run`, the launcher's `kill9` and `restart` act on the run's own server."""
    inside = f"{LAUNCHER[0]} -m tests.brokers"
    script = f"{inside} kill9 redis && {inside} status | grep -q dead && {inside} restart redis && {inside} env"
    done = subprocess.run(
        [*LAUNCHER, "run", "--only", "redis", "--", "sh", "-c", script],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("export UNISTREAM_REDIS_URL=redis://127.0.0.1:")


@pytest.mark.redis
def test_broker_that_cannot_be_had_fails_the_run(environment: dict[str, str]) -> None:
    """A URL where nobody listens fails the run with its own exit code, and the command is not run."""
    environment["UNISTREAM_REDIS_URL"] = "redis://127.0.0.1:1/0"
    done = subprocess.run(
        [*LAUNCHER, "run", "--only", "redis", "--", "echo", "ran"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (125, "")
    assert "UNISTREAM_REDIS_URL is set, but nobody listens there" in done.stderr
