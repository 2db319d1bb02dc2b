"""Knows how to run members and producers as processes of their own, and to kill, stop and continue them for real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from unistream.conformance.history import Event
from unistream.conformance.plan import Handling
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.trial import CheckError, Trial, VacuousError
from unistream.errors import UnsupportedError

if TYPE_CHECKING:
    from unistream import Group

END_SECONDS = 20.0
"""How long a process may take to leave properly before it is killed."""


class WorkerError(Exception):
    """
    A worker answered with an error.

    Attributes:
        kind: Name of the error's class.
        stored: As of a publish's error.
    """

    def __init__(self, kind: str, text: str, stored: str | None) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.stored = stored


class WorkerDiedError(Exception):
    """The worker ended before it answered."""


@dataclass(frozen=True, slots=True)
class Held:
    """A delivery in a worker's hands."""

    worker: Worker
    lending: str
    msg: str
    attempt: int
    key: str | None

    async def ack(self, *, confirm: bool = False) -> str:
        """Ack; return the delivery's state."""
        return str(await self.worker.call("settle", lending=self.lending, op="ack", confirm=confirm))

    async def nack(self, delay: float) -> str:
        """Nack; return the delivery's state."""
        return str(await self.worker.call("settle", lending=self.lending, op="nack", delay=delay))

    async def reject(self) -> str:
        """Reject; return the delivery's state."""
        return str(await self.worker.call("settle", lending=self.lending, op="reject"))

    async def state(self) -> str:
        """Return the delivery's state, as the worker sees it."""
        return str(await self.worker.call("state", lending=self.lending))


