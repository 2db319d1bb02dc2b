"""Knows how to use the public API and write down every operation: what was asked, what came back, and when.

These are the only hands with which the suite touches a target. An outcome is recorded as the contract defines it:
`stored = "no"` and refused settles are `fail`, everything that leaves room for doubt is `info`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from zlib import crc32

from unistream.conformance.history import NANO, Call, Recorder
from unistream.conformance.identity import CorruptBodyError, ForeignBodyError, Identity, read_body
from unistream.errors import AlreadySettledError, ConfigError, LeaseLostError, UnistreamError, UnsupportedError
from unistream.message import Headers, HeadersLike, Message, Receipt

if TYPE_CHECKING:
    import unistream
    from unistream import Client, Consumer, Delivery, Group, Producer

SURELY_NOT = (LeaseLostError, AlreadySettledError, UnsupportedError, ConfigError)
"""Errors of a settle that say that it had no effect."""


def key_text(key: bytes | None) -> str | None:
    """Return a key as histories hold it."""
    return None if key is None else key.hex()


def digest(headers: HeadersLike | None) -> str:
    """Return the fingerprint of headers: names, values, order and repetitions."""
    return f"{crc32(repr(Headers(headers).items()).encode()):08x}"


def fingerprint(body: bytes) -> str:
    """Return the fingerprint of a body that is none of this run's."""
    return f"{crc32(body):08x}"


class RecordedProducer:
    """A producer whose every message proves its identity, and whose every outcome is recorded."""

    def __init__(self, recorder: Recorder, client: Client, topic: str, *, name: str, run: str, **options: Any) -> None:
        self.name = name
        self.topic = topic
        self.producer: Producer = client.producer(topic, **options)
        self._recorder = recorder
        self._run = run
        self._number = 0
        self._watchers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.producer.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.producer.__aexit__(kind, error, trace)
        await self.watched()

    def next(self, key: bytes | None = None, size: int = 0) -> Identity:
        """Return the identity of the next message."""
        self._number += 1
        return Identity(self._run, self.name, self._number, key)

    async def publish(
        self,
        *,
        key: bytes | None = None,
        size: int = 0,
        headers: HeadersLike | None = None,
        id: str | None = None,
        timeout: float = 30.0,
    ) -> tuple[str, Receipt]:
        """Publish the next message and wait; return its name and its receipt. Errors are recorded and go on."""
        identity = self.next(key)
        call = self._invoke(identity, headers)
        try:
            receipt = await self.producer.publish(identity.body(size), key=key, headers=headers, id=id, timeout=timeout)
        except BaseException as error:
            _not_published(call, error)
            raise
        call.ok(position=receipt.position, note=receipt.id)
        return identity.name, receipt

    async def submit(
        self,
        *,
        key: bytes | None = None,
        size: int = 0,
        headers: HeadersLike | None = None,
        timeout: float = 30.0,
    ) -> tuple[str, unistream.Confirmation]:
        """Submit the next message; its outcome is recorded when it comes. `watched` waits for all outcomes."""
        identity = self.next(key)
        call = self._invoke(identity, headers)
        try:
            confirmation = await self.producer.submit(identity.body(size), key=key, headers=headers, timeout=timeout)
        except BaseException as error:
            _not_published(call, error)
            raise
        watcher = asyncio.create_task(self._watch(call, confirmation))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return identity.name, confirmation

    async def publish_many(
        self, keys: Sequence[bytes | None], *, size: int = 0
    ) -> list[tuple[str, Receipt | UnistreamError]]:
        """Publish one message for each key in one call; return names and outcomes."""
        identities = [self.next(key) for key in keys]
        calls = [self._invoke(identity, None) for identity in identities]
        try:
            outcomes = await self.producer.publish_many(
                [Message(identity.body(size), identity.key) for identity in identities]
            )
        except BaseException as error:
            for call in calls:
                _not_published(call, error)
            raise
        for call, outcome in zip(calls, outcomes, strict=True):
            if isinstance(outcome, Receipt):
                call.ok(position=outcome.position, note=outcome.id)
            else:
                _not_published(call, outcome)
        return [(identity.name, outcome) for identity, outcome in zip(identities, outcomes, strict=True)]

    async def watched(self) -> None:
        """Wait until the outcome of everything submitted is recorded."""
        while self._watchers:
            await asyncio.wait(set(self._watchers))

    async def _watch(self, call: Call, confirmation: unistream.Confirmation) -> None:
        try:
            receipt = await confirmation
        except asyncio.CancelledError as error:
            _not_published(call, error)
            raise
        except UnistreamError as error:
            _not_published(call, error)
        else:
            call.ok(position=receipt.position, note=receipt.id)

    def _invoke(self, identity: Identity, headers: HeadersLike | None) -> Call:
        return self._recorder.invoke(
            "publish", topic=self.topic, msg=identity.name, key=key_text(identity.key), digest=digest(headers)
        )


