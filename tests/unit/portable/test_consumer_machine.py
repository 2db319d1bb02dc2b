"""The consumer against chance: its credit is exact after any mix of settles, lost leases and lost loans (BPC-1)."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import unistream
from tests.unit.portable.scripted import Script, spin
from unistream.conformance.clock import VirtualLoop
from unistream.driver.types import Receipt, Verb
from unistream.errors import LeaseLostError, SettleError

LEASE = 8.0


class Consumers(RuleBasedStateMachine):
    """One consumer on a driver that lends what the rules give it."""

    @initialize(window=st.integers(1, 6), max_lease=st.sampled_from([LEASE, 3 * LEASE]), dead=st.booleans())
    def begin(self, window: int, max_lease: float, dead: bool) -> None:
        """A member with a small window."""
        self.loop = VirtualLoop()
        self.script = Script()
        self.window = window
        self.serial = 0
        self.got: list[unistream.Delivery] = []
        self.dead = dead
        # What the driver believes to be lent.
        self.lent: set[Any] = set()
        self.script.publish = lambda batch, timeout: [Receipt(one.id) for one in batch]
        self.script.settle = self.settled

        async def enter() -> None:
            client = unistream.connect("scripted://", driver=self.script.driver())
            self.client = await client.__aenter__()
            group = self.client.group(
                "g",
                "t",
                lease=LEASE,
                max_lease=max_lease,
                retry=unistream.Retry(3 if dead else None),
                dead_letter="dead" if dead else None,
            )
            self.consumer = await group.consumer(max_in_flight=window, max_in_flight_bytes=30).__aenter__()

        self.loop.run_until_complete(enter())

    def settled(self, batch: Any) -> Any:
        """The driver's side of settling."""
        outcomes = [None if one.token in self.lent else LeaseLostError("gone") for one in batch]
        self.lent.difference_update(one.token for one in batch)
        self.script.settled += batch
        return outcomes

    def run(self, coroutine: Any) -> Any:
        """Run something, and everything that follows at once."""

        async def main() -> Any:
            result = await coroutine
            await spin(30)
            return result

        return self.loop.run_until_complete(main())

    @rule(count=st.integers(1, 4), attempt=st.integers(1, 4), suspect=st.booleans(), size=st.integers(1, 20))
    def publish(self, count: int, attempt: int, suspect: bool, size: int) -> None:
        """The broker has messages; some come again."""

        async def lend() -> None:
            for _ in range(count):
                self.serial += 1
                self.script.lend(b"%d" % self.serial + b"." * size, attempt=attempt, suspect=suspect and attempt > 1)
            self.lent.update(raw.token for raw in self.script.backlog)

        self.run(lend())

    @rule(many=st.booleans())
    def receive(self, many: bool) -> None:
        """The application takes what is at hand."""

        async def receive() -> None:
            if many:
                self.got += await self.consumer.receive_many(3, timeout=0.01)
            elif (delivery := await self.consumer.receive(timeout=0.01)) is not None:
                self.got.append(delivery)

        self.run(receive())

    @rule()
    def give_up_receiving(self) -> None:
        """Somebody waits and is cancelled."""

        async def wait() -> None:
            task = asyncio.create_task(self.consumer.receive())
            await asyncio.sleep(0)
            task.cancel()
            outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(outcome, unistream.Delivery):
                self.got.append(outcome)

        self.run(wait())

    @precondition(lambda self: self.got)
    @rule(data=st.data(), verb=st.sampled_from(["ack", "confirm", "nack", "reject", "extend", "raise", "give back"]))
    def settle(self, data: st.DataObject, verb: str) -> None:
        """The application settles something, perhaps not for the first time, perhaps too late."""
        delivery = data.draw(st.sampled_from(self.got))

        async def settle() -> None:
            try:
                if verb == "ack":
                    await delivery.ack()
                elif verb == "confirm":
                    await delivery.ack(confirm=True)
                elif verb == "nack":
                    await delivery.nack(1.0)
                elif verb == "reject":
                    await delivery.reject("why")
                elif verb == "extend":
                    await delivery.extend(5.0)
                else:
                    error = ValueError("x") if verb == "raise" else asyncio.CancelledError()
                    await delivery.__aexit__(type(error), error, None)
            except SettleError:
                assert delivery.state != "lent" or verb == "extend"

        self.run(settle())

    @precondition(lambda self: self.got)
    @rule(data=st.data(), confirm=st.booleans())
    def ack_many(self, data: st.DataObject, confirm: bool) -> None:
        """The application acks several, some twice, some too late."""
        several = data.draw(st.lists(st.sampled_from(self.got), max_size=4))
        before = [delivery.state for delivery in several]
        outcomes = self.run(self.consumer.ack_many(several, confirm=confirm))
        for state, delivery, outcome in zip(before, several, outcomes, strict=True):
            if outcome is None:
                assert state in ("lent", "acked"), state
            else:
                assert delivery.state != "lent", outcome

    @precondition(lambda self: self.got)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """The driver says that loans are lost, some that it had lost before."""
        tokens = data.draw(st.lists(st.sampled_from([one._raw.token for one in self.got]), max_size=3))
        self.lent.difference_update(tokens)

        async def lose() -> None:
            assert self.script.lost is not None
            self.script.lost(tokens, "the test says so")

        self.run(lose())

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0, 30.0]))
    def wait(self, seconds: float) -> None:
        """Time passes; leases are renewed, or end."""
        self.run(asyncio.sleep(seconds))

    @rule(on=st.booleans())
    def pause(self, on: bool) -> None:
        """The application pauses or goes on."""

        async def turn() -> None:
            await (self.consumer.pause() if on else self.consumer.resume())

        self.run(turn())

    @invariant()
    def credit_is_exact(self) -> None:
        """The driver is never asked for more than the window has left, and every unsettled delivery counts once."""
        if not hasattr(self, "consumer"):
            return
        consumer = self.consumer
        held = consumer._intake.loans.held
        assert len(held) <= self.window
        assert set(consumer._intake.loans.out) <= set(held)
        assert consumer._intake.loans.bytes_out == sum(consumer._intake.loans.out.values())
        sizes = sorted(consumer._intake.loans.out.values())
        assert not sizes or sum(sizes) - sizes[-1] <= 30
        burying = set(consumer._intake.loans.dead._burials)
        waiting = {one.token for one in consumer._intake.buffer}
        lost = {one._raw.token for one in self.got if one.state == "lost"}
        assert set(held) <= set(consumer._intake.loans.out) | waiting | burying | lost

    @invariant()
    def leases_are_counted(self) -> None:
        """A shared lease knows how many deliveries are under it."""
        if hasattr(self, "consumer"):
            held = list(self.consumer._intake.loans.held.values())
            for lease in set(held):
                assert lease.held == held.count(lease)

    def teardown(self) -> None:
        """Closing gives everything back: the driver holds no loan that the member had."""
        if not hasattr(self, "consumer"):
            return

        async def leave() -> None:
            for raw in self.script.backlog:
                self.lent.discard(raw.token)
            await self.consumer.close()
            await self.client.close()

        self.loop.run_until_complete(leave())
        assert self.consumer._intake.loans.held == {}
        assert self.lent == set()
        assert all(settlement.delay == 0 or settlement.verb is Verb.NACK for settlement in self.script.settled)
        assert not asyncio.all_tasks(self.loop)
        self.got.clear()
        self.loop.close()


TestConsumers = Consumers.TestCase
TestConsumers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
