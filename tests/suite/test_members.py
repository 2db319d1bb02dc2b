"""A worker process does what it is told, leaves a history behind whatever befalls it, and keeps the URL to itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from unistream.conformance.members import Worker, WorkerDiedError, WorkerError, worker
from unistream.conformance.target import Target
from unistream.conformance.trial import Trial, VacuousError
from unistream_builtin import MemoryDriver

LIMIT = 60.0


def proc(each: Worker, name: str) -> bytes:
    """Return what the machine says of a worker's process."""
    return Path(f"/proc/{each._process.pid}/{name}").read_bytes()


def run(test: Callable[[Trial], Awaitable[None]], target: Target | None = None) -> Trial:
    """Run a test with a trial on a broker that every process has for itself, in real time."""
    chosen = target or replace(Target.of("memory://members"), virtual=False)

    async def main() -> Trial:
        async with asyncio.timeout(LIMIT):
            trial = Trial(chosen, "members")
            async with trial:
                await test(trial)
            return trial

    return asyncio.run(main())


def test_a_worker_answers_errors_as_errors() -> None:
    """What is raised in the process is raised here, by name; afterwards it works on."""

    async def test(trial: Trial) -> None:
        each = await worker(trial)
        with pytest.raises(WorkerError, match="TopicMissingError"):
            await each.call("produce", producer="p", topic="nowhere")
        with pytest.raises(WorkerError, match="TopicMissingError"):
            await each.call("produce", producer="q", topic="nowhere")

    run(test)


def test_a_killed_worker_is_gone_and_its_members_are_dead() -> None:
    """SIGKILL is real: calls under way fail, and so do those that follow."""

    async def test(trial: Trial) -> None:
        each = await worker(trial)
        each.members.append("m")
        pid = each._process.pid
        under_way = asyncio.create_task(each.call("receive", member="m", timeout=1.0))
        await each.kill()
        with pytest.raises((WorkerDiedError, WorkerError)):
            await under_way
        with pytest.raises(WorkerDiedError):
            await each.call("rest")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    trial = run(test)
    assert [event.member for event in trial.recorder.history() if event.op == "death"] == ["m"]


def test_a_stopped_worker_answers_after_it_goes_on() -> None:
    """SIGSTOP is real, and a fault of its members; SIGCONT ends it."""

    async def test(trial: Trial) -> None:
        each = await worker(trial)
        each.members.append("m")
        each.stop()
        answer = asyncio.create_task(each.call("rest"))
        while proc(each, "stat").rpartition(b")")[2].split()[0] != b"T":  # noqa: ASYNC110 - the kernel sends no event
            await asyncio.sleep(0.001)
        assert not answer.done()
        each.resume()
        assert await answer == 0
        each.members.clear()

    trial = run(test)
    faults = [event for event in trial.recorder.history() if event.op == "fault"]
    assert [(event.member, event.note) for event in faults] == [("m", "process stopped")]


def test_the_url_is_on_no_command_line() -> None:
    """The URL, and so a password, goes through the pipe."""

    async def test(trial: Trial) -> None:
        each = await worker(trial)
        line = proc(each, "cmdline")
        assert b"unistream.conformance.member" in line
        assert b"memory://" not in line

    run(test)


def test_a_driver_without_an_import_path_shows_nothing() -> None:
    """A driver that no other process can load makes the case UNVERIFIED, not passed."""

    class Local(MemoryDriver):
        """Found by no import path, since it is local to a function."""

    async def test(trial: Trial) -> None:
        with pytest.raises(VacuousError, match="import path"):
            await worker(trial)

    run(test, replace(Target.of("memory://members"), virtual=False, driver=Local))
