"""What the checkers find in a history, as records: publishes, lendings, members, groups, faults."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

__all__ = ["Fault", "Group", "Lending", "Member", "Operation", "Publish", "Where", "earliest"]

Where = tuple[str, str]
"""A group: topic and name, because a group's name is scoped by its topic."""


@dataclass(slots=True)
class Operation:
    """An invocation and what became of it; `outcome` is `info` as long as nothing came back."""

    op: str
    index: int
    began: int
    outcome: str = "info"
    done: int | None = None
    done_index: int | None = None
    delay: float | None = None
    confirmed: bool = False
    error: str | None = None


@dataclass(slots=True)
class Publish:
    """One message handed to a producer. `segment` counts the unknown outcomes of its producer and key before it."""

    msg: str
    topic: str
    key: str | None
    call: Operation
    digest: str | None
    producer: str
    number: int
    segment: int
    partition: int | None = None
    position: str | None = None


@dataclass(slots=True)
class Lending:
    """One delivery of a message to one member, until it was settled or its lease ended."""

    index: int
    at: int
    name: str
    where: Where
    member: str
    msg: str | None
    key: str | None
    attempt: int
    until: int | None
    partition: int | None
    position: str | None
    digest: str | None
    error: str | None
    origin: str | None = None
    """Where a dead letter comes from, `topic/group`."""
    settles: list[Operation] = field(default_factory=list)
    extends: list[Operation] = field(default_factory=list)
    expired: int | None = None
    """When the delivery itself said that it was lost."""
    refused: bool = False
    """Whether it said so after its settle had been taken: the broker refused that one later."""

    @property
    def settle(self) -> Operation | None:
        """The first settle that was not refused as misuse, if any."""
        return next((call for call in self.settles if call.error != "AlreadySettledError"), None)


@dataclass(slots=True)
class Member:
    """One consumer from joining to leaving or death."""

    name: str
    where: Where
    joined: int
    limit: int | None
    leaving: int | None = None
    left: int | None = None
    died: int | None = None
    idle: list[tuple[int, int]] = field(default_factory=list)
    """When it waited for work and had room for it."""

    @property
    def gone(self) -> int | None:
        """When it began to leave, or died."""
        return earliest(self.leaving, self.died)


@dataclass(slots=True)
class Group:
    """One group; `created` is None when nobody saw it created."""

    where: Where
    created: int | None = None
    created_index: int = 0
    ordering: str = "none"
    start: str = "latest"
    lease: float = 30.0
    backoff: float = 330.0
    """The longest wait that the retry policy gives a nack without a delay of its own."""
    max_attempts: int | None = None
    dead_letter: str | None = None
    """The topic that takes what is rejected."""
    members: list[Member] = field(default_factory=list)
    lendings: list[Lending] = field(default_factory=list)
    stale: list[Lending] = field(default_factory=list)
    """Those whose lease was over when a process that had stood still handed them out; in no other list."""
    by_msg: dict[str, list[Lending]] = field(default_factory=lambda: defaultdict(list))
    """The lendings of every message, in order; dead letters by `copy_name`, since two groups may send one each."""
    seeks: list[int] = field(default_factory=list)
    losses: int = 0
    drained: str | None = None
    """The phase of the last drain: `ok` complete, `info` out of time, `fail` stuck; None never drained."""
    drain_index: int | None = None


@dataclass(slots=True)
class Fault:
    """Something that was done to the system from `began` until `ended`; `member` None means to all."""

    began: int
    ended: int
    member: str | None
    note: str

    def touches(self, member: str) -> bool:
        """Tell whether the fault could have reached `member`."""
        return self.member is None or self.member == member


def earliest(*times: int | None) -> int | None:
    """The first of the times that are known; None if none is."""
    known = [time for time in times if time is not None]
    return min(known) if known else None
