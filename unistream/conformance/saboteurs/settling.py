"""Saboteurs of settling: acks that are not sent, sent too early, or sent for others; nacks that are forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from unistream.conformance.saboteurs.table import saboteur
from unistream.conformance.wrap import ConsumerLayer, resolve, start
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import (
    GroupSpec,
    MaybeAwaitable,
    RawDelivery,
    Settlement,
    SettleOutcome,
    Token,
    Verb,
)
from unistream.errors import LeaseLostError


@saboteur(
    "ack-on-receive",
    "GRP-1",
    "GRP-4",
    "DEL-2",
    by=("ack.not-on-receive", "reb.kill9", "ord.unordered-kill9", "sim.client-faults"),
)
class AckOnReceive(ConsumerLayer):
    """Acks every delivery when it hands it over."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Ack at once."""
        batch = await resolve(self.inner.receive(limit, timeout))
        if batch:
            await resolve(self.inner.settle([Settlement(each.token, Verb.ACK) for each in batch]))
        return batch

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Answer without acting."""
        return [None for _ in batch]

    def extend(self, tokens: Sequence[Token], seconds: float) -> MaybeAwaitable[list[SettleOutcome]]:
        """Answer without acting."""
        return [None for _ in tokens]


@saboteur("ack-local-only", "DEL-1", "DEL-9")
class AckLocalOnly(ConsumerLayer):
    """Says that it acked, and tells nobody."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Pass on everything but acks."""
        sent = [each for each in batch if each.verb is not Verb.ACK]
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [None if each.verb is Verb.ACK else next(answers) for each in batch]


@saboteur("forget-some-acks", "DEL-1", "DEL-9", by=("reb.settle-during",))
class ForgetSomeAcks(ConsumerLayer):
    """Says yes to every seventh ack, and forgets it."""

    _count = 0

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Drop one in seven."""
        sent = []
        for each in batch:
            self._count += each.verb is Verb.ACK
            if each.verb is not Verb.ACK or self._count % 7:
                sent.append(each)
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [next(answers) if each in sent else None for each in batch]


@saboteur("ack-all", "GRP-1", "DEL-1", "DEL-2")
class AckAll(ConsumerLayer):
    """Acks everything lent before the acked delivery too."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._lent: list[Token] = []

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Remember the order of lending."""
        batch = await resolve(self.inner.receive(limit, timeout))
        self._lent += [each.token for each in batch]
        return batch

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Ack the older ones too, and answer the truth for those asked for."""
        for each in batch:
            if each.verb is Verb.ACK and each.token in self._lent:
                place = self._lent.index(each.token)
                older, self._lent = self._lent[:place], self._lent[place + 1 :]
                if older:
                    await resolve(self.inner.settle([Settlement(token, Verb.ACK) for token in older]))
        await resolve(self.inner.settle(batch))
        return [None for _ in batch]


@saboteur("drop-on-nack", "GRP-1", "DEL-2")
class DropOnNack(ConsumerLayer):
    """Acks what is nacked."""

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Turn nacks into acks."""
        return self.inner.settle(
            [Settlement(each.token, Verb.ACK) if each.verb is Verb.NACK else each for each in batch]
        )


@saboteur("nack-local-only", "DEL-2")
class NackLocalOnly(ConsumerLayer):
    """Says that it nacked, and lets the lease run out."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Pass on everything but nacks."""
        sent = [each for each in batch if each.verb is not Verb.NACK]
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [None if each.verb is Verb.NACK else next(answers) for each in batch]


@saboteur("ignore-delay", "DEL-2")
class IgnoreDelay(ConsumerLayer):
    """Gives nacked messages back at once, whatever the delay."""

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Set every delay to zero."""
        return self.inner.settle([each._replace(delay=0.0) for each in batch])


@saboteur("long-delay", "DEL-2")
class LongDelay(ConsumerLayer):
    """Keeps nacked messages ten seconds longer than asked."""

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Add ten seconds to every delay."""
        return self.inner.settle(
            [each._replace(delay=each.delay + 10.0) if each.verb is Verb.NACK else each for each in batch]
        )


