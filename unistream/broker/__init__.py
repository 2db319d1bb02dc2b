"""The reference broker: topics, groups, leases and order in one process, and the judge of what the contract means.

It imports nothing of unistream, so that a mistake there is not repeated here. `core` is a state machine without clock
or I/O; `host` gives it a lock, clocks and wake-ups.

What stays: messages that some group has not settled, always; settled ones as a history for replay, up to
`Limits.history_messages` and `history_bytes` per topic; with a declared retention exactly what that says, settled or
not, and what a group loses by it is counted and told.
"""

from __future__ import annotations

from .errors import BrokerError, GroupMissing, InvalidRequest, PositionOutOfRange, SessionEnded, TopicMissing
from .host import Host, Member, named
from .lease import OFFSETS, Lent, Tag
from .spec import AtOffset, AtTime, GroupSpec, Limits, Start, TopicSpec
from .topic import Published

__all__ = [
    "OFFSETS",
    "AtOffset",
    "AtTime",
    "BrokerError",
    "GroupMissing",
    "GroupSpec",
    "Host",
    "InvalidRequest",
    "Lent",
    "Limits",
    "Member",
    "PositionOutOfRange",
    "Published",
    "SessionEnded",
    "Start",
    "Tag",
    "TopicMissing",
    "TopicSpec",
    "named",
]
