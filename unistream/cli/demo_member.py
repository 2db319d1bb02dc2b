"""One member of the demonstration: handles departures, fails on some, and reports every step.

On a broker with sockets it is a process of its own (`python -m unistream.cli.demo_member`), which prints one JSON
object per line and can be killed with SIGKILL. On `memory://`, where there is one process, it is an event loop in a
thread that can be frozen for good.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from unistream import Backoff, Delivery, Retry, connect

__all__ = ["Member", "MemberPlan", "ProcessMember", "Report", "ThreadMember", "run_member"]

Report = Callable[[dict[str, Any]], None]
POISON = b"poison"


@dataclass(frozen=True)
class MemberPlan:
    """What a member does.

    Attributes:
        fail_every: Handlers fail on the first attempt of every so many-th message.
        handle_seconds: How long a handler takes.
    """

    url: str
    topic: str
    group: str
    name: str
    ordering: Literal["none", "key"]
    lease: float
    dead_letter: str
    fail_every: int = 200
    handle_seconds: float = 0.001
    concurrency: int = 8


async def run_member(plan: MemberPlan, report: Report, stopping: asyncio.Event) -> None:
    """Handle deliveries until told to stop; `report` gets one dict per attempt, and one when joined and left."""

    async def handle(delivery: Delivery) -> None:
        number = int(delivery.headers["number"])
        outcome = "handled"
        at = time.monotonic_ns()
        try:
            await asyncio.sleep(plan.handle_seconds)
            if delivery.headers.get("mark") == POISON and plan.ordering == "none":
                outcome = "failed"
                raise ValueError("this departure can't be read")
            if number % plan.fail_every == 0 and delivery.attempt == 1:
                outcome = "failed"
                raise ConnectionError("the departure board did not answer")
        finally:
            key = delivery.key.decode() if delivery.key else None
            report(
                {
                    "event": outcome,
                    "number": number,
                    "key": key,
                    "attempt": delivery.attempt,
                    "at": at,
                    "who": plan.name,
                }
            )

    async with connect(plan.url) as client:
        group = client.group(
            plan.group,
            plan.topic,
            ordering=plan.ordering,
            lease=plan.lease,
            retry=Retry(max_attempts=5, backoff=Backoff(first=0.1, factor=2, max=1.0)),
            dead_letter=plan.dead_letter,
        )
        report({"event": "joined", "who": plan.name})
        running = asyncio.create_task(group.run(handle, concurrency=plan.concurrency, drain=5.0))
        await asyncio.wait([running, stop := asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        running.cancel()
        await asyncio.wait([running])
        if not running.cancelled():
            running.result()
    report({"event": "left", "who": plan.name})


class Member(Protocol):
    """A member as the demonstration sees it."""

    name: str

    def kill(self) -> None:
        """End it without a word."""

    async def stop(self) -> None:
        """Let it drain and leave."""


class ThreadMember:
    """A member on an event loop of its own in this process."""

    def __init__(self, plan: MemberPlan, report: Report) -> None:
        self.name = plan.name
        self._plan = plan
        self._report = report
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._killed = False
        self._thread = threading.Thread(target=self._serve, name=plan.name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(run_member(self._plan, self._report, self._stopping))
        self._task.add_done_callback(lambda _: self._loop.stop())
        self._loop.run_forever()

    def kill(self) -> None:
        """Freeze its loop for good: no handler goes on, nothing is settled, renewed or given back."""
        self._killed = True
        self._loop.call_soon_threadsafe(threading.Event().wait)

    async def stop(self) -> None:
        """Let it drain and leave."""
        if not self._killed:
            self._loop.call_soon_threadsafe(self._stopping.set)
            await asyncio.to_thread(self._thread.join)
            self._task.result()


class ProcessMember:
    """A member in a process of its own."""

    def __init__(self, plan: MemberPlan, process: asyncio.subprocess.Process, report: Report) -> None:
        self.name = plan.name
        self._process = process
        self._reading = asyncio.create_task(self._read(report))

    @classmethod
    async def start(cls, plan: MemberPlan, report: Report) -> ProcessMember:
        """Start the process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "unistream.cli.demo_member",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        # The plan goes through the pipe, not the command line: a URL may hold a password.
        process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
        await process.stdin.drain()
        return cls(plan, process, report)

    async def _read(self, report: Report) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            report(json.loads(line))

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    async def stop(self) -> None:
        """Close its standard input, which tells it to drain and leave."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
        await self._reading


def _main() -> None:
    async def run() -> None:
        plan = MemberPlan(**json.loads(sys.stdin.readline()))
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait_for_end() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(stopping.set)

        threading.Thread(target=wait_for_end, daemon=True).start()
        await run_member(plan, _print, stopping)

    asyncio.run(run())


def _print(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
