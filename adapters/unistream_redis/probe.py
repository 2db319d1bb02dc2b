"""Asks a live Redis what it can promise, and states it as capabilities."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ResponseError

from unistream.capabilities import (
    AckConfirm,
    Attempts,
    Capabilities,
    Dedupe,
    Durability,
    Fencing,
    LagReport,
    Lease,
    Level,
    MaxBacklog,
    MaxMessageBytes,
    NackDelay,
    OrderingByKey,
    Parallelism,
    RetentionLimits,
    Seek,
    Start,
)
from unistream.errors import UnsupportedError
from unistream_redis.link import Link

__all__ = ["LEAST_LEASE", "MOST_SWEEP", "POLL", "Server", "probe"]

LEAST_LEASE = 0.2
"""Seconds; ended loans are looked for every quarter of a lease, which costs a script call each."""
MOST_SWEEP = 2.0
"""Seconds between two looks for ended loans, at most."""
POLL = 0.9
"""Seconds between two looks for deliveries that are due, at most: they may be one second late (DEL-2)."""

_LEAST = (7, 0)
_PLACES = frozenset({"latest", "earliest", "time", "position"})


class Server:
    """What `probe` found out.

    Attributes:
        version: As a tuple.
        acked_trim: Redis >= 8.2 trims by reference: settled entries behind an unsettled one too.
        most_bytes: The largest single value.
    """

    def __init__(self, version: tuple[int, ...], most_bytes: int) -> None:
        self.version = version
        self.acked_trim = version >= (8, 2)
        self.most_bytes = most_bytes


async def probe(link: Link, dead_peer_after: float) -> tuple[Server, Capabilities]:
    """
    Ask the server for its version and settings.

    Raises:
        UnsupportedError: The server is older than Redis 7.0, or part of a Redis Cluster.
    """
    info = _fields(await link.call("INFO", "everything"))
    version = tuple(int(part) for part in info["redis_version"].split(".")[:3])
    valkey = info.get("server_name") == "valkey"
    product = f"Valkey {info['valkey_version']}" if valkey else f"Redis {info['redis_version']}"
    if version < _LEAST:
        raise UnsupportedError(
            f"{product} is too old: Redis 7.0 is the first whose streams count what a group has read",
            capability="version",
            driver="redis",
        )
    if info.get("cluster_enabled") == "1":
        raise UnsupportedError(
            f"this {product} is part of a Redis Cluster; this version speaks to a single Redis only",
            capability="cluster",
            driver="redis",
        )
    settings = await _settings(link)
    server = Server((0, 0) if valkey else version, int(settings.get("proto-max-bulk-len", 512 * 1024 * 1024)))
    return server, Capabilities(
        driver="redis",
        product=product,
        durability=_durability(info, settings),
        ordering=OrderingByKey(
            level=Level.EMULATED, blocks="key", note="one stream per partition, owned by one member at a time"
        ),
        parallelism=Parallelism(bound="unlimited", ordered_bound="partitions"),
        start=Start(at=_PLACES),
        seek=Seek(level=Level.EMULATED, to=_PLACES, with_members=False, note="back to what is not trimmed yet"),
        nack_delay=NackDelay(level=Level.EMULATED, note="kept in the group's pending list and a sorted set"),
        lease=Lease(
            level=Level.EMULATED,
            scope="message",
            least=LEAST_LEASE,
            recover_within=MOST_SWEEP + 2 * POLL,
            dead_peer_after=dead_peer_after,
            note="ended loans are lent again by the living members",
        ),
        fencing=Fencing(level=Level.EMULATED, note="checked inside Redis by the scripts that settle"),
        attempts=Attempts(count="exact"),
        ack_confirm=AckConfirm(),
        dedupe=Dedupe(level=Level.NONE, note="not used by this version; consumers can compare ids"),
        retention=RetentionLimits(
            level=Level.EMULATED,
            by=frozenset({"max_age", "max_messages"}),
            note="Redis can't tell the bytes of a stream exactly",
        ),
        max_backlog=MaxBacklog(level=Level.EMULATED, note="counted by a script with every batch"),
        max_message_bytes=MaxMessageBytes(limit=float(server.most_bytes), note="the setting proto-max-bulk-len"),
        lag=LagReport(
            exact=True,
            note="an estimate for a group over 10000 messages behind that was placed there or met a Redis 7 restart",
        ),
    )


async def _settings(link: Link) -> dict[str, str]:
    """What CONFIG GET tells; nothing where it is forbidden, as hosted services do."""
    wanted = ("appendonly", "appendfsync", "maxmemory-policy", "proto-max-bulk-len")
    try:
        flat = await link.call("CONFIG", "GET", *wanted)
    except ResponseError:
        return {}
    return {flat[at].decode(): flat[at + 1].decode() for at in range(0, len(flat), 2)}


def _durability(info: dict[str, str], settings: dict[str, str]) -> Durability:
    policy = settings.get("maxmemory-policy") or info.get("maxmemory_policy", "")
    if policy.startswith("allkeys-"):
        return Durability(kind="memory", note=f"maxmemory-policy {policy} may evict whole topics; set it to noeviction")
    if info.get("aof_enabled") != "1":
        return Durability(kind="memory", note="no append-only file; set appendonly yes and appendfsync always")
    fsync = settings.get("appendfsync")
    if fsync == "always":
        return Durability(kind="fsync", note="appendfsync always")
    if fsync is None:
        return Durability(kind="process_crash", note="CONFIG GET is forbidden here, so appendfsync is unknown")
    note = {
        "everysec": "appendfsync everysec: a power loss takes the last second or two; set it to always",
        "no": "appendfsync no: a power loss takes what the kernel had not written yet; set it to always",
    }
    return Durability(kind="process_crash", note=note.get(fsync, f"appendfsync {fsync}"))


def _fields(text: Any) -> dict[str, str]:
    lines = (line.partition(":") for line in bytes(text).decode("utf-8", "replace").splitlines())
    return {name: value for name, separator, value in lines if separator}
