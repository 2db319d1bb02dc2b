"""Saboteurs that do one small thing wrong, each of which one assertion of the checkers alone notices."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import patch

import unistream
from unistream.capabilities import AckConfirm, Capabilities, Level
from unistream.conformance.saboteurs.table import mutation, saboteur
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, ProducerLayer, resolve, start
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import (
    GroupSpec,
    MaybeAwaitable,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Receipt,
    Settlement,
    SettleOutcome,
    Token,
    Verb,
)
from unistream.errors import BrokerUnavailableError, LeaseLostError

GHOST = "ghost-"
LAST_MOMENT = 0.97
"""This share of its lease later a message is at its last moment."""
NAP_LEASES = 6.0
COLLECT_SECONDS = 0.09
"""A little less than the time after which a checker takes an ack for held."""
BEAT_SECONDS = 0.05
RECOVERY_SECONDS = 10.0


def _coarse(position: str | None) -> str | None:
    """Round a position's last number down to an even one."""
    head, _, number = (position or "").rpartition("-")
    if not number.isdigit():
        return position
    return f"{head}-{int(number) // 2}" if head else str(int(number) // 2)


class _CoarseProducer(ProducerLayer):
    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Round the position of every receipt."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        return [
            each._replace(position=_coarse(each.position)) if isinstance(each, Receipt) else each for each in outcomes
        ]


class _CoarseConsumer(ConsumerLayer):
    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Round the position of every delivery."""
        batch = await resolve(self.inner.receive(limit, timeout))
        return [each._replace(position=_coarse(each.position)) for each in batch]


@saboteur("coarse-positions", "PUB-1", "PUB-4")
class CoarsePositions(DriverLayer):
    """Gives two neighbours the same position, in receipts and deliveries alike."""

    producer_layer = _CoarseProducer
    consumer_layer = _CoarseConsumer


@saboteur("count-from-two", "DEL-4")
class CountFromTwo(ConsumerLayer):
    """Counts attempts from two."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Count one more."""
        return [each._replace(attempt=each.attempt + 1) for each in await resolve(self.inner.receive(limit, timeout))]


@saboteur("count-reset-by-death", "DEL-4")
class CountResetByDeath(ConsumerLayer):
    """Counts on from two when a lease ends without a word, however often the message was lent before."""

    _spent: ClassVar[dict[tuple[str, str, str], int]] = defaultdict(int)

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Call every suspect the second attempt."""
        found = []
        for each in await resolve(self.inner.receive(limit, timeout)):
            name = (self.group.topic, self.group.name, each.message.id)
            if each.attempt == 1 or each.suspect:
                self._spent[name] = max(0, each.attempt - 2)
            found.append(each._replace(attempt=each.attempt - self._spent[name]))
        return found


@saboteur("last-moment-ack-lost", "DEL-1", by=("ack.last-moment",))
class LastMomentAckLost(ConsumerLayer):
    """Says yes to an ack that comes when little is left of its lease, and forgets it."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._since: dict[Token, float] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Note when each was lent."""
        batch = await resolve(self.inner.receive(limit, timeout))
        now = asyncio.get_running_loop().time()
        self._since.update((each.token, now) for each in batch)
        return batch

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Drop the acks of the last moment."""
        late = asyncio.get_running_loop().time() - LAST_MOMENT * self.group.lease
        sent = [each for each in batch if each.verb is not Verb.ACK or self._since.get(each.token, late) > late]
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [next(answers) if each in sent else None for each in batch]


@mutation("lost-ack-accepted", "DEL-7")
@contextmanager
def lost_ack_accepted() -> Iterator[None]:
    """Says yes to an ack although the lease has ended."""
    ack: Callable[..., Awaitable[None]] = unistream.Delivery.ack

    async def obliging(self: unistream.Delivery, confirm: bool = False) -> None:
        try:
            await ack(self, confirm)
        except LeaseLostError:
            return

    with patch.object(unistream.Delivery, "ack", obliging):
        yield


@saboteur("release-when-cut", "GRP-2", by=("grp.exclusive-over-outage",))
class ReleaseWhenCut(ConsumerLayer):
    """Gives away what its member holds when the connection is lost, although the leases go on."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._held: set[Token] = set()

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Give everything back when it is cut short."""
        try:
            batch = await resolve(self.inner.receive(limit, timeout))
        except (asyncio.CancelledError, BrokerUnavailableError):
            start(self.inner.settle([Settlement(token, Verb.RELEASE) for token in self._held]))
            raise
        self._held |= {each.token for each in batch}
        return batch

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Forget what is settled."""
        self._held -= {each.token for each in batch}
        return self.inner.settle(batch)