def _not_published(call: Call, error: BaseException) -> None:
    if getattr(error, "stored", None) == "no" or isinstance(error, ConfigError | UnsupportedError | TypeError):
        call.fail(error)
    else:
        call.info(error)


class RecordedMember:
    """A member of a group whose deliveries, waits and settles are recorded."""

    def __init__(self, recorder: Recorder, group: Group, *, name: str, run: str, max_in_flight: int = 100) -> None:
        self.name = name
        self.group = group
        self.limit = max_in_flight
        self.consumer: Consumer = group.consumer(max_in_flight=max_in_flight)
        self.recorder = recorder
        self._run = run
        self._paused = False
        self._held: list[Lent] = []
        self._taken: list[Lent] = []
        self._heard = 0

    async def __aenter__(self) -> Self:
        await self.consumer.__aenter__()
        self.recorder.record("join", topic=self.group.topic, group=self.group.name, member=self.name, limit=self.limit)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    async def receive(self, timeout: float) -> Lent | None:
        """Wait for a delivery; None when the time is up, which is recorded as waiting."""
        since = self._ready()
        delivery = await self.consumer.receive(timeout)
        self.hear()
        if delivery is None:
            self._idle(since)
            return None
        return self.take(delivery, since)

    async def receive_many(self, max: int, timeout: float) -> list[Lent]:
        """Wait for up to `max` deliveries."""
        since = self._ready()
        deliveries = await self.consumer.receive_many(max, timeout)
        self.hear()
        if not deliveries:
            self._idle(since)
        return [self.take(delivery, since) for delivery in deliveries]

    async def ack_many(self, several: Sequence[Lent]) -> None:
        """Ack a batch; errors are recorded, and the first one is raised."""
        calls = [lent.begun("ack") for lent in several]
        outcomes = await self.consumer.ack_many([lent.delivery for lent in several])
        for lent, call, outcome in zip(several, calls, outcomes, strict=True):
            if outcome is None:
                lent.done("ack", call)
            else:
                lent.failed(call, outcome)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def take(self, delivery: Delivery, since: int | None = None) -> Lent:
        """Record a delivery that was got in some other way, by iteration for example."""
        msg, error, note = None, None, None
        mark = digest(delivery.headers)
        try:
            msg = read_body(delivery.value, self._run).name
        except CorruptBodyError as reason:
            error, note = "corrupt", str(reason)
        except ForeignBodyError as reason:
            error, note, mark = "foreign", str(reason), fingerprint(delivery.value)
        lent = Lent(self, delivery, msg, self.recorder.new_lending())
        self._held.append(lent)
        origin = delivery.origin
        self.recorder.record(
            "deliver",
            topic=self.group.topic,
            group=self.group.name,
            member=self.name,
            msg=msg,
            key=key_text(delivery.key),
            partition=delivery.partition,
            position=delivery.position,
            lending=lent.name,
            attempt=delivery.attempt,
            until=lent.until(),
            since=since,
            digest=mark,
            error=error,
            origin=origin and f"{origin.topic}/{origin.group}",
            note=note,
        )
        return lent

    async def leave(self, drain: float = 0.0) -> unistream.DrainReport:
        """Leave the group properly."""
        call = self.recorder.invoke("leave", member=self.name)
        try:
            report = await self.consumer.close(drain)
        except BaseException as error:
            call.info(error)
            raise
        call.ok()
        self.hear()
        return report

    def died(self) -> None:
        """Record that the member is dead from now on."""
        self.hear()
        self.recorder.record("death", member=self.name)

    def taken(self, lent: Lent) -> None:
        """Keep a delivery whose settle was taken and not confirmed: its refusal may come later (DEL-7)."""
        self._taken.append(lent)

    def hear(self) -> None:
        """Record which settles that had been taken were refused since."""
        lost = self.consumer.stats.acks_lost
        if lost == self._heard:
            return
        self._heard = lost
        for lent in self._taken:
            if lent.delivery.state == "lost":
                self.recorder.record("refuse", lending=lent.name)
        self._taken = [lent for lent in self._taken if lent.delivery.state != "lost"]

    async def pause(self) -> None:
        """Pause; while it lasts waiting is not waiting for work."""
        self._paused = True
        await self.consumer.pause()

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self.consumer.resume()
        self._paused = False

    def _ready(self) -> int | None:
        """
        Return the time when the member waits for work, None when it waits for something else.

        A paused member does not, nor one whose window is full, nor one that holds a redelivery: that may be a
        suspect, beside which nothing is lent (DEL-4).
        """
        self._held = [lent for lent in self._held if lent.delivery.state == "lent"]
        full = len(self._held) >= self.limit
        if full or self._paused or any(lent.delivery.attempt > 1 for lent in self._held):
            return None
        return self.recorder.now()

    def _idle(self, since: int | None) -> None:
        if since is not None:
            self.recorder.record("idle", member=self.name, since=since)