@saboteur("delay-in-memory", "DEL-2", "GRP-1", "GRP-4", by=("nack.delay-survives-kill9",))
class DelayInMemory(ConsumerLayer):
    """Keeps delayed nacks in the member's memory, holding the lease meanwhile, and forgets them when it closes."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Hold delayed nacks back."""
        loop = asyncio.get_running_loop()
        sent = []
        for each in batch:
            if each.verb is Verb.NACK and each.delay:
                await resolve(self.inner.extend([each.token], 1e6))
                loop.call_later(each.delay, self._give_back, each.token)
            else:
                sent.append(each)
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [None if each.verb is Verb.NACK and each.delay else next(answers) for each in batch]

    def _give_back(self, token: Token) -> None:
        if not self._closed:
            start(self.inner.settle([Settlement(token, Verb.NACK)]))

    _closed = False

    async def close(self) -> None:
        """Forget what was held back."""
        self._closed = True
        await self.inner.close()


@saboteur("stale-ack", "DEL-7", by=("ack.stale-fenced",))
class StaleAck(ConsumerLayer):
    """Says yes to settles and extends that the broker refused."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Hide every refusal."""
        await resolve(self.inner.settle(batch))
        return [None for _ in batch]

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """Hide every refusal."""
        await resolve(self.inner.extend(tokens, seconds))
        return [None for _ in tokens]


@saboteur("steal-ack", "GRP-1", "GRP-2", "DEL-7")
class StealAck(ConsumerLayer):
    """Lets an ack settle the present loan of the message, whoever holds it."""

    _holders: ClassVar[dict[tuple[str, str, str], tuple[ConsumerDriver, Token]]] = {}

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._names: dict[Token, tuple[str, str, str]] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Remember who holds what."""
        batch = await resolve(self.inner.receive(limit, timeout))
        for each in batch:
            name = (self.group.topic, self.group.name, each.message.id)
            self._names[each.token] = name
            self._holders[name] = (self.inner, each.token)
        return batch

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Settle the present loan where the own one is lost."""
        outcomes = await resolve(self.inner.settle(batch))
        for place, (each, outcome) in enumerate(zip(batch, outcomes, strict=True)):
            holder = self._holders.get(self._names.get(each.token, ("", "", "")))
            if isinstance(outcome, LeaseLostError) and each.verb is Verb.ACK and holder is not None:
                await resolve(holder[0].settle([each._replace(token=holder[1])]))
                outcomes[place] = None
        return outcomes


@saboteur("refuse-settles", "DEL-1", "DEL-6", "DEL-7")
class RefuseSettles(ConsumerLayer):
    """Refuses every third settle although the lease has not ended."""

    _count = 0

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Settle all, and deny some."""
        outcomes = await resolve(self.inner.settle(batch))
        for place in range(len(outcomes)):
            self._count += 1
            if self._count % 3 == 0:
                outcomes[place] = LeaseLostError("refused for nothing", topic=self.group.topic)
        return outcomes


@saboteur("promises-too-long", "DEL-6", "DEL-7", "GRP-2", by=("ack.last-moment",))
class PromisesTooLong(ConsumerLayer):
    """Hands a delivery out by the call after the one that it was lent for, so that its lease seems to begin there."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._kept: list[RawDelivery] = []

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Keep what comes for the rest of the call."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout
        kept, self._kept = self._kept, []
        if not kept:
            self._kept = await resolve(self.inner.receive(limit, timeout))
            await asyncio.sleep(ends - loop.time())
        return kept


@saboteur("settle-hangs", "DEL-1", "END-2")
class SettleHangs(ConsumerLayer):
    """Never answers a settle."""

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Wait for ever."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody ends this wait")
