"""A member of an ordered group: one quorum queue per partition, each with a single active consumer.

Within a partition one message per key is lent at a time. What is nacked waits here, with its key; the broker never
requeues a single message. Each partition has a connection of its own, and a member leaves a partition by dropping that
connection: only then does the broker hand over in order. After `basic.cancel`, and also after `channel.close`,
RabbitMQ 3.10.8 lends the next messages to the next consumer before it returns the unsettled ones.

All members ask for the same number of messages ahead: with fewer, a returned message could overtake another one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from pika import BasicProperties

from unistream.core.partitions import KeyTurns
from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import RawDelivery, RawMessage, Settlement, SettleOutcome, Token, Verb
from unistream.errors import ClosedError
from unistream_rabbitmq.balance import Balance, now
from unistream_rabbitmq.consumer import Setting, declare_ephemeral
from unistream_rabbitmq.errors import translated
from unistream_rabbitmq.ledger import Ledger, Note, identity
from unistream_rabbitmq.link import Channel, Wire
from unistream_rabbitmq.messages import arrived

__all__ = ["OrderedConsumer"]

AHEAD = 64
"""Messages that the broker pushes ahead, per partition; the same for every member and version."""
_LEAVE_SECONDS = 3.0

_log = logging.getLogger("unistream.driver.amqp")


class _Item:
    """
    An unsettled message of a partition.

    Attributes:
        spent: Lendings that count before the next one; of a suspect, with the one that may have killed its member.
        lost: How often the broker returned it.
        origin: The last owner's note, which stands for a suspect until it is lent here: what is lost beside it
            meanwhile counts once.
        suspect: The last loan of it ended without a word.
    """

    __slots__ = ("due", "lost", "message", "native", "origin", "published_at", "spent", "suspect", "tag")

    def __init__(self, method: Any, properties: BasicProperties, body: bytes) -> None:
        said = arrived(method, properties, body)
        self.tag: int = method.delivery_tag
        self.message: RawMessage = said.message
        self.native = properties
        self.published_at = said.published_at
        self.spent = said.spent
        self.lost = said.lost
        self.suspect = False
        self.due = 0.0
        self.origin: Note | None = None

    def note(self, leaving: bool = False) -> Note:
        """What the next owner must know; `leaving`: the broker will count one more return."""
        return self.origin or Note(self.spent, self.due, self.lost + leaving)


class _Place:
    """This member's place in line for one partition, for the time of one connection."""

    def __init__(self, number: int, wire: Wire, channel: Channel) -> None:
        self.number = number
        self.wire = wire
        self.channel = channel
        self.since = now()
        self.active = False
        self.leaving = False
        self.items: dict[int, _Item] = {}
        self.turns: KeyTurns[_Item] = KeyTurns()
        # Pushed, but not looked at until the last owner's notes are read.
        self.unread: deque[_Item] = deque()
        self.notes: dict[str, Note] | None = None


