"""Saboteurs that hand on what nobody published, or send what has failed round and round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import unistream
from unistream.conformance.saboteurs.table import mutation, saboteur
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, resolve
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.envelope import DEAD_PREFIX
from unistream.driver.types import GroupSpec, RawDelivery, RawMessage, Settlement, SettleOutcome, Token, Verb

BEAT = ("heartbeat",)


class _Answers(ConsumerLayer):
    """Answers for some loans itself, which the broker does not have, or has no more."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._own: set[Token] = set()

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Answer without acting for its own."""
        sent = [each for each in batch if each.token not in self._own]
        answers = iter(await resolve(self.inner.settle(sent)) if sent else [])
        return [None if each.token in self._own else next(answers) for each in batch]

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """Answer without acting for its own."""
        sent = [token for token in tokens if token not in self._own]
        answers = iter(await resolve(self.inner.extend(sent, seconds)) if sent else [])
        return [None if token in self._own else next(answers) for token in tokens]


@saboteur("heartbeat-delivered", "PUB-1", "GRP-1", "BPC-5", by=("con.no-phantom",))
class HeartbeatDelivered(_Answers):
    """Hands on the first sign of life of an idle broker as if it were a message without a body."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Once, when nothing came."""
        batch = await resolve(self.inner.receive(limit, timeout))
        if batch or self._own or timeout <= 0:
            return batch
        self._own.add(BEAT)
        return [RawDelivery(RawMessage("beat", b"", None, (), 0), BEAT, None, None, 1)]


@saboteur("letters-go-back", "DEL-3", by=("dlq.no-loop",))
class LettersGoBack(ConsumerLayer):
    """Sends a dead letter that is nacked back to the topic that it came from."""

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self._letters: dict[Token, RawMessage] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Remember what is a dead letter."""
        batch = await resolve(self.inner.receive(limit, timeout))
        self._letters.update((each.token, each.message) for each in batch if _origin(each.message))
        return batch

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """Send a copy of what is nacked on its way again."""
        for each in batch:
            letter = self._letters.get(each.token)
            if letter is not None and each.verb is Verb.NACK:
                producer = await self.driver.producer(await self.driver.topic(_origin(letter)))
                await resolve(producer.publish([letter._replace(dedupe=f"{letter.id}/again", partition=0)], 5.0))
                await producer.close()
        return await resolve(self.inner.settle(batch))


def _origin(message: RawMessage) -> str:
    """Return the topic that a dead letter comes from; nothing of any other message."""
    return next((value.decode() for name, value in message.headers if name == f"{DEAD_PREFIX}topic"), "")


class _AcksTheLast(_Answers):
    """Acks what is lent for the last time before it hands it over."""

    limits: ClassVar[dict[tuple[str, str], int]] = {}

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Be done with the last attempt at once."""
        batch = await resolve(self.inner.receive(limit, timeout))
        most = self.limits.get((self.group.topic, self.group.name))
        last = [each.token for each in batch if most is not None and each.attempt >= most]
        if last:
            await resolve(self.inner.settle([Settlement(token, Verb.ACK) for token in last]))
            self._own.update(last)
        return batch


class _AcksTheLastDriver(DriverLayer):
    consumer_layer = _AcksTheLast


@mutation("last-attempt-acked", "DEL-4", "GRP-4", "ORD-2", layer=_AcksTheLastDriver)
@contextmanager
def last_attempt_acked() -> Iterator[None]:
    """Acks what is lent for the last time before it hands it over: its key is free, and it dies with its member."""
    group = unistream.Client.group

    def noting(self: unistream.Client, name: str | None, topic: str, **options: Any) -> unistream.Group:
        retry = options.get("retry")
        if retry is not None and retry.max_attempts is not None:
            _AcksTheLast.limits[topic, name or ""] = retry.max_attempts
        return group(self, name, topic, **options)

    with patch.object(unistream.Client, "group", noting):
        try:
            yield
        finally:
            _AcksTheLast.limits.clear()
