"""The command `unistream` as a script meets it: what it prints, and the exit codes that it promises."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from tests.system.conftest import TARGETS, url_of
from unistream import connect
from unistream.cli.topics import lags, overview
from unistream.conformance.wrap import DriverLayer, stack
from unistream.driver.types import Member, TopicSpec
from unistream_builtin.driver import MemoryDriver

SECONDS = 60
BROKERS = [target for target in TARGETS if target != "memory"]


def start(*words: str) -> subprocess.Popen[str]:
    """Start the command."""
    return subprocess.Popen(
        [sys.executable, "-c", "from unistream.cli import main; main()", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(*words: str, given: str = "") -> tuple[int, str, str]:
    """Run the command; its exit code, and what it wrote."""
    process = start(*words)
    out, error = process.communicate(given, timeout=SECONDS)
    return process.returncode, out, error


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Let the command run in the background; it is killed if it does not end within its time."""
    process = start(*words)
    guard = threading.Timer(SECONDS, process.kill)
    guard.start()
    try:
        yield process
        process.communicate()
    finally:
        guard.cancel()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["consume", "t", "--group", "g", "--ordering", "kye"], 2, "'kye' is not one of"),
        (["publish", "t", "--url", "memory://x"], 1, "there is no topic 't'"),
        (["publish", "t", "--url", "memroy://x"], 2, "memory"),
        (["topics", "--url", "memory://x"], 0, ""),
        (["conform", "diff", "nowhere.json", "nowhere.json"], 2, "nowhere.json can't be read"),
        (["conform", "memory://x", "--only", "nothing.of-that-name"], 2, "nothing.of-that-name"),
        (["conform", "redis://127.0.0.1:1", "--only", "cfg.unknown-option"], 2, "127.0.0.1:1"),
        (["conform", "memory://x", "--only", "net.half-open", "--require-complete"], 1, ""),
        (["conform", "memory://x", "--only", "cfg.unknown-option"], 0, ""),
        (["conform", "storm", "memory://x", "--shape", "queue"], 1, ""),
    ],
)
def test_exit_code_says_how_it_went(words: list[str], code: int, told: str) -> None:
    """0: done. 1: the broker or the data said no. 2: the call was wrong. The reason is told."""
    returned, out, error = run(*words, given="line\n")
    assert returned == code, out + error
    assert told in error
    assert "Traceback" not in error


def test_lines_are_messages_whatever_ends_them() -> None:
    """The last line needs no end; empty lines are messages; one that is too large is told and counted."""
    given = "one\r\n\ntwo" + "x" * (16 * 1024 * 1024 + 1) + "\nlast"
    code, out, error = run("publish", "t", "--create", "--url", "memory://x", "--json", given=given)
    told = json.loads(out)
    assert (code, told["confirmed"], told["failed"]) == (1, 3, 1), error
    assert "16777" in error


@pytest.mark.parametrize("target", BROKERS)
def test_what_is_published_is_listed_and_consumed(target: str) -> None:
    """Lines with keys go in, the topic and its group are listed with their lag, and the lines come out, once."""
    url, topic = url_of(target), f"cli-{secrets.token_hex(4)}"
    published = run("publish", topic, "--create", "--key-separator", ":", "--url", url, "--json")
    assert published[0] == 0, published[2]
    # Pins the group where the broker keeps nothing for groups that come later.
    assert run("consume", topic, "--group", "g", "--idle", "0.1", "--url", url)[0] == 0
    lines = [f"k{number % 3}:v{number}" for number in range(20)]
    code, out, error = run("publish", topic, "--key-separator", ":", "--url", url, "--json", given="\n".join(lines))
    assert (code, json.loads(out)["confirmed"]) == (0, 20), error
    [listed] = [one for one in rows("topics", "--url", url) if one["topic"] == topic]
    assert (listed["partitions"], listed["groups"]) == (1, 1)
    [group] = rows("groups", topic, "--url", url)
    assert (group["group"], group["lag"]) in (("g", 20), ("g", None))
    got = rows("consume", topic, "--group", "g", "--count", "20", "--url", url)
    assert sorted(f"{one['key']}:{one['value']}" for one in got) == sorted(lines)
    assert rows("consume", topic, "--group", "g", "--idle", "0.5", "--url", url) == []


def test_what_is_deleted_while_it_is_listed_is_left_out() -> None:
    """Others delete topics and groups at any time: a listing tells the rest."""
    turns = count()

    class Elsewhere(DriverLayer):
        async def topics(self) -> Sequence[TopicSpec]:
            found = await super().topics()
            await self.inner.delete_topic(f"goes-{next(turns)}")
            return found

        async def members(self, topic: str, group: str) -> Sequence[Member]:
            if topic == "goes-later":
                await self.inner.delete_topic(topic)
            return await super().members(topic, group)

    async def main() -> None:
        async with connect("memory://x", driver=stack(MemoryDriver, Elsewhere)) as client:
            for topic in ("goes-0", "goes-1", "goes-later", "stays"):
                await client.create_topic(topic)
                await client.group("g", topic).create()
            assert [group.topic for group in await client.groups()] == ["goes-1", "goes-later", "stays"]
            assert [row["topic"] for row in await overview(client)] == ["goes-later", "stays"]
            assert [row["topic"] for row in await lags(client, None)] == ["stays"]

    asyncio.run(main())


def rows(*words: str) -> list[dict[str, Any]]:
    """The JSON lines that a command prints."""
    code, out, error = run(*words, "--json")
    assert code == 0, error
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("target", BROKERS)
def test_a_line_is_sent_when_it_comes_and_ctrl_c_ends_both_sides(target: str) -> None:
    """Nothing waits for the end of standard input; interrupted, publishing and consuming drain and leave with 0."""
    url, topic = url_of(target), f"cli-{secrets.token_hex(4)}"
    assert run("publish", topic, "--create", "--url", url)[0] == 0
    assert run("consume", topic, "--group", "g", "--idle", "0.1", "--url", url)[0] == 0
    with (
        running("publish", topic, "--url", url) as publishing,
        running("consume", topic, "--group", "g", "--url", url) as consuming,
    ):
        assert publishing.stdin is not None
        assert publishing.stdout is not None
        assert consuming.stdout is not None
        publishing.stdin.write("first\n")
        publishing.stdin.flush()
        assert consuming.stdout.readline() == "first\n"
        for process in (publishing, consuming):
            process.send_signal(signal.SIGINT)
        assert publishing.stdout.readline().startswith("confirmed 1 ")
        assert (publishing.wait(SECONDS), consuming.wait(SECONDS)) == (0, 0)
