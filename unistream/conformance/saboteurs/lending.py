"""Saboteurs of lending: who gets a message, when, how often, and what a member may hold."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from unistream.conformance.saboteurs.table import saboteur
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, resolve, start
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import (
    GroupSpec,
    MaybeAwaitable,
    RawDelivery,
    Settlement,
    SettleOutcome,
    Token,
    TopicSpec,
    Verb,
)
from unistream.errors import GroupMissingError, TopicMissingError


@saboteur("never-expire", "GRP-4", "DEL-6", by=("net.isolate-one-member",))
class NeverExpire(ConsumerLayer):
    """Lends for ever: what a dead member held never comes back."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Extend everything for years at once."""
        batch = await resolve(self.inner.receive(limit, timeout))
        if batch:
            await resolve(self.inner.extend([each.token for each in batch], 1e8))
        return batch

    def extend(self, tokens: Sequence[Token], seconds: float) -> MaybeAwaitable[list[SettleOutcome]]:
        """Extend by years whatever is asked."""
        return self.inner.extend(tokens, 1e8)


@saboteur("expire-early", "GRP-2", "DEL-6", "DEL-9")
class ExpireEarly(ConsumerLayer):
    """Takes deliveries back long before their lease ends."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Plan to take everything back after a twentieth of the lease."""
        batch = await resolve(self.inner.receive(limit, timeout))
        loop = asyncio.get_running_loop()
        for each in batch:
            loop.call_later(self.group.lease / 20, self._take_back, each.token)
        return batch

    def _take_back(self, token: Token) -> None:
        start(self.inner.settle([Settlement(token, Verb.RELEASE)]))


@saboteur("extend-noop", "DEL-6", "GRP-2", "DEL-7")
class ExtendNoop(ConsumerLayer):
    """Says that it extended a lease, and does nothing."""

    def extend(self, tokens: Sequence[Token], seconds: float) -> MaybeAwaitable[list[SettleOutcome]]:
        """Answer without acting."""
        return [None for _ in tokens]


class _Pool(ConsumerLayer):
    """Has a second way for messages to reach members: copies laid out by one for another."""

    pool: ClassVar[dict[Any, list[tuple[ConsumerLayer, RawDelivery]]]] = defaultdict(list)

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._copies: set[Token] = set()

    def copies(self, where: Any) -> list[RawDelivery]:
        """Take the copies that others laid out."""
        mine = [(owner, each) for owner, each in self.pool[where] if owner is not self]
        self.pool[where] = [pair for pair in self.pool[where] if pair[0] is self]
        found = []
        for owner, each in mine[:1]:
            token = ("copy", id(owner), each.token)
            self._copies.add(token)
            found.append(each._replace(token=token))
        return found

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Answer for copies without the broker."""
        real = [each for each in batch if each.token not in self._copies]
        answers = iter(await resolve(self.inner.settle(real)) if real else [])
        return [None if each.token in self._copies else next(answers) for each in batch]

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """Answer for copies without the broker."""
        real = [token for token in tokens if token not in self._copies]
        answers = iter(await resolve(self.inner.extend(real, seconds)) if real else [])
        return [None if token in self._copies else next(answers) for token in tokens]


@saboteur("lend-twice", "GRP-2", "DEL-9")
class LendTwice(_Pool):
    """Lends every message to a second member of the group as well."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Take a copy first, then lay out copies of what comes."""
        where = (self.group.topic, self.group.name)
        copies = self.copies(where)
        if copies:
            return copies
        batch = await resolve(self.inner.receive(limit, timeout))
        self.pool[where] += [(self, each) for each in batch]
        return batch


