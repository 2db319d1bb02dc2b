"""Settings of topics and groups, from the contract's values to the broker's and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from unistream import broker
from unistream.driver.types import GroupSpec, Retention, StartAt, TopicSpec
from unistream.errors import ConfigError
from unistream_builtin.errors import DRIVER

__all__ = ["broker_group", "broker_start", "broker_topic", "group_spec", "topic_spec"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def broker_topic(spec: TopicSpec) -> broker.TopicSpec:
    """The broker's settings for a topic."""
    return broker.TopicSpec(
        partitions=spec.partitions,
        ordering=spec.ordering,
        max_age=spec.retention.max_age,
        max_bytes=spec.retention.max_bytes,
        max_messages=spec.retention.max_messages,
        max_backlog=spec.max_backlog,
        overflow=spec.overflow,
    )


def topic_spec(name: str, spec: broker.TopicSpec) -> TopicSpec:
    """The contract's settings of a topic."""
    return TopicSpec(
        name,
        partitions=spec.partitions,
        ordering=spec.ordering,
        retention=Retention(spec.max_age, spec.max_bytes, spec.max_messages),
        max_backlog=spec.max_backlog,
        overflow=spec.overflow,
    )


def broker_group(spec: GroupSpec) -> broker.GroupSpec:
    """The broker's settings for a group."""
    return broker.GroupSpec(
        ordering=spec.ordering,
        start=broker_start(spec.start),
        lease=spec.lease,
        max_lease=spec.max_lease,
        ephemeral=spec.ephemeral,
    )


def group_spec(topic: str, name: str, spec: broker.GroupSpec) -> GroupSpec:
    """The contract's settings of a group."""
    return GroupSpec(
        topic,
        name,
        ordering=spec.ordering,
        start=_start(spec.start),
        lease=spec.lease,
        max_lease=spec.max_lease,
        ephemeral=spec.ephemeral,
    )


def broker_start(at: StartAt) -> broker.Start:
    """
    The broker's word for a place in a topic.

    Raises:
        ConfigError: A text that is no position of this broker.
    """
    if isinstance(at, datetime):
        return broker.AtTime((at - _EPOCH) // _MICROSECOND)
    if at == "latest":
        return "latest"
    if at == "earliest":
        return "earliest"
    if not (at.isascii() and at.isdigit()):
        raise ConfigError(
            f"{at!r} is no position; give one as found in a Receipt or Delivery, 'earliest' or 'latest'",
            driver=DRIVER,
        )
    return broker.AtOffset(int(at))


def _start(start: broker.Start) -> StartAt:
    if isinstance(start, broker.AtTime):
        return _EPOCH + start.microseconds * _MICROSECOND
    return str(start.offset) if isinstance(start, broker.AtOffset) else start
