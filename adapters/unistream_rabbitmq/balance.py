"""How the members of an ordered group share its partitions: each tells the others, every second, its places in line.

RabbitMQ makes the consumer that came first the active one of a queue, and tells nobody who that is. So the first member
would keep all partitions. Whoever sees that it has more than its share leaves the surplus and joins again at the end of
the line. Being wrong about it costs fairness for a while, never order: that is the broker's part.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from unistream_rabbitmq.link import Channel, Line

__all__ = ["Balance"]

TICK = 1.0
_FORGET_AFTER = 3.5
_log = logging.getLogger("unistream.driver.amqp")


class Balance:
    """
    One member's view of its group.

    Args:
        line: The connection to talk on.
        exchange: The group's exchange for it.
        roll: The group's queue by which members are counted.
        mine: Per partition: since when this member stands in line (seconds since the epoch; `None`: it does not), and
            whether it surely is the active one.
        surplus: Called with partitions to leave.
    """

    def __init__(
        self,
        line: Line,
        exchange: str,
        roll: str,
        mine: Callable[[], list[tuple[float | None, bool]]],
        surplus: Callable[[list[int]], None],
    ) -> None:
        self._line = line
        self._exchange = exchange
        self._roll = roll
        self._mine = mine
        self._surplus = surplus
        self._name = secrets.token_hex(6)
        self._channel: Channel | None = None
        self._others: dict[str, tuple[float, list[tuple[float | None, bool]]]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def alone(self) -> bool:
        """Whether no other member was heard of lately."""
        return not self._others

    async def start(self) -> None:
        """Be counted, and begin talking."""
        self._channel = await self._join()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Tell the others goodbye."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._channel is not None and self._channel.error is None:
            self._tell([])
            await self._channel.close()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                if self._channel is None or self._channel.error is not None:
                    self._channel = await self._join()
                self._tell(self._mine())
                await asyncio.sleep(TICK)
                now = loop.time()
                self._others = {name: said for name, said in self._others.items() if now - said[0] < _FORGET_AFTER}
                surplus = self._too_many()
                if surplus:
                    self._surplus(surplus)
            except Exception as error:
                # Without talk nobody moves; the partitions stay where they are until the connection is back.
                _log.debug("%s: no talk: %r", self._exchange, error)
                await asyncio.sleep(TICK)

    async def _join(self) -> Channel:
        channel = await (await self._line.wire()).channel()
        raw = channel.raw
        await channel.call(raw.exchange_declare, self._exchange, "fanout", auto_delete=True)
        frame = await channel.call(raw.queue_declare, "", exclusive=True, auto_delete=True)
        queue = frame.method.queue
        await channel.call(raw.queue_bind, queue, self._exchange)
        await channel.call(raw.basic_consume, queue, on_message_callback=self._hear, auto_ack=True)
        await channel.call(raw.basic_consume, self._roll, on_message_callback=_nothing, auto_ack=True)
        return channel

    def _tell(self, mine: list[tuple[float | None, bool]]) -> None:
        if self._channel is not None:
            body = json.dumps({"name": self._name, "line": mine}).encode()
            self._channel.raw.basic_publish(self._exchange, "", body)

    def _hear(self, _: Any, __: Any, ___: Any, body: bytes) -> None:
        said = json.loads(body)
        if said["name"] != self._name:
            if said["line"]:
                self._others[said["name"]] = (asyncio.get_running_loop().time(), [tuple(one) for one in said["line"]])
            else:
                self._others.pop(said["name"], None)

    def _too_many(self) -> list[int]:
        """The partitions beyond this member's share."""
        mine = self._mine()
        views = [line for _, line in self._others.values() if len(line) == len(mine)]
        if not views:
            return []
        own = []
        for partition, (since, active) in enumerate(mine):
            if since is None or (not active and any(line[partition][1] for line in views)):
                continue
            if active or all(line[partition][0] is None or line[partition][0] > since for line in views):  # type: ignore[operator]
                own.append(partition)
        share = -(-len(mine) // (len(views) + 1))
        return own[share:]


def _nothing(*_: Any) -> None:
    """Nobody publishes to the roll."""


def now() -> float:
    """Since when a place in line is counted."""
    return time.time()