class _Naps(ConsumerLayer):
    """Takes a nap after every twelve messages."""

    _left = 12
    _until = 0.0

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Sleep when it is time, else take as many as are left until then."""
        now = asyncio.get_running_loop().time()
        if self._left <= 0:
            self._left, self._until = 12, now + NAP_LEASES * self.group.lease
        if now < self._until:
            await asyncio.sleep(min(timeout, self._until - now))
            return []
        batch = await resolve(self.inner.receive(min(limit, self._left), timeout))
        self._left -= len(batch)
        return batch


@saboteur("naps", "GRP-1", "GRP-4", "END-3", "DEL-2")
class Naps(DriverLayer):
    """Lets members wait beside messages that are due, and lends them much later."""

    consumer_layer = _Naps


class _GhostWriter(ProducerLayer):
    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Store something more beside the first message."""
        ghost = batch[0]._replace(id=GHOST + batch[0].id, dedupe="")
        return (await resolve(self.inner.publish([*batch, ghost], timeout)))[: len(batch)]


class _GhostKeeper(ConsumerLayer):
    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Keep back what nobody published, and never settle it."""
        batch = await resolve(self.inner.receive(limit, timeout))
        return [each for each in batch if not each.message.id.startswith(GHOST)]


@saboteur("ghosts", "END-3", "GRP-1")
class Ghosts(DriverLayer):
    """Keeps something in every topic that is never lent to anybody, so that no group is ever done."""

    producer_layer = _GhostWriter
    consumer_layer = _GhostKeeper


class _SendsLetters(ConsumerLayer):
    """Sends a dead letter at every nack, and gives the message back too."""

    places: ClassVar[dict[tuple[str, str], str]] = {}

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._messages: dict[Token, RawMessage] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Remember what is lent."""
        batch = await resolve(self.inner.receive(limit, timeout))
        self._messages.update((each.token, each.message) for each in batch)
        return batch

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Send a copy of what is nacked to the dead letters."""
        place = self.places.get((self.group.topic, self.group.name))
        nacked = [self._messages[each.token] for each in batch if each.verb is Verb.NACK]
        if place is not None and nacked:
            topic = await self.driver.topic(place)
            producer = await self.driver.producer(topic)
            # To partition 0: where a letter lies is of no interest.
            letters = [each._replace(dedupe=f"{each.id}/{self.group.name}", partition=0) for each in nacked]
            await resolve(producer.publish(letters, 5.0))
            await producer.close()
        return await resolve(self.inner.settle(batch))


class _SendsLettersDriver(DriverLayer):
    consumer_layer = _SendsLetters


@mutation("letters-at-every-nack", "DEL-4", layer=_SendsLettersDriver)
@contextmanager
def letters_at_every_nack() -> Iterator[None]:
    """Sends a dead letter at every nack, although the message is lent again."""
    group = unistream.Client.group

    def noting(self: unistream.Client, name: str | None, topic: str, **options: Any) -> unistream.Group:
        if isinstance(place := options.get("dead_letter"), str):
            _SendsLetters.places[topic, name or ""] = place
        return group(self, name, topic, **options)

    with patch.object(unistream.Client, "group", noting):
        try:
            yield
        finally:
            _SendsLetters.places.clear()


@mutation("gives-up-early", "DEL-4")
@contextmanager
def gives_up_early() -> Iterator[None]:
    """Moves a message aside after its first nack, whatever `max_attempts` says."""
    group = unistream.Client.group

    def hasty(self: unistream.Client, *args: Any, **options: Any) -> unistream.Group:
        retry = options.get("retry")
        if retry is not None and retry.max_attempts is not None:
            options["retry"] = unistream.Retry(max_attempts=1, backoff=retry.backoff)
        return group(self, *args, **options)

    with patch.object(unistream.Client, "group", hasty):
        yield


@saboteur("strands-on-leave", "GRP-4", "END-1", by=("shu.rolling-restart", "reb.leave-graceful"))
class StrandsOnLeave(ConsumerLayer):
    """Keeps what a leaving member did not settle until its lease ends, instead of handing it over."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Keep what is given back."""
        sent = [each for each in batch if each.verb is not Verb.RELEASE]
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [None if each.verb is Verb.RELEASE else next(answers) for each in batch]

    async def close(self) -> None:
        """Go away without a word to the broker."""


