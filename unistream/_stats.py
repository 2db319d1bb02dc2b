"""The counts that producers and consumers keep for the application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from unistream.errors import DroppedError, UnistreamError

__all__ = ["ConsumerStats", "DrainReport", "ProducerStats"]


@dataclass(slots=True)
class ProducerStats:
    """
    What became of every message; `confirmed + failed + unknown + dropped + in_flight == published`, always.

    Attributes:
        published: Calls of `publish` and `submit`, and messages of `publish_many`.
        confirmed: The broker holds them.
        failed: Surely not stored.
        unknown: Perhaps stored.
        dropped: Dropped by `when_full`, or cancelled, before they were handed to the broker.
        in_flight: Not decided yet.
    """

    published: int = 0
    confirmed: int = 0
    failed: int = 0
    unknown: int = 0
    dropped: int = 0
    in_flight: int = 0

    def count(self, error: UnistreamError) -> None:
        """One message ended with `error`."""
        if isinstance(error, DroppedError):
            self.dropped += 1
        elif error.stored == "unknown":
            self.unknown += 1
        else:
            self.failed += 1


class DrainReport(NamedTuple):
    """
    What became of the deliveries of a consumer, from joining to leaving.

    Attributes:
        handled: Settled by the application, or dead-lettered for it.
        returned: Given back unsettled; another member, or the same one after a restart, gets them.
        abandoned: Not given back, since the broker was out of reach; they come again when their leases end.
    """

    handled: int
    returned: int
    abandoned: int


@dataclass(slots=True)
class ConsumerStats:
    """
    What this consumer has seen.

    Attributes:
        delivered: Deliveries handed to the application.
        redelivered: Of these, with `attempt` above 1.
        acked: Acks accepted for sending.
        nacked: Nacks, those of the last attempt included.
        rejected: Rejects, and messages moved aside because no attempt was left.
        dead_lettered: Messages moved to the dead letter topic.
        dropped: Messages dropped, because there is no dead letter topic.
        acks_lost: Acks and rejects that came to nothing: refused by the broker after they had been accepted, or too
            late when a block or handler ended.
        leases_lost: Leases that ended before their delivery was settled.
    """

    delivered: int = 0
    redelivered: int = 0
    acked: int = 0
    nacked: int = 0
    rejected: int = 0
    dead_lettered: int = 0
    dropped: int = 0
    acks_lost: int = 0
    leases_lost: int = 0