@saboteur("one-group-only", "GRP-1")
class OneGroupOnly(ConsumerLayer):
    """Lets a message that one group has acked vanish from the others."""

    _acked: ClassVar[dict[tuple[str, str], str]] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Ack in silence what another group has acked."""
        batch = await resolve(self.inner.receive(limit, timeout))
        gone = [each for each in batch if self._acked.get(self._name(each), self.group.name) != self.group.name]
        if gone:
            await resolve(self.inner.settle([Settlement(each.token, Verb.ACK) for each in gone]))
        kept = [each for each in batch if each not in gone]
        self._names |= {each.token: self._name(each) for each in kept}
        return kept

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Remember what was acked here."""
        for each in batch:
            if each.verb is Verb.ACK and each.token in self._names:
                self._acked.setdefault(self._names[each.token], self.group.name)
        return self.inner.settle(batch)

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._names: dict[Token, tuple[str, str]] = {}

    def _name(self, each: RawDelivery) -> tuple[str, str]:
        return self.group.topic, each.message.id


@saboteur("reverse-delivery", "ORD-5", "ORD-2")
class ReverseDelivery(ConsumerLayer):
    """Hands out every batch back to front."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Reverse."""
        return (await resolve(self.inner.receive(limit, timeout)))[::-1]


@saboteur("overtake", "ORD-2", by=("ord.m3-m4-kill9", "ord.across-rebalance", "sim.keyed-storm"))
class Overtake(DriverLayer):
    """Accepts ordered groups and runs them unordered."""

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """Create it unordered, and say otherwise."""
        made = await self.inner.create_group(_unordered(spec))
        return made if spec.ordering == "none" else GroupSpec(**{**_fields(made), "ordering": "key"})

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """Join it unordered."""
        return await super().consumer(_unordered(group), topic, max_in_flight=max_in_flight, lost=lost)


def _fields(spec: GroupSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__slots__}


def _unordered(spec: GroupSpec) -> GroupSpec:
    return GroupSpec(**{**_fields(spec), "ordering": "none"})


class _NewestFirst(ConsumerLayer):
    """Takes all there is, and hands out the newest message of each key that is not in hand."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._there: list[RawDelivery] = []
        self._out: dict[Token, bytes | None] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Look from the back."""
        self._there += await resolve(self.inner.receive(100, 0.0 if self._there else timeout))
        found: list[RawDelivery] = []
        for each in reversed(self._there):
            if len(found) < limit and each.message.key not in self._out.values():
                self._out[each.token] = each.message.key
                found.append(each)
        self._there = [each for each in self._there if each not in found]
        return found

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Note which keys are free again."""
        for each in batch:
            self._out.pop(each.token, None)
        return self.inner.settle(batch)


@saboteur("newest-first", "ORD-2", by=("ord.one-at-a-time",))
class NewestFirst(Overtake):
    """Lends one message of a key at a time, but the newest first."""

    consumer_layer = _NewestFirst
    beyond = 100


class _OldestFirst(_NewestFirst):
    """Keeps the order among what its own member has, and knows nothing of the others."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Look from the front."""
        self._there += await resolve(self.inner.receive(limit, 0.0 if self._there else timeout))
        found: list[RawDelivery] = []
        for each in self._there:
            if len(found) < limit and each.message.key not in self._out.values():
                self._out[each.token] = each.message.key
                found.append(each)
        self._there = [each for each in self._there if each not in found]
        if not found:  # until a key is free again
            await asyncio.sleep(min(timeout, 0.01))
        return found


@saboteur("ordered-per-member", "ORD-2", by=("ord.redelivered-batch",))
class OrderedPerMember(Overtake):
    """Keeps the order within each member, so that what a dead one held is overtaken by what others get."""

    consumer_layer = _OldestFirst


@saboteur("count-stuck", "DEL-4", by=("red.double-lease", "red.count-survives-kill9"))
class CountStuck(ConsumerLayer):
    """Calls every delivery the first attempt."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Set every attempt to 1."""
        return [each._replace(attempt=1) for each in await resolve(self.inner.receive(limit, timeout))]


@saboteur("count-from-zero", "DEL-4")
class CountFromZero(ConsumerLayer):
    """Counts attempts from zero."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Count one less."""
        return [each._replace(attempt=each.attempt - 1) for each in await resolve(self.inner.receive(limit, timeout))]