@saboteur("acks-dropped-on-leave", "DEL-1", "DEL-9", by=("shu.rolling-restart",))
class AcksDroppedOnLeave(ConsumerLayer):
    """Collects acks for a moment, says yes to them, and forgets them when it leaves meanwhile."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._collected: list[Settlement] = []

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Collect acks, send the rest."""
        acks = [each for each in batch if each.verb is Verb.ACK]
        if acks and not self._collected:
            asyncio.get_running_loop().call_later(COLLECT_SECONDS, self._send)
        self._collected += acks
        sent = [each for each in batch if each.verb is not Verb.ACK]
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [None if each.verb is Verb.ACK else next(answers) for each in batch]

    def _send(self) -> None:
        batch, self._collected = self._collected, []
        if batch:
            start(self.inner.settle(batch))

    async def close(self) -> None:
        """Forget what was collected."""
        self._collected.clear()
        await self.inner.close()


@saboteur("sleeper-stays-out", "END-3", by=("reb.zombie",), needs=("process",))
class SleeperStaysOut(ConsumerLayer):
    """Gets nothing any more once its process has stood still for longer than a lease."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._loop = asyncio.get_running_loop()
        self._beaten = self._loop.time()
        self._out = False
        self._beat()

    def _beat(self) -> None:
        """Notice how long nothing ran."""
        now = self._loop.time()
        self._out = self._out or now - self._beaten > self.group.lease
        self._beaten = now
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Wait for nothing."""
        if self._out:
            await asyncio.sleep(timeout)
            return []
        return await resolve(self.inner.receive(limit, timeout))

    async def close(self) -> None:
        """Beat no more."""
        self._timer.cancel()
        await self.inner.close()


class _ForgetsBesideDeath(ConsumerLayer):
    """Says yes to the acks of two seconds after it was lent what somebody died with, and forgets them."""

    _until = 0.0

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Notice a death."""
        batch = await resolve(self.inner.receive(limit, timeout))
        if any(each.suspect for each in batch):
            self._until = asyncio.get_running_loop().time() + RECOVERY_SECONDS / 5
        return batch

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Drop acks while the group recovers."""
        recovering = asyncio.get_running_loop().time() < self._until
        sent = [each for each in batch if each.verb is not Verb.ACK or not recovering]
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [next(answers) if each in sent else None for each in batch]


@saboteur("acks-forgotten-beside-death", "DEL-1", "DEL-9")
class AcksForgottenBesideDeath(DriverLayer):
    """Shares out partitions, slowly, and forgets the acks that come after a death without a word about it."""

    consumer_layer = _ForgetsBesideDeath

    def claims(self, capabilities: Capabilities) -> Capabilities:
        """Claim no more than such a backend can."""
        return replace(
            capabilities,
            lease=replace(capabilities.lease, scope="member", recover_within=RECOVERY_SECONDS),
            parallelism=replace(capabilities.parallelism, bound="partitions"),
            ack_confirm=AckConfirm(level=Level.NONE),
        )