class OrderedConsumer(ConsumerDriver):
    """One member; see `Setting`. `join` makes it one."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._loop = asyncio.get_running_loop()
        self._places: list[_Place | None] = [None] * len(setting.queues.partitions)
        self._ledgers = [
            Ledger(setting.queues.ledger(number), setting.control, setting.relay) for number in range(len(self._places))
        ]
        self._held: dict[Token, tuple[_Place, _Item]] = {}
        self._settled_before: set[Token] = set()
        self._ready: deque[tuple[_Place, _Item]] = deque()
        self._loans = 0
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._moving: set[int] = set()
        self._moves: set[asyncio.Task[None]] = set()
        self._balance = Balance(setting.consuming, setting.queues.gossip, self._line, self._leave_some)

    @property
    def in_flight(self) -> int:
        """Messages of the group that this member holds, lent or fetched ahead."""
        return sum(len(place.items) for place in self._places if place is not None)

    def of(self, topic: str, group: str) -> bool:
        """Whether it is a member of this group."""
        return (self._setting.topic.name, self._setting.group.name) == (topic, group)

    # Joining

    async def join(self) -> None:
        """Stand in line for every partition."""
        try:
            await self._stand(range(len(self._places)))
        except BaseException:
            self._drop_all("not joined")
            raise
        if not self._setting.group.ephemeral:
            self._balance.start()

    async def _stand(self, numbers: Sequence[int] | range) -> None:
        results = await asyncio.gather(*(self._stand_in(number) for number in numbers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise await self._setting.failed(result) from result

    async def _stand_in(self, number: int) -> None:
        setting = self._setting
        wire = await Wire.open(setting.place, f"unistream consume {setting.queues.partitions[number]}")
        place: _Place | None = None
        try:
            channel = await wire.channel()
            if setting.group.ephemeral:
                await declare_ephemeral(channel, setting)
            place = joined = _Place(number, wire, channel)
            channel.raw.add_on_cancel_callback(lambda _: self._ended(joined, "the broker ended its consumer"))
            await channel.call(channel.raw.basic_qos, prefetch_count=AHEAD)
            self._places[number] = place
            await channel.call(
                channel.raw.basic_consume,
                setting.queues.partitions[number],
                on_message_callback=lambda _, method, properties, body: self._arrive(
                    joined, _Item(method, properties, body)
                ),
            )
        except BaseException:
            if place is not None:
                self._places[number] = None
                self._forget(place, "not joined")
            wire.abort("not joined")
            raise
        channel.on_end(lambda reason: self._ended(joined, str(reason)))

    def _ended(self, place: _Place, reason: str) -> None:
        """A partition is lost: so are its loans. The next `receive` stands in line again."""
        if self._places[place.number] is not place:
            return
        self._places[place.number] = None
        self._forget(place, reason)
        place.wire.abort(reason)
        self._wake()

    def _forget(self, place: _Place, reason: str) -> None:
        tokens = [token for token, (of, _) in self._held.items() if of is place]
        for token in tokens:
            del self._held[token]
        self._ready = deque(entry for entry in self._ready if entry[0] is not place)
        place.items.clear()
        place.unread.clear()
        if tokens and not self._closed:
            self._setting.lost(tokens, reason)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Arriving

    def _arrive(self, place: _Place, item: _Item) -> None:
        place.items[item.tag] = item
        place.unread.append(item)
        if not place.active:
            place.active = True
            if not item.lost:
                place.notes = {}  # what returned comes first, so nothing did
        self._wake()

    async def _read(self) -> None:
        """Look at what was pushed; first at the last owner's notes."""
        for place in [place for place in self._places if place is not None and place.unread]:
            if place.notes is None:
                try:
                    place.notes = await self._ledgers[place.number].read()
                except Exception as error:
                    raise translated(error, self._setting.what, self._setting.topic.name) from error
            self._look(place, place.notes)

    def _look(self, place: _Place, notes: dict[str, Note]) -> None:
        while place.unread:
            item = place.unread.popleft()
            if item.lost:
                note = notes.pop(identity(item.message), Note())
                item.spent = max(item.spent, note.spent)
                item.due = note.due
                if item.lost > note.returns:
                    item.suspect = True
                    item.origin = note
                    item.spent += 1
            elif notes:
                notes.clear()  # all that returned has come
            if place.turns.offer(item.message.key, item):
                self._make_ready(place, item)

    def _make_ready(self, place: _Place, item: _Item) -> None:
        if item.tag not in place.items:
            return  # its partition was lost while we waited for something
        wait = item.due - time.time()
        if wait <= 0:
            self._ready.append((place, item))
            self._wake()
            return
        timer: asyncio.TimerHandle

        def due() -> None:
            self._timers.discard(timer)
            item.due = 0.0
            if item.tag in place.items and self._places[place.number] is place:
                self._ready.append((place, item))
                self._wake()

        timer = self._loop.call_later(wait, due)
        self._timers.add(timer)

    # Lending

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """See `ConsumerDriver.receive`."""
        until = self._loop.time() + timeout
        while True:
            if self._closed:
                raise ClosedError(f"{self._setting.what}: closed", driver="amqp", topic=self._setting.topic.name)
            missing = [
                number for number, place in enumerate(self._places) if place is None and number not in self._moving
            ]
            if missing:
                await self._stand(missing)
            await self._read()
            taken = await self._take(limit)
            if taken or timeout <= 0:
                return taken
            self._waiter = self._loop.create_future()
            try:
                async with asyncio.timeout_at(until):
                    await self._waiter
            except TimeoutError:
                return []
            finally:
                self._waiter = None

    async def _take(self, limit: int) -> list[RawDelivery]:
        taken: list[RawDelivery] = []
        resting: deque[tuple[_Place, _Item]] = deque()
        while self._ready and len(taken) < limit:
            place, item = self._ready[0]
            if item.suspect and not place.leaving:
                if taken:
                    break
                await self._note_suspect(place, item)
                if not self._ready or self._ready[0][1] is not item:
                    continue  # its partition was lost meanwhile
                self._ready.popleft()
                taken.append(self._lend(place, item))
                break
            self._ready.popleft()
            if place.leaving:
                resting.append((place, item))
            else:
                taken.append(self._lend(place, item))
        self._ready.extendleft(reversed([entry for entry in resting if self._places[entry[0].number] is entry[0]]))
        return taken

    async def _note_suspect(self, place: _Place, item: _Item) -> None:
        """Write down that it is lent, so that a loss from now on counts for it and not for those beside it."""
        item.origin = None
        await self._write(place)

    def _lend(self, place: _Place, item: _Item) -> RawDelivery:
        self._loans += 1
        token = self._loans
        self._held[token] = (place, item)
        return RawDelivery(item.message, token, None, item.published_at, item.spent + 1, item.suspect, item.native)

    async def _write(self, place: _Place, *, leaving: bool = False) -> None:
        if self._setting.group.ephemeral or self._setting.relay.blocked:
            return  # nobody comes after; or the broker takes nothing, and the notes stay as they are
        notes = dict(place.notes or {})
        for item in place.items.values():
            note = item.note(leaving)
            if note != Note():
                notes[identity(item.message)] = note
        try:
            await self._ledgers[place.number].write(notes)
        except Exception as error:
            raise translated(error, self._setting.what, self._setting.topic.name) from error

    # Settling

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        nacked: dict[_Place, list[_Item]] = {}
        for index, (token, verb, delay) in enumerate(batch):
            found = self._held.pop(token, None)
            if found is None:
                if token not in self._settled_before:
                    outcomes[index] = self._setting.gone("its lease has ended")
                continue
            place, item = found
            self._settled_before.add(token)
            if verb is Verb.ACK:
                self._ack(place, item)
                continue
            if verb is not Verb.RELEASE:
                item.spent += 1
                item.suspect = verb is Verb.EXPIRE
                item.origin = None
                item.due = time.time() + delay if delay else 0.0
                nacked.setdefault(place, []).append(item)
            else:
                self._make_ready(place, item)
        for place, items in nacked.items():
            # Lent here again whatever happens; the note is for the next owner.
            for item in items:
                self._make_ready(place, item)
        for place in nacked:
            await self._write(place)
        self._settled_before.clear()
        self._leave_idle()
        return outcomes

    def _ack(self, place: _Place, item: _Item) -> None:
        del place.items[item.tag]
        place.channel.raw.basic_ack(item.tag)
        following = place.turns.done(item.message.key)
        if following is not None:
            self._make_ready(place, following)

    def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`; a loan stands as long as its connection."""
        return [None if token in self._held else self._setting.gone("its connection was lost") for token in tokens]

    # Sharing and leaving

    def _line(self) -> list[tuple[float | None, bool]]:
        return [(None, False) if place is None else (place.since, place.active) for place in self._places]

    def _leave_some(self, numbers: list[int]) -> None:
        for number in numbers:
            place = self._places[number]
            if place is not None:
                place.leaving = True
        self._leave_idle()

    def _leave_idle(self) -> None:
        """Leave the partitions that are to be left and have nothing lent any more."""
        if not any(place is not None and place.leaving for place in self._places):
            return
        lent = {place for place, _ in self._held.values()}
        for place in self._places:
            if place is not None and place.leaving and place not in lent:
                move = self._loop.create_task(self._move_back(place))
                self._moves.add(move)
                move.add_done_callback(self._moves.discard)

    async def _move_back(self, place: _Place) -> None:
        """Leave a partition, and stand in line for it again, last."""
        if self._places[place.number] is not place:
            return
        self._places[place.number] = None
        self._moving.add(place.number)
        try:
            await self._hand_over(place)
            if not self._closed:
                await self._stand_in(place.number)
        except Exception as error:
            # The next `receive` stands in line again.
            _log.info("%s: partition %d: %s", self._setting.what, place.number, error)
        finally:
            self._moving.discard(place.number)
            self._wake()

    async def _hand_over(self, place: _Place) -> None:
        """Leave the next owner the notes, make sure that the broker has the acks, and drop the connection."""
        try:
            # Without having read the notes there are none to replace them with.
            if place.items and place.channel.error is None and place.notes is not None:
                self._look(place, place.notes)
                await self._write(place, leaving=True)
            if place.channel.error is None:
                # Answered after everything before it.
                await place.channel.call(place.channel.raw.basic_qos, prefetch_count=AHEAD)
        finally:
            self._forget(place, "handed over")
            place.wire.abort("handed over")

    def _drop_all(self, why: str) -> None:
        for number, place in enumerate(self._places):
            if place is not None:
                self._places[number] = None
                place.wire.abort(why)

    async def close(self) -> None:
        """See `ConsumerDriver.close`."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        for timer in self._timers:
            timer.cancel()
        await self._balance.close()
        places = [place for place in self._places if place is not None]
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                if self._moves:
                    await asyncio.wait(self._moves)
                for result in await asyncio.gather(
                    *(self._hand_over(place) for place in places), return_exceptions=True
                ):
                    if isinstance(result, BaseException):
                        _log.info("%s: left without notes: %s", self._setting.what, result)
        except TimeoutError:
            _log.info("%s: left without notes: no answer in time", self._setting.what)
        finally:
            self._drop_all("closed")
            self._held.clear()
            await self._setting.relay.close()
            self._setting.closed(self)
