"""Knows the names of everything this adapter keeps in RabbitMQ, and how they are escaped into 255 bytes.

Topic and group names are `[A-Za-z0-9._-]{1,200}`. The dot separates the parts of a queue's name, so a dot inside a part
becomes `%2E`. `~` never comes from a name: what carries it was made up here. A queue name that would grow too long
keeps its beginning and ends in `~` and a hash.
"""

from __future__ import annotations

from hashlib import sha256

from unistream.driver.types import TopicSpec

__all__ = ["DELAY", "GONE", "LINE", "LOCK", "REGISTRY", "RETURN", "GroupQueues", "delay_name", "exchange_of", "lock_of"]

REGISTRY = "us~registry"
"""Stream queue whose last message describes every topic and group."""
LOCK = "us~registry.lock"
"""Exclusive queue that whoever changes the registry holds meanwhile; with a topic's name, whoever changes the topic."""
LINE = "us~registry.line"
"""Queue in whose consumers those who wait for `LOCK` stand in line; it is gone when nobody waits."""
RETURN = "us~return"
"""Direct exchange through which delayed messages come back: the routing key is the queue."""
GONE = "us~gone"
"""Alternate exchange of `RETURN`, and the queue behind it, for messages whose group was deleted meanwhile."""
DELAY = "us~delay"
"""In front of the milliseconds in the name of a delay queue and its exchange."""

_MOST_BYTES = 255
_LONGEST_SUFFIX = 24


def exchange_of(topic: str) -> str:
    """The exchange of a topic; a foreign program publishes here."""
    return f"us.{topic}"


def lock_of(topic: str) -> str:
    """The exclusive queue that whoever makes or deletes queues of a topic holds meanwhile."""
    return f"{LOCK}.{topic}"


def delay_name(milliseconds: int) -> str:
    """The exchange, and the queue bound to it, that hold a message for so long."""
    return f"{DELAY}.{milliseconds}"


def _part(name: str) -> str:
    return name.replace(".", "%2E")


class GroupQueues:
    """
    The queues of one group.

    Attributes:
        main: Messages as published, all partitions in one.
        again: Where messages come back to that are to be lent again: `main`, or where that one is bounded a queue
            without bound, so that coming back is never refused.
        suspects: Messages whose member was lost, lent one at a time.
        roll: Never has a message: every member consumes from it, so that members can be counted.
        partitions: The queues of an ordered group, instead of the others.
    """

    def __init__(self, topic: TopicSpec, group: str, *, ordered: bool) -> None:
        whole = f"us.{_part(topic.name)}.{_part(group)}"
        if len(whole) > _MOST_BYTES - _LONGEST_SUFFIX:
            digest = sha256(whole.encode()).hexdigest()[:32]
            whole = f"{whole[: _MOST_BYTES - _LONGEST_SUFFIX - 33]}~{digest}"
        self.base = whole
        self.main = whole
        self.again = whole if topic.max_backlog is None else f"{whole}~again"
        self.suspects = f"{whole}~suspects"
        self.roll = f"{whole}~roll"
        self.partitions = tuple(f"{whole}.{number}" for number in range(topic.partitions)) if ordered else ()

    @property
    def holding(self) -> tuple[str, ...]:
        """The queues that hold its messages."""
        if self.partitions:
            return self.partitions
        return tuple(dict.fromkeys((self.main, self.again, self.suspects)))

    @property
    def all(self) -> tuple[str, ...]:
        """Every queue that the group has from its creation on."""
        return (*self.holding, *map(self.ledger, range(len(self.partitions))), self.roll)

    def ledger(self, partition: int) -> str:
        """The queue with the last owner's notes on one partition of an ordered group."""
        return f"{self.base}.{partition}~ledger"

    @property
    def gossip(self) -> str:
        """The exchange by which the members of an ordered group know of each other."""
        return f"{self.base}~members"
