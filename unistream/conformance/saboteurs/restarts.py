"""Saboteurs of the broker that comes up again: harmless until a connection was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from unistream.conformance.saboteurs.settling import DelayInMemory
from unistream.conformance.saboteurs.table import saboteur
from unistream.conformance.saboteurs.wires import WIRE, Bitten, Noticing
from unistream.conformance.wrap import ConsumerLayer, resolve
from unistream.driver.types import Disconnected, Event, RawDelivery, Settlement, Target, Token, TopicSpec, Verb


class _Remembering(Noticing):
    """Counts the connections that any driver of this process lost, for each topic since it was created."""

    lost_by_all: ClassVar[int] = 0
    known: ClassVar[dict[str, int]] = {}

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        def heard(event: Event) -> None:
            _Remembering.lost_by_all += isinstance(event, Disconnected)
            emit(event)

        super().__init__(target, heard)

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Begin to count."""
        self.known[spec.name] = self.lost_by_all
        return await super().create_topic(spec)


@saboteur(
    "forgets-over-restart",
    "PUB-1",
    "GRP-1",
    "GRP-6",
    by=("dur.clean-restart", "dur.group-survives"),
    needs=WIRE,
    driver=_Remembering,
)
class ForgetsOverRestart(ConsumerLayer):
    """Lets some messages vanish once a connection was lost, as a log that was not written to the end does."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Ack the first few in silence."""
        if _Remembering.known.get(self.group.topic, 0) == _Remembering.lost_by_all:
            return await resolve(self.inner.receive(limit, timeout))
        batch = await resolve(self.inner.receive(min(limit, 3), timeout))
        if batch:
            _Remembering.known[self.group.topic] = _Remembering.lost_by_all
            await resolve(self.inner.settle([Settlement(each.token, Verb.ACK) for each in batch]))
        return []


@saboteur("count-forgotten", "DEL-4", by=("dur.count-survives",), needs=WIRE, driver=Noticing)
class CountForgotten(Bitten):
    """Counts attempts from one again once a connection was lost."""

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Call everything the first attempt."""
        batch = await resolve(self.inner.receive(limit, timeout))
        return [each._replace(attempt=1) for each in batch] if self.bitten else batch


@saboteur("delay-forgotten", "DEL-2", by=("dur.delay-survives",), needs=WIRE, driver=Noticing)
class DelayForgotten(Bitten, DelayInMemory):
    """Keeps delayed nacks in its own memory, and forgets them with its connection."""

    def _give_back(self, token: Token) -> None:
        if not self.bitten:
            super()._give_back(token)
