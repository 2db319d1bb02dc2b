"""Asks a live NATS server what it can promise, and states it as capabilities."""

from __future__ import annotations

import re

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
from unistream_nats.entries import OVERHEAD
from unistream_nats.link import Link
from unistream_nats.registry import DEDUPE_SECONDS

__all__ = ["LEAST_LEASE", "probe"]

LEAST_LEASE = 0.5
"""Seconds; renewals are a request each third of a lease."""

_LEAST = (2, 9)
_PLACES = frozenset({"latest", "earliest", "time", "position"})


async def probe(link: Link, replicas: int) -> Capabilities:
    """
    Ask the server for its version, its limits and JetStream.

    Raises:
        UnsupportedError: The server is older than 2.9, or has no JetStream for this account.
    """
    wire = await link.wire()
    told = str(wire.info.get("version", "?"))
    version = tuple(int(part) for part in re.findall(r"\d+", told)[:2])
    product = f"NATS {told}"
    if version < _LEAST:
        raise UnsupportedError(
            f"{product} is too old: 2.9 is the first that pulls as this adapter does",
            capability="version",
            driver="nats",
        )
    if not wire.info.get("headers"):
        raise UnsupportedError(f"{product}: headers are switched off here", capability="headers", driver="nats")
    await link.api("INFO")
    return Capabilities(
        driver="nats",
        product=product,
        durability=_durability(replicas),
        ordering=OrderingByKey(
            level=Level.EMULATED, blocks="partition", note="a consumer per partition that lends one message at a time"
        ),
        parallelism=Parallelism(bound="unlimited", ordered_bound="partitions"),
        start=Start(at=_PLACES),
        seek=Seek(level=Level.EMULATED, to=_PLACES, with_members=False, note="back to what is not removed yet"),
        nack_delay=NackDelay(note="kept by the server with the group, to the second across its restarts"),
        lease=Lease(
            scope="message",
            least=LEAST_LEASE,
            recover_within=2.0,
            dead_peer_after=link.place.dead_peer_after,
            note="the consumer's ack_wait",
        ),
        fencing=Fencing(
            level=Level.NONE,
            note="JetStream takes an ack of an ended loan for the one that stands; the library sends none that is late "
            "by its own clock, but one that is late on its way counts",
        ),
        attempts=Attempts(
            count="exact", note="counted by the server; what was given back unhandled is noted aside and not counted"
        ),
        ack_confirm=AckConfirm(
            survives="restart",
            note="the server writes acks and counts down up to some 100 ms later, so a killed one may forget the last",
        ),
        dedupe=Dedupe(window=DEDUPE_SECONDS, note="Nats-Msg-Id"),
        retention=RetentionLimits(note="without one, what every group has settled is removed within seconds"),
        max_backlog=MaxBacklog(
            level=Level.EMULATED,
            overflow=frozenset({"reject"}),
            note="such a topic keeps only what some group has not settled, nothing for groups that come later",
        ),
        max_message_bytes=MaxMessageBytes(
            limit=float(wire.info["max_payload"] - OVERHEAD),
            note="the setting max_payload; keys and headers that are not plain text count as written",
        ),
        lag=LagReport(exact=True),
    )


def _durability(replicas: int) -> Durability:
    if replicas > 1:
        return Durability(
            kind="replicated", copies=replicas, note="topics of fewer replicas, or in memory, are refused by producers"
        )
    return Durability(
        kind="process_crash",
        note="no client can read when the server syncs its files: by default every two minutes, so a power loss may "
        "take the messages of two minutes; set sync_interval: always, or use the option replicas",
    )
