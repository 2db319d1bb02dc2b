"""The producer against chance: whatever publishers, clock and driver do, every message is counted once."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import unistream
from tests.unit.portable.scripted import Script, spin
from tests.unit.portable.test_window import balanced
from unistream import capabilities as can
from unistream.conformance.clock import VirtualLoop
from unistream.driver.types import Receipt
from unistream.errors import BrokerUnavailableError, DroppedError, PublishUnknownError, TopicFullError, UnistreamError


class Producers(RuleBasedStateMachine):
    """One producer; rules publish, cancel, let time pass and answer for the driver."""

    @initialize(
        when_full=st.sampled_from(["block", "fail", "drop_newest", "drop_oldest"]),
        pipeline=st.integers(1, 3),
        dedupes=st.booleans(),
        limit=st.integers(1, 5),
    )
    def begin(self, when_full: Any, pipeline: int, dedupes: bool, limit: int) -> None:
        """A producer with a small window."""
        self.loop = VirtualLoop()
        capabilities = {"dedupe": can.Dedupe(window=60.0)} if dedupes else {}
        self.script = Script(pipeline=pipeline, batch_messages=3, capabilities=capabilities)
        self.limit = limit
        self.serial = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self.confirmed: dict[bytes, list[int]] = {}

        async def enter() -> None:
            client = unistream.connect("scripted://", driver=self.script.driver())
            self.client = await client.__aenter__()
            producer = self.client.producer("t", max_unconfirmed=limit, when_full=when_full)
            self.producer = await producer.__aenter__()

        self.loop.run_until_complete(enter())

    def run(self, coroutine: Any) -> Any:
        """Run something, and everything that follows at once."""

        async def main() -> Any:
            result = await coroutine
            await spin(30)
            return result

        return self.loop.run_until_complete(main())

    @rule(
        key=st.sampled_from([None, b"a", b"b"]),
        timeout=st.sampled_from([1.0, 5.0, 30.0]),
        way=st.sampled_from(["publish", "submit", "many"]),
    )
    def publish(self, key: bytes | None, timeout: float, way: str) -> None:
        """Somebody publishes."""
        self.serial += 1
        value = b"%d" % self.serial

        async def publish() -> None:
            if way == "many":
                message = unistream.Message(value, key)
                await self.producer.publish_many([message, b"+" + value, message], timeout=timeout)
            elif way == "submit":
                await self.producer.submit(value, key=key, timeout=timeout)
            else:
                await self.producer.publish(value, key=key, timeout=timeout)

        async def start() -> None:
            self.tasks.append(asyncio.create_task(publish()))

        self.run(start())

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Somebody gives up."""
        data.draw(st.sampled_from(self.tasks)).cancel()
        self.run(asyncio.sleep(0))

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.run(asyncio.sleep(seconds))

    @precondition(lambda self: any(not call.answered.done() for call in self.script.calls))
    @rule(data=st.data(), kinds=st.lists(st.sampled_from(["ok", "ok", "no", "unknown"]), min_size=3, max_size=3))
    def answer(self, data: st.DataObject, kinds: list[str]) -> None:
        """The driver answers one of its calls."""
        call = data.draw(st.sampled_from([call for call in self.script.calls if not call.answered.done()]))
        made: dict[str, Any] = {
            "ok": lambda message: Receipt(message.id),
            "no": lambda message: TopicFullError("full"),
            "unknown": lambda message: PublishUnknownError("cut"),
        }
        call.answer(*[made[kind](message) for kind, message in zip(kinds, call.batch, strict=False)])
        self.run(asyncio.sleep(0))

    @rule()
    def cut(self) -> None:
        """Every outstanding call comes back with nothing handed over."""
        for call in self.script.calls:
            call.fail(BrokerUnavailableError("cut"))
        self.run(asyncio.sleep(0))

    @invariant()
    def counted_once(self) -> None:
        """Every message is confirmed, failed, unknown, dropped or in flight."""
        if hasattr(self, "producer"):
            assert balanced(self.producer.stats), self.producer.stats

    @invariant()
    def bounded(self) -> None:
        """The window is never passed, and never below zero."""
        if hasattr(self, "producer"):
            assert 0 <= self.producer._window.messages <= self.limit

    def teardown(self) -> None:
        """Closing decides everything; every task ends with one of the contract's errors, and nothing is left."""
        if not hasattr(self, "producer"):
            return

        async def leave() -> None:
            self.script.publish = lambda batch, timeout: [Receipt(one.id) for one in batch]
            for call in self.script.calls:
                call.answer()
            left = (await asyncio.gather(self.client.close(), return_exceptions=True))[0]
            unseen = left.exceptions if isinstance(left, ExceptionGroup) else ()
            assert left is None or (unseen and all(isinstance(error, UnistreamError) for error in unseen)), left
            for task in self.tasks:
                outcome = (await asyncio.gather(task, return_exceptions=True))[0]
                assert outcome is None or isinstance(outcome, (UnistreamError, asyncio.CancelledError)), outcome
                if isinstance(outcome, DroppedError):
                    assert outcome.stored == "no"

        self.loop.run_until_complete(leave())
        stats = self.producer.stats
        assert stats.in_flight == 0
        assert balanced(stats)
        assert self.producer._window.messages == 0
        assert self.script.open == []
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


TestProducers = Producers.TestCase
TestProducers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
