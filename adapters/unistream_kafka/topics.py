"""What a topic is in Kafka: its name there, its settings, and the declaration that they amount to. Asks nobody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from unistream.driver.types import Ordering, Retention, TopicSpec
from unistream.errors import ConfigError

__all__ = ["SUBSTITUTE", "Standing", "configs_of", "place_in", "position_of", "standing_of", "substitute"]

_DAY_MS = 86_400_000
_SEGMENT_MS = 7 * _DAY_MS  # Kafka's default
SUBSTITUTE = "__unistream_topic_"
"""How a `substitute` begins."""
_READABLE = 190  # of the 249 characters that a name of Kafka's may have


@dataclass(frozen=True, slots=True)
class Standing:
    """
    A topic as it stands: its declaration, Kafka's id of it, the largest batch that it takes, its fewest copies.

    Attributes:
        stored: Its name in Kafka: its own, or its `substitute`.
    """

    spec: TopicSpec
    stored: str
    topic_id: str
    most_bytes: int
    copies: int


def position_of(partition: int, offset: int) -> str:
    """The text of a message's place."""
    return f"{partition}/{offset}"


def substitute(name: str) -> str:
    """
    Kafka's name of a topic whose own name Kafka does not take, as it has one that differs only in dots and underscores.

    (Names of metrics would collide, and Kafka 4.4 answers INVALID_TOPIC_EXCEPTION.)
    """
    return f"{SUBSTITUTE}{blake2b(name.encode(), digest_size=16).hexdigest()}_{name.replace('.', '_')[:_READABLE]}"


def place_in(position: str) -> tuple[int, int]:
    """The partition and offset that a place's text says; raises `ConfigError` if it says none."""
    partition, separator, offset = position.partition("/")
    if not (separator and partition.isdecimal() and offset.isdecimal()):
        raise ConfigError(f"{position!r} is not a position of this backend; take one from a receipt or a delivery")
    return int(partition), int(offset)


def configs_of(spec: TopicSpec) -> dict[str, str]:
    """The settings of a topic that is declared so."""
    retention = spec.retention
    configs = {
        "cleanup.policy": "delete",
        "retention.ms": "-1" if retention.max_age is None else str(math.ceil(retention.max_age * 1000)),
        "retention.bytes": str(_bytes_per_partition(spec)),
        # The broker's clock, so that starting at a time does not depend on the publishers' clocks.
        "message.timestamp.type": "LogAppendTime",
    }
    if retention.max_age is not None and retention.max_age * 1000 < 4 * _SEGMENT_MS:
        # Whole segments are removed, a quarter of the age each.
        configs["segment.ms"] = str(max(60_000, int(retention.max_age * 250)))
    return configs


def _bytes_per_partition(spec: TopicSpec) -> int:
    most = spec.retention.max_bytes
    return -1 if most is None else math.ceil(most / spec.partitions)


def standing_of(
    told: Mapping[str, Any],
    configs: Mapping[str, Any],
    like: TopicSpec | None,
    name: str | None,
    ordering: Ordering | None,
) -> Standing:
    """
    A topic as it stands.

    Args:
        told: What Kafka says of the topic.
        configs: Its settings.
        like: A declaration, for what Kafka can't tell.
        name: Its own name, where Kafka has it under a substitute.
        ordering: As declared; `None` for a topic that others made.
    """
    partitions = len(told["partitions"])
    milliseconds = int(configs["retention.ms"]["value"])
    size = int(configs["retention.bytes"]["value"])
    same_size = like is not None and like.partitions == partitions and _bytes_per_partition(like) == size
    retention = Retention(
        max_age=None if milliseconds < 0 else milliseconds / 1000,
        max_bytes=like.retention.max_bytes
        if like is not None and same_size
        else None
        if size < 0
        else size * partitions,
    )
    spec = TopicSpec(
        (name if told["name"].startswith(SUBSTITUTE) else None) or told["name"],
        partitions,
        # A Kafka topic orders its partitions whether asked to or not: a foreign one gives what is asked of it.
        ordering or ("key" if like is None else like.ordering),
        retention,
        overflow="reject" if like is None else like.overflow,
    )
    copies = min((len(partition["replica_nodes"]) for partition in told["partitions"]), default=0)
    return Standing(
        spec,
        told["name"],
        str(told["topic_id"]),
        int(configs["max.message.bytes"]["value"]),
        min(copies, int(configs["min.insync.replicas"]["value"])),
    )
