"""Ephemeral groups are real groups with a made-up name and a sign of life; those that fell silent are swept away."""

from __future__ import annotations

from collections.abc import Sequence

from unistream_redis.keys import TopicKeys
from unistream_redis.link import Link
from unistream_redis.scripts import DELETE_GROUP

__all__ = ["BEAT_EVERY", "beat", "delete_groups", "sweep"]

BEAT_EVERY = 10.0
"""Seconds between two signs of life of an ephemeral group, and between two sweeps by one member."""
ABANDONED_AFTER = 120
"""Seconds without a sign of life after which an ephemeral group is removed: until then it holds back trimming."""


async def beat(link: Link, keys: TopicKeys, name: str) -> None:
    """Say that the consumer of an ephemeral group lives."""
    now, _ = await link.call("TIME")
    # XX: a group that was swept away stays away; its consumer meets NOGROUP and starts anew, with a gap.
    await link.call("ZADD", keys.ephemeral, "XX", int(now) * 1000, name)


async def sweep(link: Link, keys: TopicKeys) -> None:
    """Remove the ephemeral groups of a topic whose consumers are gone for long."""
    now, _ = await link.call("TIME")
    since = (int(now) - ABANDONED_AFTER) * 1000
    names: list[bytes] = await link.call("ZRANGE", keys.ephemeral, "-inf", since, "BYSCORE")
    if names:
        await delete_groups(link, keys, [name.decode() for name in names])


async def delete_groups(link: Link, keys: TopicKeys, names: Sequence[str]) -> None:
    """Delete groups with everything that belongs to them; those that are not there do no harm."""
    streams = [stream.stream for stream in keys.streams]
    prefixes = [stream.prefix for stream in keys.streams]
    await link.run(DELETE_GROUP, [keys.groups, keys.ephemeral, *streams], [*prefixes, "", *names])
    await link.call("DEL", *(keys.members(name) for name in names))
