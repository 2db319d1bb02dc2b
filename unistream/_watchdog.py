"""Warns when something blocks the event loop for so long that leases are in danger; knows loops and seconds only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

__all__ = ["Watchdog"]

TICKS_PER_LEASE = 12
LEAST_TICK_SECONDS = 0.05

_log = logging.getLogger("unistream.consumer")


class Watchdog:
    """
    Looks at the clock a few times per lease, while deliveries are held, and warns when a look came much too late.

    A handler that blocks the loop stops everything on it, also the renewal of leases: the deliveries are lent again
    while their handlers still run. Costs one timer, and none while nothing is held.

    Args:
        loop: The loop to watch.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._leases: dict[Callable[[], bool], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._warnings = 0

    def add(self, lease: float, holds: Callable[[], bool]) -> None:
        """Watch for a consumer with this lease; `holds` says whether it holds anything."""
        self._leases[holds] = lease

    def remove(self, holds: Callable[[], bool]) -> None:
        """That consumer has left."""
        self._leases.pop(holds, None)
        if not self._leases and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wake(self) -> None:
        """Something is held now."""
        if self._timer is None and self._leases:
            self._tick()

    def _tick(self) -> None:
        lease = min(self._leases.values())
        pause = max(lease / TICKS_PER_LEASE, LEAST_TICK_SECONDS)
        self._timer = self._loop.call_later(pause, self._look, self._loop.time() + pause, lease)

    def _look(self, due: float, lease: float) -> None:
        self._timer = None
        late = self._loop.time() - due
        if late > lease / 3:
            self._warnings += 1
            if self._warnings.bit_count() == 1:
                # Rate-limited by powers of two: what blocks once blocks often.
                _log.warning(
                    "the event loop was blocked for %.1f s, with leases of %g s: deliveries may be lost; "
                    "let handlers await, run blocking code in threads, or raise the lease (seen %d times)",
                    late,
                    lease,
                    self._warnings,
                )
        if any(holds() for holds in self._leases):
            self._tick()
