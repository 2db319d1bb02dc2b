"""Removes from a topic what every group has settled, and finds out what was removed too early; one member's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unistream_nats.errors import ApiError, Code
from unistream_nats.lane import Lane
from unistream_nats.link import Link
from unistream_nats.registry import is_ours, topic_spec

__all__ = ["consumers_of", "look_after"]


async def consumers_of(link: Link, stream: str) -> list[dict[str, Any]]:
    """Every consumer of a stream, as the server describes it."""
    found: list[dict[str, Any]] = []
    while True:
        told = await link.api(f"CONSUMER.LIST.{stream}", {"offset": len(found)})
        found += told["consumers"] or []
        if not told["consumers"] or len(found) >= told["total"]:
            return found


async def look_after(link: Link, stream: str, lanes: Sequence[Lane]) -> None:
    """
    Look at a stream and its consumers once, tell the lanes, and purge what nobody needs any more.

    The stream is looked at first: what is in it by then and not pending for a consumer afterwards is settled by it.
    """
    try:
        told = await link.api(f"STREAM.INFO.{stream}")
    except ApiError as error:
        if error.code != Code.STREAM_MISSING:
            raise
        for lane in lanes:
            lane.gone = True
        return
    state = told["state"]
    consumers = await consumers_of(link, stream)
    by_name = {consumer["name"]: consumer for consumer in consumers}
    for lane in lanes:
        consumer = by_name.get(lane.name)
        if consumer is None:
            lane.gone = True
        else:
            delivered = consumer["delivered"]
            lane.look(state["first_seq"], delivered["consumer_seq"], delivered["stream_seq"])
    if _trims(told["config"]) and consumers:
        floor = min(_floor(consumer, state["last_seq"]) for consumer in consumers)
        if floor >= state["first_seq"] and state["messages"]:
            await link.api(f"STREAM.PURGE.{stream}", {"seq": floor + 1})


def _trims(config: Mapping[str, Any]) -> bool:
    """Whether the members remove what is settled: not where a retention was declared, or a foreign program rules."""
    if not is_ours(config):
        return False
    topic = topic_spec(config)
    return not topic.retention and topic.max_backlog is None


def _floor(consumer: Mapping[str, Any], last: int) -> int:
    """Up to where a consumer has settled everything."""
    if not consumer["num_pending"] and not consumer["num_ack_pending"]:
        return last
    return min(int(consumer["ack_floor"]["stream_seq"]), last)
