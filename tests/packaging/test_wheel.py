"""What a stranger gets who installs the wheel and nothing else."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

HELLO = """
import asyncio, unistream
async def main():
    async with unistream.connect("memory://x") as client:
        await client.create_topic("t")
        group = client.group("g", "t")
        await group.create()
        async with client.producer("t") as producer:
            await producer.publish(b"hello")
        async with group.consumer() as consumer:
            delivery = await consumer.receive(5)
            await delivery.ack()
            print(delivery.value)
asyncio.run(main())
"""


def python(programs: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UNISTREAM", "PYTHON"))}
    return subprocess.run(
        [programs / "python", "-c", code], capture_output=True, text=True, env=environment, cwd=programs, check=False
    )


def test_wheel_holds_the_suite_the_broker_and_every_adapter(wheel: Path) -> None:
    """The suite and the adapters ship in the wheel; tests and benchmarks do not."""
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.partition("/")[0] for name in names}

    assert {"unistream", "unistream_builtin", "unistream_redis"} <= packages
    assert not packages & {"tests", "benchmarks", "adapters", "examples", "docs"}
    assert "unistream/py.typed" in names
    assert "unistream/cli/data/departures.csv" in names
    assert any(name.startswith("unistream/conformance/cases/") for name in names)
    assert any(name.startswith("unistream_redis/scripts/") for name in names)


def test_bare_install_runs_on_memory_and_names_what_is_missing(fresh: Callable[..., Path]) -> None:
    """Without extras the embedded broker works; a missing client or command line is said in one sentence."""
    programs = fresh()

    hello = python(programs, HELLO)
    assert (hello.returncode, hello.stdout) == (0, "b'hello'\n"), hello.stderr

    redis = python(programs, "import unistream; unistream.connect('redis://localhost')")
    assert redis.stderr.splitlines()[-1].startswith("unistream.errors.MissingClientError"), redis.stderr
    assert "unistream-mq" in redis.stderr

    command = subprocess.run([programs / "unistream", "demo"], capture_output=True, text=True, check=False)
    assert command.returncode == 1
    assert "extra `cli`" in command.stderr

    clients = "('redis', 'kafka', 'pika', 'nats', 'typer')"
    imported = python(programs, f"import sys, unistream; print([name for name in {clients} if name in sys.modules])")
    assert imported.stdout == "[]\n"
