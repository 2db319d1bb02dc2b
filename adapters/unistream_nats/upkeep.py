"""Removes from a topic what every group has settled, and finds out what was removed too early; one member's part."""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from unistream_nats.errors import ApiError, Code
from unistream_nats.lane import Lane
from unistream_nats.link import Link
from unistream_nats.registry import is_ours, topic_spec

__all__ = ["Upkeep", "consumers_of"]

_MANY = 100_000
_MANY_BYTES = 256 * 1024 * 1024
"""Settled messages, or bytes of the whole topic, beyond which they are removed at once and whatever waits."""
_AT_MOST = 10_000
_AT_ONCE = 250
"""How many messages are removed one by one in one look, and how many of them at once."""


async def consumers_of(link: Link, stream: str) -> list[dict[str, Any]]:
    """Every consumer of a stream, as the server describes it."""
    found: list[dict[str, Any]] = []
    while True:
        told = await link.api(f"CONSUMER.LIST.{stream}", {"offset": len(found)})
        found += told["consumers"] or []
        if not told["consumers"] or len(found) >= told["total"]:
            return found


class Upkeep:
    """
    Looks after one stream.

    Args:
        link: The connection.
        stream: Its name.
        keep: Seconds that settled messages stay, so that a group can be moved back to them.
    """

    def __init__(self, link: Link, stream: str, keep: float) -> None:
        self._link = link
        self._stream = stream
        self._keep = keep
        # When it was seen that everything up to a place was settled.
        self._settled: deque[tuple[float, int]] = deque()

    async def look(self, lanes: Sequence[Lane], now: float | None = None) -> None:
        """
        Look at the stream and its consumers once, and tell the lanes; with the time given, also purge.

        The stream is looked at first: what is in it by then and not pending for a consumer afterwards is settled by it.
        """
        try:
            told = await self._link.api(f"STREAM.INFO.{self._stream}")
        except ApiError as error:
            if error.code != Code.STREAM_MISSING:
                raise
            for lane in lanes:
                lane.gone = True
            return
        consumers = await consumers_of(self._link, self._stream)
        by_name = {consumer["name"]: consumer for consumer in consumers}
        for lane in lanes:
            consumer = by_name.get(lane.name)
            if consumer is None:
                lane.gone = True
            else:
                delivered = consumer["delivered"]
                first, waiting = told["state"]["first_seq"], consumer["num_pending"]
                lane.look(first, delivered["consumer_seq"], delivered["stream_seq"], waiting)
        if now is not None and consumers and _trims(told["config"]):
            await self._trim(told["state"], consumers, now)

    async def _trim(self, state: Mapping[str, Any], consumers: Sequence[Mapping[str, Any]], now: float) -> None:
        """
        Remove what was settled by every group some time ago.

        A purge is not made while a message may wait to be lent again: it empties the server's queue of those, though
        what is in it is not purged (`consumer.purge` in nats-server 2.15), and they come only when their leases end.
        Where a pull waits nothing does.
        """
        floor = min(_floor(consumer, state["last_seq"]) for consumer in consumers)
        settled = self._settled
        # A group may have been moved back.
        while settled and settled[-1][1] > floor:
            settled.pop()
        settled.append((now, floor))
        first = state["first_seq"]
        if not state["messages"] or floor < first:
            return
        many = floor - first >= _MANY or state["bytes"] >= _MANY_BYTES
        if not many:
            while len(settled) > 1 and settled[1][0] <= now - self._keep:
                settled.popleft()
            since, floor = settled[0]
            if since > now - self._keep or floor < first:
                return
        if not await self._purges():
            await self._delete(range(first, min(floor, first + _AT_MOST) + 1))
        elif many or all(not consumer["num_ack_pending"] or consumer["num_waiting"] for consumer in consumers):
            await self._link.api(f"STREAM.PURGE.{self._stream}", {"seq": floor + 1})

    async def _purges(self) -> bool:
        """
        Whether the server's purge leaves alone what it does not purge.

        That of 2.9.10 forgets all loans of all consumers: what is nacked then never comes again. It is not known when
        that was mended; 2.15.1 is right.
        """
        wire = await self._link.wire()
        version = re.findall(r"\d+", str(wire.info["version"]))
        return [int(part) for part in version[:2]] >= [2, 15]

    async def _delete(self, sequences: range) -> None:
        """Remove messages one by one; some may be gone."""
        verb = f"{self._link.place.api}STREAM.MSG.DELETE.{self._stream}"
        for begin in range(0, len(sequences), _AT_ONCE):
            part = sequences[begin : begin + _AT_ONCE]
            bodies = [json.dumps({"seq": sequence, "no_erase": True}).encode() for sequence in part]
            await asyncio.gather(*(self._link.request(verb, body) for body in bodies))


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
