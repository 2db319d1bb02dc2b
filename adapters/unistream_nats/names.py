"""Knows the names of everything this adapter keeps in JetStream; `docs/wire.md` repeats them for foreign clients.

Topic and group names are `[A-Za-z0-9._-]+`. Streams, consumers and parts of subjects may not have dots: they become
`~`, which no name has. `=` marks what this adapter makes up, so that no group can be named like it.
"""

from __future__ import annotations

from unistream.driver.types import GroupSpec, TopicSpec

__all__ = [
    "FREE",
    "INTERNAL",
    "NOTES",
    "STREAM_PREFIX",
    "escape",
    "guard_name",
    "lane_filters",
    "notes_subject",
    "stream_name",
    "subject_of",
    "subjects_of",
    "unescape",
    "who_subject",
]

STREAM_PREFIX = "us_"
"""In front of the name of a topic's stream."""
INTERNAL = "="
"""In the names of consumers that are not groups by themselves."""
FREE = "free"
"""Last part of the subject of a message without a key, in an ordered topic: it takes part in no order."""
NOTES = "us=notes"
"""The stream of notes on loans that were given back; also in front of its subjects."""


def escape(name: str) -> str:
    """A name without dots."""
    return name.replace(".", "~")


def unescape(name: str) -> str:
    """The name that `escape` was given."""
    return name.replace("~", ".")


def stream_name(topic: str) -> str:
    """The stream of a topic."""
    return STREAM_PREFIX + escape(topic)


def subjects_of(topic: str) -> str:
    """Every subject of a topic."""
    return f"us.{escape(topic)}.>"


def subject_of(topic: str, partition: int) -> str:
    """The subject of a partition."""
    return f"us.{escape(topic)}.{partition}"


def lane_filters(group: GroupSpec, topic: TopicSpec) -> dict[str, str | None]:
    """
    The consumers of a group at the broker, with the subjects of each; `None`: all of the topic.

    The one named like the group is made last: where it is, the group is. In an ordered group it has the messages
    without a key, and each partition has a consumer of its own.
    """
    name = group.name if group.ephemeral else escape(group.name)
    if group.ordering != "key":
        return {name: None}
    lanes: dict[str, str | None] = {
        f"{name}{INTERNAL}{partition}": subject_of(topic.name, partition) for partition in range(topic.partitions)
    }
    lanes[name] = f"{subject_of(topic.name, 0)[:-1]}*.{FREE}"
    return lanes


def guard_name(group: str) -> str:
    """The consumer that keeps messages from being trimmed while a group is moved."""
    return f"{escape(group)}{INTERNAL}guard"


def who_subject(topic: str, group: str) -> str:
    """Where the members of a group can be asked who they are; outside of the topic's stream."""
    return f"us{INTERNAL}who.{escape(topic)}.{escape(group)}"


def notes_subject(stream: str, consumer: str, sequence: int | str = "*") -> str:
    """Where the note on a message is, for one consumer."""
    return f"{NOTES}.{stream}.{consumer}.{sequence}"
