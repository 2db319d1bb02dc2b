"""When leases must be renewed and when they have ended; time comes in as a number of seconds.

All deliveries of one fetch share one `Lease`, so that renewing costs one call per fetch and memory stays flat.
"""

from __future__ import annotations

from math import inf

__all__ = ["Lease", "Leases"]


class Lease:
    """
    The shared lease of the deliveries that were lent together.

    Attributes:
        deadline: When it ends unless it is renewed.
        until: Beyond this nothing is renewed.
        held: Deliveries that are under it and unsettled.
    """

    __slots__ = ("deadline", "held", "until")

    def __init__(self, deadline: float, until: float, held: int) -> None:
        self.deadline = deadline
        self.until = until
        self.held = held


class Leases:
    """
    The leases of one member.

    A lease is renewed when a third of it has passed, together with those that are nearly due, until `max_lease` has
    passed since lending (DEL-6).

    Args:
        lease: Seconds.
        max_lease: Seconds; equal to `lease`: nothing is renewed.
    """

    def __init__(self, lease: float, max_lease: float) -> None:
        self.lease = lease
        self.max_lease = max_lease
        self._active: dict[Lease, None] = {}

    def grant(self, now: float, count: int) -> Lease:
        """A new lease over `count` deliveries lent at `now`."""
        lease = Lease(now + min(self.lease, self.max_lease), now + self.max_lease, count)
        self._active[lease] = None
        return lease

    def split(self, lease: Lease, deadline: float, until: float) -> Lease:
        """Move one delivery of `lease` under a lease of its own."""
        own = Lease(deadline, until, 1)
        self._active[own] = None
        self.drop(lease)
        return own

    def drop(self, lease: Lease) -> None:
        """One delivery under `lease` was settled or lost."""
        lease.held -= 1
        if lease.held <= 0:
            self.ended(lease)

    def ended(self, lease: Lease) -> None:
        """Nothing is under `lease` any more."""
        self._active.pop(lease, None)

    def due(self, now: float) -> dict[Lease, float]:
        """The leases to renew now, each with the seconds to renew it for."""
        soon = now + self.lease / 6
        return {
            lease: min(self.lease, lease.until - now)
            for lease in self._active
            if lease.deadline < lease.until and self._renew_at(lease) <= soon and lease.deadline > now
        }

    def expired(self, now: float) -> list[Lease]:
        """The leases that have ended."""
        return [lease for lease in self._active if lease.deadline <= now]

    def next_at(self) -> float:
        """When `due` or `expired` has something next; infinity if never."""
        return min(map(self.wake_at, self._active), default=inf)

    def wake_at(self, lease: Lease) -> float:
        """When `due` or `expired` has this lease."""
        return self._renew_at(lease) if lease.deadline < lease.until else lease.deadline

    def _renew_at(self, lease: Lease) -> float:
        return lease.deadline - self.lease * 2 / 3

    def renewed(self, lease: Lease, asked_at: float, seconds: float) -> None:
        """The broker agreed to a renewal for `seconds` that was asked for at `asked_at`."""
        lease.deadline = max(lease.deadline, min(asked_at + seconds, lease.until))
