"""Knows how topics and groups are written down: as streams and consumers, and as JSON in their descriptions.

The description, and not the metadata of servers from 2.10 on, so that one format serves all versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from unistream.driver.types import GroupSpec, Ordering, Overflow, Retention, StartAt, TopicSpec
from unistream.errors import ConfigError, UnsupportedError
from unistream_nats.names import INTERNAL, STREAM_PREFIX, stream_name, subjects_of, unescape

__all__ = [
    "DEDUPE_SECONDS",
    "FORMAT",
    "NANOSECONDS",
    "consumer_config",
    "group_spec",
    "is_ours",
    "start_config",
    "stream_config",
    "topic_spec",
]

FORMAT = 1
NANOSECONDS = 1_000_000_000
DEDUPE_SECONDS = 120.0
"""How long a stream remembers the ids of messages."""

_MARK = "unistream "
_ORDERINGS: dict[str, Ordering] = {"none": "none", "key": "key"}
_OVERFLOWS: dict[str, Overflow] = {"reject": "reject", "drop_oldest": "drop_oldest"}


def stream_config(spec: TopicSpec, replicas: int) -> dict[str, Any]:
    """
    The stream of a topic.

    Without a declared retention nothing unsettled is removed: the stream is unlimited, and what every group has settled
    is purged by the members. With `max_backlog` the server removes what every group has settled by itself (retention
    `interest`), so that its limit counts unsettled messages only. A declared retention has limits whose oldest go.
    """
    retention = spec.retention
    record = {
        "format": FORMAT,
        "partitions": spec.partitions,
        "ordering": spec.ordering,
        "max_age": retention.max_age,
        "max_bytes": retention.max_bytes,
        "max_messages": retention.max_messages,
        "max_backlog": spec.max_backlog,
        "overflow": spec.overflow,
    }
    max_age = 0.0 if retention.max_age is None else retention.max_age
    bounded = retention.max_bytes is not None or retention.max_messages is not None
    return {
        "name": stream_name(spec.name),
        "subjects": [subjects_of(spec.name)],
        "description": _MARK + json.dumps(record),
        "storage": "file",
        "num_replicas": replicas,
        "retention": "interest" if spec.max_backlog is not None else "limits",
        "discard": "old" if bounded else "new",
        "max_msgs": _limit(spec.max_backlog if spec.max_backlog is not None else retention.max_messages),
        "max_bytes": _limit(retention.max_bytes),
        "max_age": round(max_age * NANOSECONDS),
        # The server takes no window beyond the age at which messages go.
        "duplicate_window": round(min(DEDUPE_SECONDS, max_age or DEDUPE_SECONDS) * NANOSECONDS),
        "allow_direct": True,
    }


def _limit(value: int | None) -> int:
    return -1 if value is None else value


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether this library made the stream or consumer."""
    return str(config.get("description", "")).startswith(_MARK)


def _record(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(str(config["description"])[len(_MARK) :])
    if said.get("format") != FORMAT:
        raise UnsupportedError(
            f"{what} is written in format {said.get('format')}, this version reads format {FORMAT}; upgrade unistream",
            capability="registry",
            driver="nats",
        )
    return said


def topic_spec(config: Mapping[str, Any]) -> TopicSpec:
    """
    The topic of a stream; one that a foreign program made has the defaults, and the limits that it was given.

    Raises:
        UnsupportedError: A newer version wrote it.
    """
    name = unescape(config["name"][len(STREAM_PREFIX) :])
    if not is_ours(config):
        age, size, count = (config.get(field, 0) for field in ("max_age", "max_bytes", "max_msgs"))
        limits = Retention(
            age / NANOSECONDS if age > 0 else None, size if size > 0 else None, count if count > 0 else None
        )
        return TopicSpec(name, retention=limits)
    said = _record(config, f"topic {name!r}")
    return TopicSpec(
        name=name,
        partitions=int(said["partitions"]),
        ordering=_ORDERINGS[said["ordering"]],
        retention=Retention(said["max_age"], said["max_bytes"], said["max_messages"]),
        max_backlog=said["max_backlog"],
        overflow=_OVERFLOWS[said["overflow"]],
    )


def consumer_config(
    spec: GroupSpec, name: str, subject: str | None, start: StartAt, *, idle_seconds: float | None = None
) -> dict[str, Any]:
    """
    One consumer of a group.

    A partition's consumer lends one message at a time, which keeps the order whatever becomes of it. The others have no
    bound, since the server would count nacked messages that wait for their delay, too. There is no `max_deliver`: what
    has reached it would stay unsettled for ever, and nobody would see it.
    """
    keyed = spec.ordering == "key" and INTERNAL in name[1:]
    since = {"start_time": start.isoformat()} if isinstance(start, datetime) else {"start": start}
    record = {"format": FORMAT, "ordering": spec.ordering, **since, "lease": spec.lease, "max_lease": spec.max_lease}
    config: dict[str, Any] = {
        "name": name,
        "description": _MARK + json.dumps(record),
        "ack_policy": "explicit",
        "ack_wait": round(spec.lease * NANOSECONDS),
        "max_deliver": -1,
        "max_ack_pending": 1 if keyed else -1,
        "replay_policy": "instant",
        **start_config(start),
    }
    if idle_seconds is None:
        config["durable_name"] = name
    else:
        config["inactive_threshold"] = round(idle_seconds * NANOSECONDS)
    if subject is not None:
        config["filter_subject"] = subject
    return config


def start_config(start: StartAt) -> dict[str, Any]:
    """
    Where a consumer begins.

    Raises:
        ConfigError: The position is none of this backend's.
    """
    if start == "latest":
        return {"deliver_policy": "new"}
    if start == "earliest":
        return {"deliver_policy": "all"}
    if isinstance(start, datetime):
        since = start.astimezone(UTC)
        # The server's clock has nanoseconds: the text keeps all that a datetime has.
        return {"deliver_policy": "by_start_time", "opt_start_time": since.replace(tzinfo=None).isoformat() + "Z"}
    if not start.isdecimal() or not 0 < int(start) < 2**63:
        raise ConfigError(f"{start!r} is not a position of this backend; take one from a receipt or a delivery")
    return {"deliver_policy": "by_start_sequence", "opt_start_seq": int(start)}


def group_spec(topic: str, config: Mapping[str, Any]) -> GroupSpec:
    """
    The group of a consumer; one that a foreign program made has the defaults and its own `ack_wait` as lease.

    Raises:
        UnsupportedError: A newer version wrote it.
    """
    name = unescape(config["name"])
    if not is_ours(config):
        lease = config.get("ack_wait", 30 * NANOSECONDS) / NANOSECONDS
        return GroupSpec(topic, name, lease=lease, max_lease=max(lease, 3600.0))
    said = _record(config, f"group {name!r} of topic {topic!r}")
    start: StartAt = datetime.fromisoformat(said["start_time"]) if "start_time" in said else str(said["start"])
    return GroupSpec(
        topic=topic,
        name=name,
        ordering=_ORDERINGS[said["ordering"]],
        start=start,
        lease=float(said["lease"]),
        max_lease=float(said["max_lease"]),
    )
