"""Answers of drivers: fairness where they come at once, and tasks that follow up those that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

__all__ = ["TURN", "Turns", "follow"]

TURN = 1000
"""After so many messages others on the event loop get their turn."""


class Turns:
    """
    Counts messages since the event loop last went round by it.

    Attributes:
        unbroken: Messages that the driver took or gave at once since the last `take`; at `TURN` it is time for one.
    """

    __slots__ = ("unbroken",)

    def __init__(self) -> None:
        self.unbroken = 0

    async def take(self) -> None:
        """Let the event loop go round."""
        self.unbroken = 0
        await asyncio.sleep(0)


def follow(
    following: Coroutine[Any, Any, None], answer: Awaitable[object], done: Callable[[asyncio.Task[None]], None]
) -> asyncio.Task[None]:
    """
    Begin a task that awaits an answer.

    Args:
        following: What the task does.
        answer: What it awaits; closed if the task is cancelled before its first step, as at the end of a loop.
        done: Called with the task at its end.
    """
    task = asyncio.get_running_loop().create_task(following)
    if asyncio.iscoroutine(answer):
        task.add_done_callback(lambda _: answer.close())
    task.add_done_callback(done)
    return task
