"""Knows how declared topics and groups are written down in Redis, and how a start becomes an entry id."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from unistream.driver.types import GroupSpec, Ordering, Overflow, Retention, StartAt, TopicSpec
from unistream.errors import ConfigError, UnsupportedError

__all__ = ["FORMAT", "group_record", "group_spec", "place_of", "position_of", "topic_fields", "topic_spec"]

FORMAT = 1
_LAST_SEQUENCE = 2**64 - 1
_POSITION = re.compile(r"(?:(\d{1,9})/)?(\d{1,20})-(\d{1,20})")
_ORDERINGS: dict[str, Ordering] = {"none": "none", "key": "key"}
_OVERFLOWS: dict[str, Overflow] = {"reject": "reject", "drop_oldest": "drop_oldest"}


def topic_fields(spec: TopicSpec) -> list[str]:
    """The fields of a topic's hash, the format's version first without its name."""
    retention = spec.retention
    fields = {
        "partitions": spec.partitions,
        "ordering": spec.ordering,
        "overflow": spec.overflow,
        "max_age": retention.max_age,
        "max_bytes": retention.max_bytes,
        "max_messages": retention.max_messages,
        "max_backlog": spec.max_backlog,
    }
    return [
        str(FORMAT),
        *(text for name, value in fields.items() if value is not None for text in (name, str(value))),
    ]


def topic_spec(name: str, flat: list[bytes]) -> TopicSpec:
    """
    The topic that a hash describes.

    Raises:
        UnsupportedError: A newer version wrote it.
    """
    record = {field.decode(): value.decode() for field, value in zip(flat[::2], flat[1::2], strict=True)}
    _check_format(int(record.get("format", 0)), f"topic {name!r}")
    max_age, max_bytes, max_messages, max_backlog = (
        record.get(field) for field in ("max_age", "max_bytes", "max_messages", "max_backlog")
    )
    return TopicSpec(
        name=name,
        partitions=int(record["partitions"]),
        ordering=_ORDERINGS[record["ordering"]],
        retention=Retention(
            max_age=None if max_age is None else float(max_age),
            max_bytes=None if max_bytes is None else int(max_bytes),
            max_messages=None if max_messages is None else int(max_messages),
        ),
        max_backlog=None if max_backlog is None else int(max_backlog),
        overflow=_OVERFLOWS[record["overflow"]],
    )


def group_record(spec: GroupSpec) -> str:
    """What is written down of a group."""
    start: dict[str, str] = (
        {"start_time": spec.start.isoformat()} if isinstance(spec.start, datetime) else {"start": spec.start}
    )
    return json.dumps(
        {"format": FORMAT, "ordering": spec.ordering, **start, "lease": spec.lease, "max_lease": spec.max_lease}
    )


def group_spec(topic: str, name: str, record: bytes | str) -> GroupSpec:
    """
    The group that a record describes.

    Raises:
        UnsupportedError: A newer version wrote it.
    """
    said: dict[str, Any] = json.loads(record)
    _check_format(int(said.get("format", 0)), f"group {name!r} of topic {topic!r}")
    start: StartAt = datetime.fromisoformat(said["start_time"]) if "start_time" in said else str(said["start"])
    return GroupSpec(
        topic=topic,
        name=name,
        ordering=_ORDERINGS[said["ordering"]],
        start=start,
        lease=float(said["lease"]),
        max_lease=float(said["max_lease"]),
    )


def _check_format(found: int, what: str) -> None:
    if found != FORMAT:
        raise UnsupportedError(
            f"{what} is written in format {found}, this version reads format {FORMAT}; upgrade unistream",
            capability="registry",
            driver="redis",
        )


def position_of(entry_id: bytes, partition: int | None) -> str:
    """The text of a message's place; `partition` only where the topic has a stream per partition."""
    return entry_id.decode() if partition is None else f"{partition}/{entry_id.decode()}"


def place_of(start: StartAt, partition: int) -> str:
    """
    Where a group begins in one stream: `$`, `0`, or the id before the first entry that it is to get.

    A position names a place in its own partition; in the others the group begins at the same time of the broker's
    clock.

    Raises:
        ConfigError: The position is none of this backend's.
    """
    if start == "latest":
        return "$"
    if start == "earliest":
        return "0"
    if isinstance(start, datetime):
        # Exact arithmetic: a float's microseconds could fall into the millisecond before.
        since = start - datetime(1970, 1, 1, tzinfo=UTC)
        milliseconds = max(0, -(-since // timedelta(milliseconds=1)))
        return _before(milliseconds, 0)
    found = _POSITION.fullmatch(start)
    if found is None:
        raise ConfigError(f"{start!r} is not a position of this backend; take one from a receipt or a delivery")
    of, time, sequence = found.groups()
    here = of is None or int(of) == partition
    return _before(int(time), int(sequence) if here else 0)


def _before(milliseconds: int, sequence: int) -> str:
    if sequence > 0:
        return f"{milliseconds}-{sequence - 1}"
    return f"{milliseconds - 1}-{_LAST_SEQUENCE}" if milliseconds > 0 else "0-0"
