"""Cases `clk.*`: the wall clock of the machine jumps, and nothing that was promised moves with it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, tzinfo
from typing import Self
from unittest.mock import patch

from unistream.conformance.recorded import Lent, RecordedMember
from unistream.conformance.registry import case
from unistream.conformance.trial import Trial

HOUR = 3600.0


@contextmanager
def wall_clock(offset: float) -> Iterator[None]:
    """Let this process's wall clock, as Python code reads it, be wrong by `offset` seconds."""
    seconds, nanoseconds = time.time, time.time_ns

    class Jumped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(time.time(), tz)

    with ExitStack() as stack:
        stack.enter_context(patch.object(time, "time", lambda: seconds() + offset))
        stack.enter_context(patch.object(time, "time_ns", lambda: nanoseconds() + round(offset * 1e9)))
        for name, module in list(sys.modules.items()):
            if name.startswith("unistream") and getattr(module, "datetime", None) is datetime and name != __name__:
                stack.enter_context(patch.object(module, "datetime", Jumped))
        yield


@case("clk.client-jump", rules=("DEL-6", "DEL-2", "END-2"), alone=True, sometimes=("jumped",))
async def client_jump(trial: Trial) -> None:
    """When the wall clock jumps by an hour, leases, delays and timeouts do not move."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    member = await trial.member(group)
    other = await trial.member(trial.regroup(await trial.open(), group))
    loop = asyncio.get_running_loop()
    for offset in (HOUR, -HOUR):
        await producer.publish()
        lent = await _either(trial, member, other)
        with wall_clock(offset):
            trial.tally("jumped")
            # Longer than the lease: the library renews it, and nobody else gets the message.
            await trial.silent(other if lent.member is member else member, "DEL-6", seconds=1.5 * trial.lease)
            trial.equal(str(lent.delivery.state), "lent", "DEL-6", "state of what is held")
            left = (lent.delivery.lease_expires_at - datetime.fromtimestamp(time.time(), UTC)).total_seconds()
            trial.that(0 < left <= trial.lease + trial.pace.slack, "DEL-6", "a lease that ends soon", f"{left:.1f} s")
            waiting = asyncio.create_task(lent.member.consumer.receive(0.5))
            began = loop.time()
            trial.equal(await trial.within(trial.pace.patience, waiting, "END-2", "receive(0.5)"), None, "END-2", "got")
            took = loop.time() - began
            trial.that(0.45 <= took <= 0.8 + trial.pace.slack, "END-2", "receive(0.5) ends in time", f"{took:.2f} s")
            if trial.claims.nack_delay:
                began = loop.time()
                await lent.nack(1.0)
                lent = await _either(trial, member, other)
                took = loop.time() - began
                trial.that(1.0 - 0.02 <= took <= 2.0 + trial.pace.slack, "DEL-2", "a delay of 1 s", f"{took:.2f} s")
            await lent.ack()


async def _either(trial: Trial, *members: RecordedMember) -> Lent:
    """Return the next delivery, whichever member gets it."""
    waiting = [asyncio.create_task(member.receive(trial.pace.patience)) for member in members]
    _, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for each in rest:
        each.cancel()
    await asyncio.wait(waiting)
    results = [each.result() for each in waiting if not each.cancelled()]
    found = [lent for lent in results if lent is not None]
    trial.that(len(found) == 1, "GRP-2", "one delivery", len(found))
    return found[0]
