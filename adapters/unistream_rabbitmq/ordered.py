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

from unistream.driver.contract import ConsumerDriver
from unistream.driver.types import RawDelivery, Settlement, SettleOutcome, Token, Verb
from unistream.errors import ClosedError
from unistream_rabbitmq.balance import Balance
from unistream_rabbitmq.consumer import PATIENCE_SECONDS, Setting, declare_ephemeral
from unistream_rabbitmq.errors import translated
from unistream_rabbitmq.ledger import Ledger
from unistream_rabbitmq.link import Wire
from unistream_rabbitmq.place import Item, Place

__all__ = ["OrderedConsumer"]

AHEAD = 64
"""Messages that the broker pushes ahead, per partition; the same for every member and version."""
_LEAVE_SECONDS = 3.0

_log = logging.getLogger("unistream.driver.amqp")


class OrderedConsumer(ConsumerDriver):
    """One member; see `Setting`. `join` makes it one."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._loop = asyncio.get_running_loop()
        self._places: list[Place | None] = [None] * len(setting.queues.partitions)
        self._held: dict[Token, tuple[Place, Item]] = {}
        self._settled_before: set[Token] = set()
        self._ready: deque[tuple[Place, Item]] = deque()
        self._loans = 0
        self._closed = False
        self._asked = True
        self._clock: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._moving: set[int] = set()
        self._moves: set[asyncio.Task[None]] = set()
        queues = setting.queues
        self._balance = Balance(setting.consuming, queues.gossip, queues.roll, self._line, self._leave_some)

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
            if not self._setting.group.ephemeral:
                await self._balance.start()
                self._tick()
        except BaseException as error:
            self._drop_all("not joined")
            if isinstance(error, Exception):
                raise await self._setting.failed(error) from error
            raise

    async def _stand(self, numbers: Sequence[int] | range) -> None:
        results = await asyncio.gather(*(self._stand_in(number) for number in numbers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _stand_in(self, number: int) -> None:
        setting = self._setting
        wire = await Wire.open(setting.place, f"unistream consume {setting.queues.partitions[number]}")
        place: Place | None = None
        try:
            channel = await wire.channel()
            if setting.group.ephemeral:
                await declare_ephemeral(channel, setting)
            place = joined = Place(number, wire, channel, self._ledger(number))
            channel.raw.add_on_cancel_callback(lambda _: self._ended(joined, "the broker ended its consumer"))
            await channel.call(channel.raw.basic_qos, prefetch_count=AHEAD)
            self._places[number] = place
            await channel.call(
                channel.raw.basic_consume,
                setting.queues.partitions[number],
                on_message_callback=lambda _, method, properties, body: self._arrive(
                    joined, Item(method, properties, body)
                ),
            )
        except BaseException:
            if place is not None:
                self._places[number] = None
                self._forget(place, "not joined")
            wire.abort("not joined")
            raise
        channel.on_end(lambda reason: self._ended(joined, str(reason)))

    def _ledger(self, number: int) -> Ledger | None:
        setting = self._setting
        if setting.group.ephemeral:
            return None
        return Ledger(setting.queues.ledger(number), setting.control, setting.relay)

    def _ended(self, place: Place, reason: str) -> None:
        """A partition is lost: so are its loans. The next `receive` stands in line again."""
        if self._places[place.number] is not place:
            return
        self._places[place.number] = None
        self._forget(place, reason)
        place.wire.abort(reason)
        self._wake()

    def _forget(self, place: Place, reason: str) -> None:
        tokens = [token for token, (of, _) in self._held.items() if of is place]
        for token in tokens:
            del self._held[token]
        self._ready = deque(entry for entry in self._ready if entry[0] is not place)
        place.forget()
        if tokens and not self._closed:
            self._setting.lost(tokens, reason)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Arriving

    def _arrive(self, place: Place, item: Item) -> None:
        place.arrive(item)
        self._wake()

    async def _read(self) -> None:
        """Look at what was pushed."""
        for place in [place for place in self._places if place is not None]:
            try:
                ready = await place.read()
            except Exception as error:
                raise translated(error, self._setting.what, self._setting.topic.name) from error
            for item in ready:
                self._make_ready(place, item)

    def _make_ready(self, place: Place, item: Item) -> None:
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
            self._asked = True
            if self._closed:
                raise ClosedError(f"{self._setting.what}: closed", driver="amqp", topic=self._setting.topic.name)
            missing = [
                number for number, place in enumerate(self._places) if place is None and number not in self._moving
            ]
            if missing:
                try:
                    await self._stand(missing)
                except Exception as error:
                    raise await self._setting.failed(error) from error
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
        resting: deque[tuple[Place, Item]] = deque()
        while self._ready and len(taken) < limit:
            place, item = self._ready[0]
            if (item.suspect or place.open_notes) and not place.leaving:
                if taken:
                    break
                # Written down before it is lent: of a suspect, so that a loss from now on counts for it and not for
                # those beside it.
                item.origin = None
                await self._write(place)
                if place.leaving or not self._ready or self._ready[0][1] is not item:
                    continue  # its partition is on its way to another member, or was lost meanwhile
                if item.suspect:
                    self._ready.popleft()
                    return [self._lend(place, item)]
            self._ready.popleft()
            if place.leaving:
                resting.append((place, item))
            else:
                taken.append(self._lend(place, item))
        self._ready.extendleft(reversed([entry for entry in resting if self._places[entry[0].number] is entry[0]]))
        return taken

    def _lend(self, place: Place, item: Item) -> RawDelivery:
        self._loans += 1
        token = self._loans
        self._held[token] = (place, item)
        return RawDelivery(item.message, token, None, item.published_at, item.spent + 1, item.suspect, item.native)

    async def _write(self, place: Place) -> None:
        if self._setting.relay.blocked:
            return  # the broker takes nothing, and the notes stay as they are
        try:
            await place.write()
        except Exception as error:
            raise translated(error, self._setting.what, self._setting.topic.name) from error

    # Settling

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        nacked: dict[Place, list[Item]] = {}
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

    def _ack(self, place: Place, item: Item) -> None:
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

    def _tick(self) -> None:
        """Every second: a member that is not asked for messages leaves partitions of which it holds some unlent."""
        if not self._asked and self._waiter is None and not self._balance.alone:
            for place in self._places:
                if place is not None and place.items:
                    place.leaving = place.resting = True
            self._leave_idle()
        self._asked = False
        self._clock = self._loop.call_later(PATIENCE_SECONDS, self._tick)

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

    async def _move_back(self, place: Place) -> None:
        """Leave a partition, and stand in line for it again, last; a resting member not before it is asked."""
        if self._places[place.number] is not place:
            return
        self._places[place.number] = None
        self._moving.add(place.number)
        try:
            await self._hand_over(place)
            if not self._closed and not place.resting:
                await self._stand_in(place.number)
        except Exception as error:
            # The next `receive` stands in line again.
            _log.info("%s: partition %d: %s", self._setting.what, place.number, error)
        finally:
            self._moving.discard(place.number)
            self._wake()

    async def _hand_over(self, place: Place) -> None:
        """Make sure that the broker has the acks, leave the next owner the notes, and drop the connection."""
        try:
            if place.channel.error is None:
                await place.channel.catch_up()
                if place.active and not self._setting.relay.blocked:
                    await place.write(leaving=True)
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
        for timer in (*self._timers, *([self._clock] if self._clock is not None else [])):
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
