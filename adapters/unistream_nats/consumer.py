"""One member of one group: asks its lanes for messages, keeps its place, and leaves."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import (
    DataLoss,
    Event,
    GroupSpec,
    RawDelivery,
    Settlement,
    SettleOutcome,
    Token,
    TopicSpec,
)
from unistream.errors import (
    BrokerUnavailableError,
    ClosedError,
    GroupMissingError,
    TopicMissingError,
    UnistreamError,
)
from unistream_nats.errors import ApiError, NoResponder, translate
from unistream_nats.lane import Lane
from unistream_nats.link import Link
from unistream_nats.loans import Loans
from unistream_nats.names import stream_name, who_subject
from unistream_nats.notes import Notes
from unistream_nats.shelf import Shelf
from unistream_nats.upkeep import Upkeep
from unistream_nats.wire import Gone, Wire

__all__ = ["NatsConsumer", "Setting"]

_SLICE = 0.5
"""Seconds that one pull waits: as long as closing may have to wait for its end."""
_MOST_SLICE = 2.0
_SETTLING = 0.02
"""Seconds to wait for the rest of a pull that messages have come by."""
_GLANCE = 0.003
"""How a member with less room than lanes goes round: seconds at each while something flows."""
_LOOK = 0.2
"""Seconds at each while nothing does."""
_STALE = 0.5
"""Seconds after which it looks again at one that had nothing."""
_UPKEEP_EVERY = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """
    Where a member works, and for whom.

    Attributes:
        keep: Seconds that settled messages stay.
        create: Makes the group's consumers; used by ephemeral groups.
    """

    link: Link
    notes: Notes
    group: GroupSpec
    topic: TopicSpec
    lanes: Mapping[str, str | None]
    keep: float
    emit: Callable[[Event], None]
    lost: Callable[[Collection[Token], str], None]
    create: Callable[[], Awaitable[None]]
    closed: Callable[[NatsConsumer], None]


class NatsConsumer(ConsumerDriver):
    """One member. What its lanes bring goes to a shelf, from which `receive` takes."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._group = setting.group
        self._topic = setting.topic
        self._stream = stream_name(setting.topic.name)
        self._link = setting.link
        self._loop = asyncio.get_running_loop()
        self._loans = Loans(setting.link, setting.notes, setting.topic.name, setting.group.lease, setting.lost)
        self._shelf = Shelf(setting.group, setting.topic, self._loans, setting.notes)
        self._keyed = setting.group.ordering == "key"
        self._lanes = [
            Lane(
                setting.link.place.api,
                self._stream,
                name,
                most=1 if self._keyed and at < len(setting.lanes) - 1 else None,
                counts=not self._keyed,
                arrived=self._shelf.put,
                changed=self._wake,
            )
            for at, name in enumerate(setting.lanes)
        ]
        self._upkeep = Upkeep(setting.link, self._stream, setting.keep)
        self._name = f"m-{secrets.token_hex(8)}"
        self._wire: Wire | None = None
        self._who = 0
        self._signal = asyncio.Event()
        # What comes by a pull may have been lent since it was made, so a pull takes a part of a lease only.
        self._slice = min(_MOST_SLICE, max(_SLICE, _SLICE * len(self._lanes) / 8), setting.group.lease / 8)
        self._closed = False
        self._keeper: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Become a member."""
        with translate(f"join group {self._group.name!r} of topic {self._topic.name!r}", self._topic.name):
            await self._attach()
            await self._upkeep.look(self._lanes)
            if any(lane.gone for lane in self._lanes):
                raise await self._missing()
            await self._link.flush()
        self._link.watchers.add(self._wake)
        self._keeper = asyncio.create_task(self._keep())

    # Receiving

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """See `ConsumerDriver.receive`."""
        with translate(f"receive from topic {self._topic.name!r}", self._topic.name):
            return await self._receive(limit, timeout)

    async def _receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        started = self._loop.time()
        until = started + timeout
        asked = False
        while True:
            if self._closed:
                raise ClosedError("the consumer is closed", driver="nats", topic=self._topic.name)
            self._report()
            if len(self._shelf) and not any(lane.flowing for lane in self._lanes):
                taken = await self._shelf.take(limit, started)
                if taken:
                    return taken
                continue
            if any(lane.gone for lane in self._lanes):
                await self._revive()
            await self._attach()
            self._signal.clear()
            now = self._loop.time()
            if asked and now >= until and not any(lane.open for lane in self._lanes):
                return []
            asked = self._pull(limit, until - now) or asked
            await self._wait(until)

    async def _wait(self, until: float) -> None:
        """Wait for a message, the end of a pull, or the time to look again."""
        now = self._loop.time()
        open_lanes = [lane for lane in self._lanes if lane.open]
        if any(lane.flowing for lane in open_lanes):
            try:
                async with asyncio.timeout(_SETTLING):
                    await self._signal.wait()
            except TimeoutError:
                for lane in open_lanes:
                    lane.still()
            return
        at = min((lane.overdue_at for lane in open_lanes), default=max(now + 0.01, min(until, self._rested_at())))
        try:
            async with asyncio.timeout_at(at):
                await self._signal.wait()
        except TimeoutError:
            if any(lane.open and lane.overdue_at <= self._loop.time() for lane in open_lanes):
                await self._doubt()

    def _rested_at(self) -> float:
        return min(lane.rest_until for lane in self._lanes)

    def _pull(self, limit: int, seconds: float) -> bool:
        """Ask the lanes that are free for what there is room for; whether anybody was asked."""
        now = self._loop.time()
        room = limit - len(self._shelf) - sum(lane.left for lane in self._lanes)
        free = [lane for lane in self._lanes if lane.ready(now)]
        wait = min(self._slice, max(seconds, 0.02))
        if room < len(free):
            wait = min(wait, self._rank(free, now))
        data: list[bytes] = []
        for at, lane in enumerate(free):
            if room <= 0:
                break
            data.append(lane.pull(1 if self._shelf.cautious else max(1, room - (len(free) - 1 - at)), wait))
            room -= lane.left
        if data:
            assert self._wire is not None
            self._wire.write(data)
        return bool(data)

    def _rank(self, free: list[Lane], now: float) -> float:
        """
        Put the lanes to ask next in front, where there is no room for all; the seconds to wait at each.

        Those that were not looked at for some time come first, then those that had something lately; while there are
        any of these a look is short.
        """
        stale = now - max(_STALE, len(self._lanes) / 32)
        free.sort(key=lambda lane: (lane.asked_at > stale, not lane.served, lane.asked_at))
        return _GLANCE if free[0].asked_at <= stale or free[0].served else _LOOK

    def _wake(self) -> None:
        self._signal.set()

    def _report(self) -> None:
        for lane in self._lanes:
            if lane.lost:
                count, lane.lost = lane.lost, 0
                detail = "removed before the group read them: by retention or a foreign program"
                self._setting.emit(DataLoss(self._topic.name, self._group.name, count, detail))

    # Staying

    async def _attach(self) -> None:
        """Listen on the connection that stands; what was asked on one before is void."""
        wire = await self._link.wire()
        if wire is self._wire:
            return
        for lane in self._lanes:
            lane.attach(wire)
        self._who = wire.subscribe(who_subject(self._topic.name, self._group.name), self._answer_who)
        self._wire = wire

    def _answer_who(self, subject: bytes, reply: bytes, head: bytes, body: bytes) -> None:
        if self._wire is not None and self._wire.usable and reply:
            said = json.dumps({"name": self._name, "in_flight": len(self._loans) + len(self._shelf)}).encode()
            self._wire.write((b"PUB %b %d\r\n%b\r\n" % (reply, len(said), said),))

    async def _doubt(self) -> None:
        """A pull got no answer: look whether all is there, and ask anew."""
        await self._look()
        if self._wire is not None:
            for lane in self._lanes:
                lane.attach(self._wire)

    async def _look(self, now: float | None = None) -> None:
        try:
            await self._upkeep.look(self._lanes, now)
        except NoResponder as error:
            raise Gone(f"JetStream does not answer: {error}") from error

    async def _revive(self) -> None:
        """The server says that a consumer is gone: raise, unless it was swept away with an ephemeral group."""
        for lane in self._lanes:
            lane.gone = False
        await self._look()
        if not any(lane.gone for lane in self._lanes):
            return
        missing = await self._missing()
        if self._group.ephemeral and isinstance(missing, GroupMissingError):
            await self._setting.create()
            for lane in self._lanes:
                lane.gone = False
            self._loans.end_all("the ephemeral group was removed while its consumer was away")
            self._shelf.clear()
            detail = "the ephemeral group was removed while its consumer was away"
            self._setting.emit(DataLoss(self._topic.name, self._group.name, None, detail))
            return
        self._loans.end_all(str(missing))
        self._shelf.clear()
        raise missing

    async def _missing(self) -> UnistreamError:
        name = self._topic.name
        try:
            with translate(f"topic {name!r}", name):
                await self._link.api(f"STREAM.INFO.{self._stream}")
        except TopicMissingError:
            return TopicMissingError(f"topic {name!r} was deleted", driver="nats", topic=name)
        return GroupMissingError(f"group {self._group.name!r} of topic {name!r} was deleted", driver="nats", topic=name)

    async def _keep(self) -> None:
        """What must go on while nobody calls."""
        upkeep_at = self._loop.time() + _UPKEEP_EVERY
        while True:
            await asyncio.sleep(min(1.0, self._group.lease / 4))
            try:
                with translate(f"keep the place in group {self._group.name!r}", self._topic.name):
                    await self._attach()
                    await self._loans.keep()
                    await self._shelf.return_stale()
                    if self._loop.time() >= upkeep_at:
                        upkeep_at = self._loop.time() + _UPKEEP_EVERY
                        if self._group.ephemeral:
                            self._show_life()
                        await self._look(self._loop.time())
            except UnistreamError:
                # Nothing depends on this one time, and the next `receive` meets the same error and raises it.
                continue

    def _show_life(self) -> None:
        """
        Keep an ephemeral group while nobody receives.

        The server removes it for want of pulls; this one asks for a message of one byte at most, headers included, and
        there is none, so it never gets any.
        """
        body = json.dumps({"batch": 1, "no_wait": True, "max_bytes": 1}).encode()
        assert self._wire is not None
        for lane in self._lanes:
            subject = f"{self._link.place.api}CONSUMER.MSG.NEXT.{self._stream}.{lane.name}"
            reply = f"{self._wire.inbox}{self._wire.expect_none()}"
            self._wire.write((f"PUB {subject} {reply} {len(body)}\r\n".encode(), body, b"\r\n"))

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """See `ConsumerDriver.settle`."""
        return await self._loans.settle(batch)

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`."""
        return await self._loans.extend(tokens, seconds)

    # Leaving

    async def close(self) -> None:
        """See `ConsumerDriver.close`."""
        if self._closed:
            return
        self._closed = True
        self._setting.closed(self)
        self._link.watchers.discard(self._wake)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self._signal.set()
        try:
            with translate("leave", self._topic.name):
                await self._leave()
        except (BrokerUnavailableError, GroupMissingError, TopicMissingError):
            # Unreachable, or nothing to leave: what is left ends with its lease.
            self._shelf.clear()
        finally:
            for lane in self._lanes:
                lane.detach()
            if self._wire is not None:
                self._wire.unsubscribe(self._who)

    async def _leave(self) -> None:
        if self._wire is None or not self._wire.usable:
            if self._group.ephemeral:
                await self._remove()
            return
        while open_lanes := [lane for lane in self._lanes if lane.open]:
            at = max(lane.overdue_at for lane in open_lanes)
            if at <= self._loop.time() or not self._wire.usable:
                break
            self._signal.clear()
            try:
                async with asyncio.timeout_at(at):
                    await self._signal.wait()
            except TimeoutError:
                break
        if self._group.ephemeral:
            await self._remove()
            return
        await self._shelf.return_all()

    async def _remove(self) -> None:
        for lane in self._lanes:
            try:
                await self._link.api(f"CONSUMER.DELETE.{self._stream}.{lane.name}")
            except ApiError as error:
                if error.status != 404:
                    raise