class Lent:
    """One delivery in the suite's hands."""

    def __init__(self, member: RecordedMember, delivery: Delivery, msg: str | None, name: str) -> None:
        self.member = member
        self.delivery = delivery
        self.msg = msg
        self.name = name
        self._recorder = member.recorder

    def until(self) -> int:
        """
        Return when the lease ends by the delivery's own word, in nanoseconds of the recorder's clock.

        The wall clock is read after the delivery's answer, so a pause in between makes it earlier, never later.
        """
        return self._recorder.now() + round(self.remaining() * NANO)

    def remaining(self) -> float:
        """Return the seconds until the lease ends by the delivery's own word."""
        return (self.delivery.lease_expires_at - datetime.now(UTC)).total_seconds()

    def renewed(self) -> None:
        """Record how long the lease lasts now."""
        self._recorder.record("renew", lending=self.name, until=self.until())

    def expired(self) -> bool:
        """Tell whether the delivery says that it is lost, and record it when it does."""
        if self.delivery.state != "lost":
            return False
        self._recorder.record("expire", lending=self.name)
        return True

    async def ack(self, *, confirm: bool = False) -> None:
        """Ack; errors are recorded and go on."""
        await self._settle("ack", self.delivery.ack(confirm), confirmed=confirm)

    async def nack(self, delay: float | None = None, reason: str | None = None) -> None:
        """Nack; errors are recorded and go on."""
        await self._settle("nack", self.delivery.nack(delay, reason), delay=delay)

    async def reject(self, reason: str = "the suite rejects it") -> None:
        """Reject; errors are recorded and go on."""
        await self._settle("reject", self.delivery.reject(reason))

    async def extend(self, seconds: float) -> None:
        """Extend; errors are recorded and go on."""
        await self._settle("extend", self.delivery.extend(seconds))

    async def _settle(self, op: str, doing: Any, *, confirmed: bool | None = None, delay: float | None = None) -> None:
        call = self.begun(op, delay)
        try:
            await doing
        except BaseException as error:
            self.failed(call, error)
            raise
        self.done(op, call, confirmed=confirmed)

    def begun(self, op: str, delay: float | None = None) -> Call:
        """Record that it is being settled."""
        return self._recorder.invoke(
            op, lending=self.name, msg=self.msg, member=self.member.name, delay=delay, until=self.until()
        )

    def failed(self, call: Call, error: BaseException) -> None:
        """Record that the settle came to nothing, or may have."""
        if isinstance(error, SURELY_NOT):
            call.fail(error)
        else:
            call.info(error)

    def done(self, op: str, call: Call, *, confirmed: bool | None = None) -> None:
        """Record that the settle was accepted."""
        call.ok(confirmed=confirmed, until=self.until())
        if op != "extend" and not confirmed:
            self.member.taken(self)
