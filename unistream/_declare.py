"""What programs and operators declare of topics and groups, made into specs; refused before any I/O if nonsense.

The operator's configuration wins over the program's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any

from unistream.capabilities import Capabilities
from unistream.driver.types import GroupSpec, Retention, StartAt, TopicSpec
from unistream.errors import ConfigError, GroupConflictError, TopicConflictError, UnistreamError

__all__ = ["check_topic", "conflict", "group_spec", "kind_of_start", "name_of", "topic_spec"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


def name_of(what: str, name: str) -> str:
    """
    The name, if it is one.

    Raises:
        ConfigError: It is not; `what` says what it should have named.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{what} name {name!r}: use 1 to 200 of letters, digits, '.', '_' and '-'")
    return name


def topic_spec(name: str, settings: Mapping[str, Any]) -> TopicSpec:
    """
    A topic as declared.

    Raises:
        ConfigError: A value is out of range, or of another type.
    """
    values = dict(settings)
    where = f"topic {name_of('topic', name)!r}"
    retention = values.get("retention")
    if retention is None:
        values["retention"] = Retention()
    elif isinstance(retention, Mapping):
        values["retention"] = Retention(**retention)
    elif not isinstance(retention, Retention):
        raise ConfigError(f"{where}: retention={retention!r}; give a Retention, for example Retention(max_age=3600)")
    spec = TopicSpec(name, **values)
    if not _whole(spec.partitions):
        raise ConfigError(f"{where}: partitions={spec.partitions!r}; give a whole number of 1 or more")
    if spec.ordering not in ("none", "key"):
        raise ConfigError(f"{where}: ordering={spec.ordering!r}; give 'none' or 'key'")
    if spec.overflow not in ("reject", "drop_oldest"):
        raise ConfigError(f"{where}: overflow={spec.overflow!r}; give 'reject' or 'drop_oldest'")
    if spec.max_backlog is not None and not _whole(spec.max_backlog):
        raise ConfigError(f"{where}: max_backlog={spec.max_backlog!r}; give a whole number of 1 or more, or None")
    for item in fields(spec.retention):
        limit = getattr(spec.retention, item.name)
        if limit is not None and not (_number(limit) and limit > 0):
            raise ConfigError(f"{where}: retention {item.name}={limit!r}; give more than 0, or None")
    return spec


def check_topic(spec: TopicSpec, capabilities: Capabilities) -> None:
    """
    Refuse a topic that the backend can't give.

    Raises:
        UnsupportedError: It lacks the ordering, retention or max_backlog.
    """
    if spec.ordering == "key" and not capabilities.ordering:
        raise capabilities.unsupported("ordering", 'ordering="key"', topic=spec.name)
    for item in fields(spec.retention):
        limit = getattr(spec.retention, item.name)
        if limit is not None and (not capabilities.retention or item.name not in capabilities.retention.by):
            raise capabilities.unsupported("retention", f"retention {item.name}={limit}", topic=spec.name)
    backlog = capabilities.max_backlog
    if spec.max_backlog is not None and (not backlog or spec.overflow not in backlog.overflow):
        wanted = f"max_backlog={spec.max_backlog}, overflow={spec.overflow!r}"
        raise capabilities.unsupported("max_backlog", wanted, topic=spec.name)


def group_spec(topic: str, name: str | None, settings: Mapping[str, Any]) -> GroupSpec:
    """
    A group as declared; an ephemeral one has no name yet.

    Raises:
        ConfigError: A value is out of range, or of another type.
    """
    spec = GroupSpec(name_of("topic", topic), "" if name is None else name_of("group", name), **settings)
    where = f"group {name!r}"
    if not (_number(spec.lease) and _number(spec.max_lease) and spec.lease > 0 and spec.max_lease >= spec.lease):
        raise ConfigError(
            f"{where}: lease={spec.lease!r}, max_lease={spec.max_lease!r}; "
            "give a lease above 0 and a max_lease not below it"
        )
    if spec.ordering not in ("none", "key"):
        raise ConfigError(f"{where}: ordering={spec.ordering!r}; give 'none' or 'key'")
    kind_of_start(spec.start)
    return spec


def kind_of_start(at: StartAt) -> str:
    """
    Which of `latest`, `earliest`, `time`, `position` it is.

    Raises:
        ConfigError: None of them.
    """
    if isinstance(at, datetime):
        if at.tzinfo is None:
            raise ConfigError(f"{at!r} has no time zone; give an aware datetime")
        return "time"
    if not isinstance(at, str) or not at:
        raise ConfigError(f'{at!r} is no place to begin; give "latest", "earliest", an aware datetime or a position')
    return at if at in ("latest", "earliest") else "position"


def conflict(asked: TopicSpec | GroupSpec, stands: TopicSpec | GroupSpec) -> UnistreamError | None:
    """The error for a topic or group that exists with other settings; `None` if there is no difference."""
    differences = [
        f"{item.name} is {getattr(stands, item.name)!r}, not {getattr(asked, item.name)!r}"
        for item in fields(asked)
        if getattr(stands, item.name) != getattr(asked, item.name)
    ]
    if not differences:
        return None
    if isinstance(asked, TopicSpec):
        text = f"topic {asked.name!r} exists: {'; '.join(differences)}; use these settings, or delete the topic first"
        return TopicConflictError(text, topic=asked.name)
    return GroupConflictError(
        f"group {asked.name!r} of topic {asked.topic!r} exists: {'; '.join(differences)}; "
        "use these settings, or delete the group first",
        topic=asked.topic,
    )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
