"""Processes that outlive the one that started them: start, find again, signal, wait. Linux only."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def _stat(process: Path) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on; [] when it is gone."""
    try:
        text = (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # gone before, gone while being read
        return []
    return text.rpartition(")")[2].split()


@dataclass(frozen=True)
class Process:
    """
    A process, known by its id and its birth, so that a reused id is never mistaken for it.

    Attributes:
        pid: The process id.
        birth: Start time in the kernel's clock ticks since boot (proc(5), field 22).
    """

    pid: int
    birth: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the process that has this id now."""
        fields = _stat(Path(f"/proc/{pid}"))
        if not fields:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, int(fields[19]))

    @property
    def state(self) -> str:
        """`running`, `paused` (SIGSTOP) or `dead`."""
        process = Path(f"/proc/{self.pid}")
        fields = _stat(process)
        if not fields or int(fields[19]) != self.birth or fields[0] in "ZX":
            return "dead"
        if fields[0] != "T":
            return "running"
        threads = [_stat(thread) for thread in process.glob("task/*")]
        return "paused" if all(thread[0] == "T" for thread in threads if thread) else "running"

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to this very process; False when it is dead."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The handle is pinned to one process: checked after opening, the id can't be reused in between.
            if self.state == "dead":
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for its end, reaping it if it is our child; True when it has ended."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if self.state != "dead" and not select.select([handle], [], [], timeout)[0]:
                return False
        finally:
            os.close(handle)
        with suppress(ChildProcessError):  # started by an earlier command, so not ours to reap
            os.waitpid(self.pid, os.WNOHANG)
        return True


def spawn(argv: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
    """Start a program in a session of its own (Ctrl-C doesn't reach it), its output appended to `log`."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        {**os.environ, **env},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return Process.of(pid)