class Worker:
    """
    One process, with a client of its own.

    Attributes:
        name: Of the process in the history.
        members: Its members that have joined and not left.
    """

    def __init__(self, trial: Trial, name: str) -> None:
        self.trial = trial
        self.name = name
        self.members: list[str] = []
        self._events = trial.recorder.part()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._stderr: deque[str] = deque(maxlen=30)
        self._stopped_at: int | None = None
        self._gone = False
        self._process: asyncio.subprocess.Process
        self._listening: list[asyncio.Task[None]] = []

    async def start(self, *, wire: bool) -> None:
        """
        Start the process and let it connect.

        Raises:
            VacuousError: The driver can't be named by an import path, so no other process can have it.
        """
        target = self.trial.target
        if "<locals>" in target.driver.__qualname__:
            raise VacuousError(f"{target.driver.__qualname__} has no import path, so no process can load it")
        names = {saboteur.layer: saboteur.name for saboteur in load_saboteurs().values()}
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "unistream.conformance.member",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            limit=1 << 26,
        )
        self._listening = [asyncio.create_task(self._listen()), asyncio.create_task(self._overhear())]
        await self.call(
            "open",
            url=target.url,
            driver=f"{target.driver.__module__}:{target.driver.__qualname__}",
            layers=[names[layer] for layer in target.layers],
            run=self.trial.run,
            name=self.name,
            wire=wire,
        )

    async def call(self, do: str, **data: Any) -> Any:
        """
        Let the process do something; return its answer.

        Raises:
            WorkerError: It raised.
            UnsupportedError: It was told so.
            WorkerDiedError: It is gone.
        """
        if self._gone:
            raise WorkerDiedError(f"{self.name} is gone")
        self._number += 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[self._number] = answer
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": self._number, "do": do, **data}).encode() + b"\n")
        return await answer

    async def join(self, group: Group, *, max_in_flight: int = 100) -> str:
        """Let it join a group as a new member; return the member's name."""
        member = self.trial.fresh(f"{self.name}-m")
        options = self.trial.options_of(group)
        if (retry := options.get("retry")) is not None:
            options["retry"] = {"max_attempts": retry.max_attempts, "backoff": _backoff(retry.backoff)}
        await self.call(
            "join", member=member, topic=group.topic, group=group.name, options=options, max_in_flight=max_in_flight
        )
        self.members.append(member)
        return member

    async def receive(self, timeout: float, member: str | None = None) -> Held | None:
        """Let a member wait for a delivery."""
        got = await self.call("receive", member=member or self.members[-1], timeout=timeout)
        return None if got is None else Held(self, got["lending"], got["msg"], got["attempt"], got["key"])

    async def next(self, rule: str = "GRP-1", *, timeout: float | None = None) -> Held:
        """Let its member receive a delivery that must come."""
        limit = self.trial.pace.patience if timeout is None else timeout
        held = await self.receive(limit)
        if held is None:
            raise CheckError(rule, f"a delivery to {self.members[-1]} within {limit} s", "none")
        return held

    async def work(self, handling: Handling, *, seed: int = 0) -> None:
        """Let its members receive and settle by themselves."""
        for member in self.members:
            await self.call("work", member=member, seed=seed, lease=self.trial.lease, handling=asdict(handling))

    async def leave(self) -> None:
        """Let its members leave properly."""
        while self.members:
            await self.call("leave", member=self.members.pop(0), drain=0.0)

    async def wire(self, fault: str, *arguments: Any) -> dict[str, int]:
        """Harm or heal its wire, by the name of a method of `Proxy`; return bytes carried, lost, connections broken."""
        return dict(await self.call("wire", fault=fault, arguments=list(arguments)))

    # Signals

    async def kill(self) -> None:
        """SIGKILL, now; on return it is gone."""
        self.mourn()
        self._process.kill()
        await self.gone()

    def mourn(self) -> None:
        """Record that its members are dead from now on: before the deed, since nobody may hold longer than it lived."""
        for member in self.members:
            self.trial.recorder.record("death", member=member)
        self.members.clear()
        self.trial.tally("killed")

    def stop(self) -> None:
        """SIGSTOP: it stands still, its connections stay open."""
        self._stopped_at = self.trial.recorder.now()
        self._process.send_signal(signal.SIGSTOP)
        self.trial.tally("stopped")

    def resume(self) -> None:
        """SIGCONT; nothing happens when it was not stopped."""
        if self._stopped_at is None:
            return
        self._process.send_signal(signal.SIGCONT)
        for member in self.members:
            self.trial.recorder.record("fault", member=member, since=self._stopped_at, note="process stopped")
        self._stopped_at = None

    async def gone(self) -> int:
        """Wait until the process has ended and everything that it said was heard; return its exit code."""
        code = await self._process.wait()
        await asyncio.wait(self._listening)
        return code

    async def close(self) -> None:
        """Let it leave properly, or kill it when that takes too long."""
        self.resume()
        if not self._gone and self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self.gone()
        except TimeoutError:
            self._process.kill()
            await self.gone()

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        while (line := await self._process.stdout.readline()).endswith(b"\n"):
            message = json.loads(line)
            if "event" in message:
                self._events.append(Event(**message["event"]))
                continue
            answer = self._answers.pop(message["id"])
            if answer.done():
                continue
            if message.get("error") == UnsupportedError.__name__:
                # What the target does not offer is the runner's to judge, whichever process was told so.
                answer.set_exception(UnsupportedError(message["text"]))
            elif "error" in message:
                answer.set_exception(WorkerError(message["error"], message["text"], message["stored"]))
            else:
                answer.set_result(message["ok"])
        self._gone = True
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerDiedError(f"{self.name} ended: {' | '.join(self._stderr) or 'no word'}"))
        self._answers.clear()

    async def _overhear(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self._stderr.append(line.decode(errors="replace").rstrip())


def _backoff(backoff: Any) -> dict[str, float]:
    return {name: getattr(backoff, name) for name in ("first", "factor", "max", "jitter")}


@asynccontextmanager
async def _working(worker: Worker, wire: bool) -> AsyncIterator[Worker]:
    try:
        await worker.start(wire=wire)
        yield worker
    finally:
        if hasattr(worker, "_process"):
            await worker.close()


async def worker(trial: Trial, *, wire: bool = False) -> Worker:
    """
    Return a process with a client of its own, which lasts as long as the trial unless it is killed.

    Args:
        trial: Takes what it records.
        wire: Whether it gets a proxy of its own, in its own process.
    """
    return await trial.keep(_working(Worker(trial, trial.fresh("w")), wire))
