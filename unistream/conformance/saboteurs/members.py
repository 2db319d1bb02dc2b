"""Saboteurs of what a member may rely on: its own bound, its pause, its settles, its group's memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import patch

import unistream
from unistream._loans import Loans
from unistream.capabilities import Capabilities, LagReport
from unistream.conformance.saboteurs.table import mutation, saboteur
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, ProducerLayer, resolve
from unistream.driver.contract import ConsumerDriver, Driver
from unistream.driver.types import (
    Event,
    GroupSpec,
    PublishOutcome,
    RawMessage,
    Settlement,
    SettleOutcome,
    StartAt,
    Target,
)


@mutation("forgotten-is-renewed", "DEL-8", "DEL-6", by=("ack.dropped-unsettled",))
@contextmanager
def forgotten_is_renewed() -> Iterator[None]:
    """Renews for ever what the program forgot, without a word."""
    with patch.object(Loans, "dropped_unsettled", lambda self, delivery: None):
        yield


@mutation("conflict-accepted", "DEL-5", by=("ack.conflicting",))
@contextmanager
def conflict_accepted() -> Iterator[None]:
    """Takes a second, different settle without a word."""
    can = unistream.Delivery._can

    def obliging(self: unistream.Delivery, move: Any) -> bool:
        try:
            return can(self, move)
        except unistream.AlreadySettledError:
            return False

    with patch.object(unistream.Delivery, "_can", obliging):
        yield


@mutation("pause-ignored", "BPC-3", by=("bpc.pause",))
@contextmanager
def pause_ignored() -> Iterator[None]:
    """Goes on handing out while it is paused."""
    with patch.object(unistream.Consumer, "pause", unistream.Consumer.resume):
        yield


@mutation("one-bound-for-all", "BPC-4", by=("bpc.per-member",))
@contextmanager
def one_bound_for_all() -> Iterator[None]:
    """Gives every member of a group the bound of the first."""
    bounds: dict[tuple[str, str | None], int] = {}
    consumer = unistream.Group.consumer

    def sharing(self: unistream.Group, *, max_in_flight: int = 100, **options: Any) -> unistream.Consumer:
        bound = bounds.setdefault((self.topic, self.name), max_in_flight)
        return consumer(self, max_in_flight=bound, **options)

    with patch.object(unistream.Group, "consumer", sharing):
        yield


@saboteur("forgets-empty-group", "GRP-6", "GRP-1", by=("rep.resume-settled", "grp.all-gone"))
class ForgetsEmptyGroup(ConsumerLayer):
    """Forgets a group's progress when its last member leaves."""

    async def close(self) -> None:
        """Make the group anew once nobody is in it."""
        await super().close()
        driver, group = self.driver, self.group
        if not group.ephemeral and not await driver.members(group.topic, group.name):
            await driver.delete_group(group.topic, group.name)
            await driver.create_group(group)


class _Engaged(DriverLayer):
    """Knows whether it has consumers, and whether a publish is under way."""

    def __init__(self, target: Target, emit: Callable[[Event], None]) -> None:
        super().__init__(target, emit)
        self.consuming = False
        self.publishing = 0
        self.idle = asyncio.Event()
        self.idle.set()


class _HoldsUp(ProducerLayer):
    driver: _Engaged

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        self.driver.publishing += 1
        self.driver.idle.clear()
        try:
            await asyncio.sleep(8.0 if self.driver.consuming else 0.0)
            return await resolve(self.inner.publish(batch, timeout))
        finally:
            self.driver.publishing -= 1
            if not self.driver.publishing:
                self.driver.idle.set()


class _HeldUp(ConsumerLayer):
    driver: _Engaged

    def __init__(self, inner: ConsumerDriver, driver: Driver, group: GroupSpec, max_in_flight: int) -> None:
        super().__init__(inner, driver, group, max_in_flight)
        self.driver.consuming = True

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        await self.driver.idle.wait()
        return await resolve(self.inner.settle(batch))


@saboteur("publishing-stops-settling", "PUB-7", by=("bpp.no-deadlock",))
class PublishingStopsSettling(_Engaged):
    """Settles nothing while the same client has something to publish."""

    producer_layer: ClassVar[type[ProducerLayer]] = _HoldsUp
    consumer_layer: ClassVar[type[ConsumerLayer]] = _HeldUp


@saboteur("vague-claims", "CAP-3", by=("cap.complete",))
class VagueClaims(DriverLayer):
    """Does not say who keeps a promise."""

    def claims(self, capabilities: Capabilities) -> Capabilities:
        """Answer a capability with a level that is none."""
        return replace(capabilities, lag=LagReport(level="somehow", exact=True))  # type: ignore[arg-type]


@saboteur("seek-without-members", "CAP-4", "GRP-1", by=("rep.seek-with-members",))
class SeekWithoutMembers(DriverLayer):
    """Says that it moved a group that has members, and leaves it where it was."""

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """Act only where nobody is."""
        if not await self.inner.members(topic, group):
            await self.inner.seek(topic, group, to)
