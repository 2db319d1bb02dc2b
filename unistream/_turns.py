"""Fairness where a driver answers at once: then nothing that the application awaits lets the event loop go round."""

from __future__ import annotations

import asyncio

__all__ = ["TURN", "Turns"]

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
