"""A member of a shared group: any member may be lent any message, each message is settled on its own."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from redis.exceptions import RedisError, ResponseError

from unistream.core.partitions import partition_for
from unistream.driver.types import RawDelivery
from unistream.errors import BrokerUnavailableError, ClosedError, GroupMissingError, TopicMissingError, UnistreamError
from unistream_redis.consumer import Setting, alive_for, beat_every
from unistream_redis.entries import message_of
from unistream_redis.loans import LendingConsumer
from unistream_redis.probe import MOST_SWEEP, POLL
from unistream_redis.registry import position_of
from unistream_redis.scripts import GIVE_BACK, TICK
from unistream_redis.wire import Argument, Request, pack

__all__ = ["SharedConsumer"]

_CLOSE_WITHIN = 1.0


class SharedConsumer(LendingConsumer):
    """
    One member: reads new messages with XREADGROUP, and looks for due ones with a script now and then.

    Whatever Redis hands over goes through `_held`, so that nothing is lost when `receive` is cancelled; it is given
    back when nobody takes it.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._partitioned = self._keys.ordered
        self._reading: Request | None = None
        self._read_at = 0.0
        self._ticking: asyncio.Task[None] | None = None
        self._next_tick = 0.0
        self._last_tick = 0.0
        self._recover_until = 0.0
        retention = self._topic.retention
        self._tick_arguments: list[Argument] = [
            self._lease_ms,
            int(min(self._group.lease / 4, MOST_SWEEP) * 1000),
            int(alive_for(self._group) * 1000),
            -1 if retention.max_age is None else int(retention.max_age * 1000),
            -1 if retention.max_messages is None else retention.max_messages,
            0 if retention else 1,
            1 if setting.server.acked_trim else 0,
        ]

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """See `ConsumerDriver.receive`."""
        began = self._loop.time()
        until = began + timeout
        looked = False
        while True:
            if self._closed:
                raise ClosedError("the consumer is closed", driver="redis", topic=self._topic.name)
            if self._held:
                if self._held_since >= began:
                    return self._take(limit)
                await self._lend_anew()
                continue
            now = self._loop.time()
            if self._ticking is not None or now >= self._next_tick:
                await self._tick(limit)
                continue
            if self._reading is None:
                if looked and now >= until:
                    return []
                looked = True
                self._reading = await self._read(limit, min(until, self._next_tick) - now)
            await self._finish_reading()

    async def close(self) -> None:
        """See `ConsumerDriver.close`."""
        if self._closed:
            return
        self._closed = True
        if self._beat is not None:
            self._beat.cancel()
        self._wake()
        try:
            async with asyncio.timeout(_CLOSE_WITHIN):
                if self._reading is not None:
                    await asyncio.wait([self._reading.future])
                if self._ticking is not None:
                    await asyncio.gather(self._ticking, return_exceptions=True)
        except TimeoutError:
            # The script below gives back what a late answer may still hand over to a closed connection.
            self._next_tick = 0.0
        finally:
            await self._reader.close()
        try:
            if self._group.ephemeral:
                await self._leave_nothing()
            else:
                await self._give_back(leave=True)
        except (BrokerUnavailableError, GroupMissingError, TopicMissingError):
            # Unreachable, or nothing to leave: the loans end with their leases.
            self._loans.clear()

    # Waiting for new messages

    async def _read(self, limit: int, block: float) -> Request:
        command: list[Argument] = ["XREADGROUP", "GROUP", self._group.name, self._name]
        command += ("COUNT", max(1, limit // len(self._streams)))
        milliseconds = int(block * 1000)
        if milliseconds > 0:
            command += ("BLOCK", milliseconds)
        command += ("STREAMS", *(keys.stream for keys in self._streams), *(">" for _ in self._streams))
        try:
            wire = await self._reader.wire()
            self._read_at = self._loop.time()
            return wire.request([pack(tuple(command))], 1, max(block, 0.0))
        except RedisError as error:
            raise await self._missing(error, "receive") from error

    async def _finish_reading(self) -> None:
        request = self._reading
        assert request is not None
        try:
            (reply,) = await asyncio.shield(request.future)
            if isinstance(reply, ResponseError):
                raise reply
        except asyncio.CancelledError:
            # What comes now is for the next call; it should come soon.
            self._unblock()
            raise
        except RedisError as error:
            self._reading = None
            if not isinstance(error, ResponseError):
                self._doubt()
            await self._handle_missing(await self._missing(error, "receive"))
            return
        if self._reading is request:
            self._reading = None
            for name, entries in reply or ():
                stream = self._stream_of(name)
                for entry in entries:
                    self._hold(stream, entry, 1, False, self._read_at)

    def _stream_of(self, name: bytes) -> int:
        if len(self._streams) == 1:
            return 0
        return next(at for at, keys in enumerate(self._streams) if keys.stream.encode() == name)

    def _wake(self) -> None:
        self._next_tick = 0.0
        self._unblock()

    def _unblock(self) -> None:
        """End a waiting read, best effort: where it is not permitted, the read ends by itself within a second."""
        wire = self._commands.current
        if self._reading is not None and not self._reading.future.done() and wire is not None:
            wire.request([pack(("CLIENT", "UNBLOCK", self._reader.client_id))], 1)

    # Looking for what is due

    async def _tick(self, limit: int) -> None:
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick_streams(limit))
            # Seen by the next call that waits for it; after a cancelled one there may be none.
            self._ticking.add_done_callback(lambda task: task.cancelled() or task.exception())
        task = self._ticking
        try:
            await asyncio.shield(task)
        except RedisError as error:
            if not isinstance(error, ResponseError):
                self._doubt()
            await self._handle_missing(await self._missing(error, "receive"))
        finally:
            if task.done() and self._ticking is task:
                self._ticking = None

    async def _tick_streams(self, limit: int) -> None:
        self._last_tick = started = self._loop.time()
        if self._recover_until and not self._held:
            if started >= self._recover_until:
                self._recover_until = 0.0
            await self._give_back(leave=False)
        wait = min(POLL, self._group.lease / 4) * random.uniform(0.9, 1.0)
        for at, keys in enumerate(self._streams):
            name = self._group.name
            now, due, gone, suspect, entries, counts = await self._reader.run(
                TICK,
                [keys.stream, keys.due(name), keys.held(name), keys.lost, self._keys.members(name), keys.sweep(name)],
                [name, self._name, limit, *self._tick_arguments],
            )
            if gone:
                self._report(
                    gone if gone > 0 else None,
                    "removed before the group settled them: by retention, overflow or a foreign program",
                )
            for entry, count in zip(entries, counts, strict=True):
                self._hold(at, entry, count, bool(suspect), started)
            limit -= len(entries)
            if due >= 0:
                wait = min(wait, max(0.0, (due - now) / 1000))
            if suspect or entries:
                wait = 0.0
            if suspect or (entries and limit == 0):
                break
        self._next_tick = self._loop.time() + wait

    async def _live(self) -> None:
        now = self._loop.time()
        if self._held and now - self._held_since > self._group.lease / 2:
            self._held.clear()
            await self._give_back(leave=False)
        if self._ticking is None and now - self._last_tick >= beat_every(self._group):
            following = self._next_tick
            await self._tick(0)
            self._next_tick = min(following, self._next_tick)

    async def _handle_missing(self, error: UnistreamError) -> None:
        """Raise; but an ephemeral group that was swept away during an outage starts again, with a gap."""
        if not (self._group.ephemeral and isinstance(error, GroupMissingError)):
            raise error
        await self._revive()
        self._loans.clear()

    # Taking and giving back

    def _hold(self, stream: int, entry: list[Any], count: int, suspect: bool, asked: float) -> None:
        identity, fields = entry
        if self._partitioned:
            message = message_of(fields, stream)
            position = position_of(identity, stream)
        else:
            message = message_of(fields, 0)
            position = identity.decode()
            if message.key is not None and self._topic.partitions > 1:
                message = message._replace(partition=partition_for(message.key, self._topic.partitions))
        self._held_since = min(self._held_since, asked) if self._held else asked
        self._held.append(
            RawDelivery(
                message,
                self._lend(stream, identity, count),
                position,
                int(identity.partition(b"-")[0]) / 1000,
                count,
                suspect,
                entry,
            )
        )

    def _doubt(self) -> None:
        """A reply was lost: Redis may have lent to this member what never arrived, also by a read still waiting."""
        self._recover_until = self._loop.time() + 2 * POLL
        self._next_tick = 0.0

    async def _give_back(self, *, leave: bool) -> None:
        """Give back all that Redis lent to this member and that is not in the caller's hands."""
        if self._reading is not None and not leave:
            # Its answer may bring what Redis has lent already: given back as well, it would be in two hands.
            self._unblock()
            await self._finish_reading()
        held = {delivery.token for delivery in self._held}
        self._held.clear()
        for loan in held:
            del self._loans[loan]
        name = self._group.name
        link = self._commands if leave else self._reader
        for at, keys in enumerate(self._streams):
            kept = [loan.entry for loan in self._loans if loan.stream == at]
            try:
                await link.run(
                    GIVE_BACK,
                    [keys.stream, keys.due(name), self._keys.members(name), keys.lost],
                    [name, self._name, 1 if leave else 0, *kept],
                )
            except RedisError as error:
                raise await self._missing(error, "give back") from error
