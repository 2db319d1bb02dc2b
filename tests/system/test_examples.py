"""The examples run, and one program text gives the same outcome on every broker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import TARGETS

EXAMPLES = Path(__file__).parents[2] / "examples"
PROFILES = {"memory": "local", "redis": "redis", "kafka": "kafka", "amqp": "rabbitmq", "nats": "nats"}
OUTCOME = "billed 200 · failed once 4 · audited per key in order: True\n"


def run(*arguments: str) -> str:
    """Run an example; what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=110, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_swap_gives_the_same_outcome_on_every_broker(target: str) -> None:
    """One program, one file, another profile: the same line."""
    assert run(str(EXAMPLES / "swap" / "app.py"), PROFILES[target]) == OUTCOME


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hello.py", "received hello for b'world'"),
        ("hello_sync.py", "received hello for b'world'"),
        ("dead_letters.py", "attempts=3"),
        ("ordering.py", "ordered: ['m1', 'm2', 'm3', 'm4', 'm5']"),
        ("overload.py", "confirmed 100, refused by the broker 50"),
    ],
)
def test_example_prints_what_it_shows(name: str, expected: str) -> None:
    """Each example runs without a server."""
    assert expected in run(str(EXAMPLES / name))


def test_demo_loses_nothing(url: str) -> None:
    """A killed member, failing handlers and a poison message: nothing is lost, and order per key is kept."""
    printed = run("-c", DEMO, "demo", url)
    assert printed.splitlines()[-1].endswith("dead-lettered 1 · lost 0")
    assert "order kept for 1879 of 1879 keys" in printed
    assert "was killed in the middle" in printed


DEMO = "from unistream.cli import main; main()"
