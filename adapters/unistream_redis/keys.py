"""Knows the names of everything this adapter keeps in Redis; `docs/wire.md` repeats them for foreign clients.

Topic and group names are `[A-Za-z0-9._-]+`, so they need no escaping, and neither `{`, `:` nor `~` can come from them.
All keys of one stream share a hash tag, so that a cluster keeps them together and spreads partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unistream.driver.types import TopicSpec

__all__ = ["TOPICS", "StreamKeys", "TopicKeys"]

TOPICS = "us:topics"
"""Set of the names of all topics that unistream made."""


@dataclass(frozen=True, slots=True)
class StreamKeys:
    """The keys of one stream: a whole topic, or one partition of an ordered one."""

    prefix: str

    @property
    def stream(self) -> str:
        """The stream itself; a foreign program publishes here."""
        return self.prefix + "stream"

    @property
    def lost(self) -> str:
        """Hash: group -> messages removed before the group read them, not yet reported."""
        return self.prefix + "lost"

    @property
    def run(self) -> str:
        """The run of the server in which the groups' counters are right; the scripts keep it."""
        return self.prefix + "run"

    @property
    def retained(self) -> str:
        """Lock that makes retention run once in a while."""
        return self.prefix + "retained"

    def due(self, group: str) -> str:
        """Sorted set: parked entry -> when to lend it again; `!` in front of the id marks a suspect."""
        return f"{self.prefix}due:{group}"

    def held(self, group: str) -> str:
        """Sorted set: entry -> until when a loan lasts that was extended beyond the group's lease."""
        return f"{self.prefix}held:{group}"

    def sweep(self, group: str) -> str:
        """Lock that makes one member at a time look for ended loans."""
        return f"{self.prefix}sweep:{group}"

    def owner(self, group: str) -> str:
        """Lease of one partition of an ordered group: the member that owns it, with its fencing token."""
        return f"{self.prefix}owner:{group}"

    def epoch(self, group: str) -> str:
        """How often a partition of an ordered group changed hands; makes every fence unlike those before."""
        return f"{self.prefix}epoch:{group}"


@dataclass(frozen=True, slots=True)
class TopicKeys:
    """The keys of one topic."""

    name: str
    partitions: int = 1
    ordered: bool = False

    @classmethod
    def of(cls, topic: TopicSpec) -> TopicKeys:
        """The keys of a topic as it stands."""
        return cls(topic.name, topic.partitions, topic.ordering == "key")

    @property
    def prefix(self) -> str:
        """In front of all keys of the topic itself."""
        return f"us:{{{self.name}}}:"

    @property
    def meta(self) -> str:
        """Hash: how the topic was declared, with the format's version."""
        return self.prefix + "meta"

    @property
    def groups(self) -> str:
        """Hash: group -> how it was declared, as JSON."""
        return self.prefix + "groups"

    @property
    def ephemeral(self) -> str:
        """Sorted set: ephemeral group -> when its consumer was last seen."""
        return self.prefix + "ephemeral"

    def members(self, group: str) -> str:
        """Sorted set: member -> when it was last seen."""
        return f"{self.prefix}members:{group}"

    @property
    def streams(self) -> Sequence[StreamKeys]:
        """One stream, or one per partition if the topic is ordered."""
        if not self.ordered:
            return (StreamKeys(self.prefix),)
        return tuple(StreamKeys(f"us:{{{self.name}.{partition}}}:part:") for partition in range(self.partitions))
