"""Knows how to give a client a wire of its own, harm it, and prove that the harm was felt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from unistream.conformance.proxy import Proxy, via
from unistream.conformance.recorded import RecordedMember, RecordedProducer
from unistream.conformance.target import Target
from unistream.conformance.trial import Trial

if TYPE_CHECKING:
    from unistream import Client, Group

CARRIED = ("carried",)
"""What every case with a wire must have seen: a driver that went round the proxy has shown nothing."""


class Wire:
    """
    A client whose every connection goes through a proxy of its own.

    Attributes:
        client: The client.
        proxy: Its wire.
    """

    client: Client

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.proxy = Proxy()

    async def member(self, group: Group, *, max_in_flight: int = 100) -> RecordedMember:
        """Return a member on this wire."""
        return await self.trial.member(self.trial.regroup(self.client, group), max_in_flight=max_in_flight)

    async def producer(self, topic: str, **options: object) -> RecordedProducer:
        """Return a producer on this wire."""
        return await self.trial.producer(topic, client=self.client, **options)

    @contextmanager
    def harm(self, who: RecordedMember | RecordedProducer, note: str) -> Iterator[Proxy]:
        """Record that the connection of `who` is harmed as long as this lasts; heals at the end."""
        since = self.trial.recorder.now()
        try:
            yield self.proxy
        finally:
            self.proxy.heal()
            self.trial.recorder.record("fault", member=who.name, since=since, note=f"connection {note}")

    def prove(self) -> None:
        """Tally what the wire did: bytes `carried` and `lost`, connections `broken`, tries at a closed door."""
        self.trial.tally("carried", self.proxy.carried)
        self.trial.tally("lost", self.proxy.lost)
        self.trial.tally("broken", self.proxy.broken)
        self.trial.tally("slammed", len(self.proxy.tries))
        self.trial.tally("harm", self.proxy.faults)


async def wire(trial: Trial) -> Wire:
    """Return a wire with an open client; both last as long as the trial."""
    made = await unwired(trial)
    made.client = await trial.keep(over(trial, made.proxy).connect())
    await trial.keep(_healed(made))
    return made


async def unwired(trial: Trial) -> Wire:
    """Return a wire without a client."""
    made = Wire(trial)
    await trial.keep(made.proxy)
    return made


def over(trial: Trial, proxy: Proxy, url: str | None = None) -> Target:
    """Return the trial's target, reached through the proxy."""
    target = trial.target
    return replace(target, driver=via(target.driver, proxy), url=target.url if url is None else url)


@asynccontextmanager
async def _healed(made: Wire) -> AsyncIterator[None]:
    """Count what happened, and let the client be closed over a good wire, whatever came before."""
    try:
        yield
    finally:
        made.prove()
        made.proxy.heal()
