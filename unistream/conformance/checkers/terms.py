"""Knows what a history is judged by: the claims of the backend and the parameters of the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Terms:
    """
    What the target promises beyond the mandatory rules, and the tolerances of this run. All times in seconds.

    Every default is the strictest claim with no tolerance, as it holds on the reference broker under a virtual clock.
    """

    dedupe: bool = True
    """One copy per message, also across the library's own retries (PUB-3)."""
    positions: bool = True
    """Receipts and deliveries carry positions that stay the same over redelivery and rise within a partition."""
    fencing: bool = True
    """A settle by a member whose lease has ended is refused (DEL-7)."""
    attempts_exact: bool = True
    """`attempt` never falls, also over the crash of a member (DEL-4)."""
    nacks_twice: bool = False
    """A nack around which the connection was lost may leave the message twice (DEL-7)."""
    nack_kept_for: float = 0.0
    """For so long a member may keep what it nacked; if it dies or is cut off meanwhile, the delay ends (DEL-2)."""
    lease_scope: str = "message"
    """`message`, `member` or `connection`: with the latter two a fault of the member's connection ends its leases."""
    blocks: str = "key"
    """What an unsettled message of an ordered group holds up: its `key` or its `partition` (ORD-2)."""
    rebalances: bool = False
    """Joining and leaving may take unsettled messages away from members that stay (DEL-9)."""
    durable: bool = True
    """Settles that the broker held, and its counts of attempts, survive its crash."""
    retention: bool = False
    """The user declared a retention, so unsettled messages may be removed, if that is reported (END-4)."""
    fifo: bool = False
    """One partition, one member, no redelivery: deliveries come in publish order (ORD-5)."""
    recover_within: float = 0.0
    """How long after the end of a lost member's lease its messages go to others (GRP-4)."""
    settle_flush: float = 0.1
    """A healthy member's plain ack is held by the broker after this time (acks are coalesced)."""
    resolution: float = 0.001
    """Clocks and timers of the broker may differ by this much."""
    grace: float = 0.5
    """What a loaded machine may add to any limit that asks for something to happen."""
    sometimes: tuple[str, ...] = ()
    """Counters that must not be zero, or the run has shown nothing."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that the history breaks, and the events that show it."""

    rule: str
    """The rule's id in the contract, such as `PUB-1`."""
    checker: str
    events: tuple[int, ...]
    """Indices into the history; the last one is where it went wrong."""
    message: str

    def __str__(self) -> str:
        return f"{self.rule} {self.checker}: {self.message}"