@saboteur("count-shared", "DEL-4")
class CountShared(ConsumerLayer):
    """Counts the attempts of all groups together."""

    _counts: ClassVar[dict[tuple[str, str], int]] = defaultdict(int)

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Count by message alone."""
        found = []
        for each in await resolve(self.inner.receive(limit, timeout)):
            name = (self.group.topic, each.message.id)
            self._counts[name] += 1
            found.append(each._replace(attempt=self._counts[name]))
        return found


@saboteur("ignore-limit", "BPC-1")
class IgnoreLimit(ConsumerLayer):
    """Returns more deliveries than there is room for."""

    def receive(self, limit: int, timeout: float) -> MaybeAwaitable[list[RawDelivery]]:
        """Ask for three more."""
        return self.inner.receive(limit + 3, timeout)


@saboteur("lose-on-close", "END-1", "GRP-1", "GRP-4")
class LoseOnClose(ConsumerLayer):
    """Drops what is given back on close."""

    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        """Ack what is released."""
        return self.inner.settle(
            [each._replace(verb=Verb.ACK) if each.verb is Verb.RELEASE else each for each in batch]
        )


@saboteur("lose-on-cancel", "END-2", "BPC-5", "GRP-1", "PUB-1")
class LoseOnCancel(ConsumerLayer):
    """Loses what arrives while a receive is being cancelled or times out."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Go on receiving in the background, and throw the catch away."""
        task = asyncio.ensure_future(resolve(self.inner.receive(limit, timeout)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._throw_away)
            raise

    def _throw_away(self, task: asyncio.Task[list[RawDelivery]]) -> None:
        if not task.cancelled() and task.exception() is None and task.result():
            catch = [Settlement(each.token, Verb.ACK) for each in task.result()]
            start(self.inner.settle(catch))


@saboteur("redeliver-rewritten", "GRP-1", "DEL-2")
class RedeliverRewritten(ConsumerLayer):
    """Forgets key and headers of what it redelivers."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Strip redeliveries."""
        return [
            each if each.attempt == 1 else each._replace(message=each.message._replace(key=None, headers=()))
            for each in await resolve(self.inner.receive(limit, timeout))
        ]


@saboteur("sticky-member", "GRP-2")
class StickyMember(ConsumerLayer):
    """Gives everything to the member that asked first."""

    _first: ClassVar[dict[tuple[str, str], ConsumerLayer]] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Let the others starve while the first member lives."""
        if self._first.setdefault((self.group.topic, self.group.name), self) is not self:
            await asyncio.sleep(timeout)
            return []
        return await resolve(self.inner.receive(limit, timeout))

    async def close(self) -> None:
        """Let another member be the first."""
        if self._first.get((self.group.topic, self.group.name)) is self:
            del self._first[self.group.topic, self.group.name]
        await self.inner.close()


@saboteur("deaf", "END-3", "GRP-1", by=("reb.join-under-load", "reb.mass-join"))
class Deaf(ConsumerLayer):
    """Stops delivering after ten messages, and looks healthy."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._left = 10

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Deliver ten messages, then nothing."""
        if self._left <= 0:
            await asyncio.sleep(timeout)
            return []
        batch = await resolve(self.inner.receive(min(limit, self._left), timeout))
        self._left -= len(batch)
        return batch


@saboteur("deaf-to-deletion", "GRP-7", "END-3")
class DeafToDeletion(ConsumerLayer):
    """Waits on although its topic or group was deleted."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Take deletion for silence."""
        try:
            return await resolve(self.inner.receive(limit, timeout))
        except (TopicMissingError, GroupMissingError):
            await asyncio.sleep(timeout)
            return []


@saboteur("null-source", "GRP-1")
class NullSource(ConsumerLayer):
    """Never delivers anything."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Wait, and return nothing."""
        await asyncio.sleep(timeout)
        return []
