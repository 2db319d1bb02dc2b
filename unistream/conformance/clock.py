"""Knows an event loop whose time is virtual: it jumps to the next timer when nothing is ready, and never sleeps.

A run on it is as fast as its code and, given a seed, the same every time. It refuses to hang: when nothing is ready
and no timer is set, or virtual time or steps run away, it raises and says where every task waits.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

START = 10_000_000.0
"""Where virtual time begins, in seconds; not zero, so that a time mistaken for a flag does not pass for absent, and
far from the machine's own monotonic clock, so that nobody takes the one for the other."""


class StuckError(RuntimeError):
    """The program on the virtual clock can't go on; the message lists what every task waits for."""


class _VirtualSelector(selectors.DefaultSelector):
    """Polls its descriptors without waiting, and lets the loop's time pass instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready now; if nothing is, move time on by `timeout`."""
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready:
            self.loop.pass_time(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """
    An event loop on virtual time.

    Args:
        limit: Virtual seconds after which a run counts as running away.
        steps: Rounds of the loop at one and the same time after which it counts as spinning.
    """

    def __init__(self, *, limit: float = 7 * 86_400.0, steps: int = 200_000) -> None:
        selector = _VirtualSelector()
        selector.loop = self
        self._now = START
        self._limit = START + limit
        self._steps = steps
        self._left = steps
        super().__init__(selector)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def time_ns(self) -> int:
        """Return the virtual time in nanoseconds, for a recorder."""
        return round(self._now * 1e9)

    def pass_time(self, timeout: float | None) -> None:
        """
        Move time on by `timeout` seconds.

        Raises:
            StuckError: There is no timer to move on to, or a limit is passed.
        """
        if timeout is None:
            raise StuckError(f"nothing is ready and no timer is set at {self._now - START:.3f} s\n{self._waits()}")
        if timeout > 0:
            self._now += timeout
            self._left = self._steps
        else:
            self._left -= 1
        if self._left <= 0:
            self._left = self._steps  # what cancels the tasks afterwards needs steps too
            raise StuckError(f"{self._steps} rounds without time passing at {self._now - START:.3f} s\n{self._waits()}")
        if self._now > self._limit:
            raise StuckError(f"still running after {self._now - START:.0f} virtual seconds\n{self._waits()}")

    def _waits(self) -> str:
        lines = []
        for task in sorted(asyncio.all_tasks(self), key=lambda task: task.get_name()):
            frames = task.get_stack(limit=1)
            where = f"{frames[0].f_code.co_qualname} line {frames[0].f_lineno}" if frames else "not started"
            lines.append(f"  {task.get_name()}: {where}")
        return "\n".join(lines) or "  no task is left"


def run(main: Coroutine[Any, Any, T], *, limit: float = 7 * 86_400.0) -> T:
    """
    Run `main` on a fresh virtual loop and return its result.

    Raises:
        StuckError: It can't end.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit=limit)) as runner:
        return runner.run(main)
