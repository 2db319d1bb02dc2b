"""Knows how to carry out a plan: producers, members that live and die, faults at their times, and the drain at the end.

It checks nothing; the history that it leaves is judged by the checkers. Every member and producer has a client and a
line of its own, so that one can fail while the others work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import unistream
from unistream.conformance.line import Line
from unistream.conformance.plan import FaultPlan, GroupPlan, Plan
from unistream.conformance.recorded import Lent, RecordedMember
from unistream.conformance.trial import Trial
from unistream.errors import BrokerUnavailableError, SettleError, UnistreamError

if TYPE_CHECKING:
    from unistream import Group

POLL_SECONDS = 0.5
"""How long a member waits in one receive: often enough to notice that its time is up."""


async def play(trial: Trial, plan: Plan) -> None:
    """Carry out the plan on the trial's target, drain every group, and leave the history in the trial's recorder."""
    workload = _Workload(trial, plan)
    await workload.prepare()
    async with asyncio.TaskGroup() as tasks:
        members = [tasks.create_task(seat.occupy(), name=f"member {seat.name}") for seat in workload.seats.values()]
        async with asyncio.TaskGroup() as busy:
            for producer in plan.producers:
                busy.create_task(workload.produce(producer.name, producer.messages), name=f"producer {producer.name}")
            busy.create_task(workload.torment(), name="nemesis")
        # Let what was nacked or lost come round once more while the members are still there.
        await asyncio.sleep(plan.lease)
        for seat in workload.seats.values():
            seat.close()
        await asyncio.wait(members)
    await trial.drain(*workload.groups, quiet=workload.quiet)
    if workload.dead_group is not None:
        await trial.drain(workload.dead_group, quiet=workload.quiet)


class _Workload:
    """What the parts of one run share."""

    def __init__(self, trial: Trial, plan: Plan) -> None:
        self.trial = trial
        self.plan = plan
        self.seats: dict[str, _Seat] = {}
        self.groups: list[Group] = []
        self.dead_group: Group | None = None
        self._lines: dict[str, Line] = {}
        self._topic = ""
        self.prefix = trial.fresh("w")
        longest_delay = max(plan.handling.delay[1], _retry(plan).backoff.max * 1.1)
        self.quiet = 3 * plan.lease + longest_delay + trial.claims.lease.recover_within

    async def prepare(self) -> None:
        """Create the topics and groups, before anything is published."""
        trial, plan = self.trial, self.plan
        self._topic = await trial.topic(partitions=plan.partitions, ordering=plan.ordering)
        dead = None
        if plan.dead_letters:
            dead = await trial.topic()
            self.dead_group = await trial.group(dead, "dead", lease=plan.lease)
        for group_plan in plan.groups:
            group = await trial.group(
                self._topic,
                group_plan.name,
                ordering=plan.ordering,
                lease=plan.lease,
                max_lease=3600.0 if plan.renew else plan.lease,
                retry=_retry(plan),
                dead_letter=dead,
            )
            self.groups.append(group)
            for each, name in plan.members:
                if each is group_plan:
                    self.seats[name] = _Seat(self, group_plan, group, name)

    async def produce(self, name: str, messages: tuple[tuple[float, int | None] | None, ...]) -> None:
        """Publish a producer's messages, each after its wait; a failed one is recorded, and the next one follows."""
        line = self._lines[name] = Line()
        client = await self.trial.open(line)
        producer = await self.trial.producer(self._topic, client=client)
        for message in messages:
            if message is None:
                producer.next()  # left out: the next one keeps its number
                continue
            gap, key = message
            if gap:
                await asyncio.sleep(gap)
            text = None if key is None else f"key{key}".encode()
            with suppress(UnistreamError):
                # What follows at once is pipelined, what comes after a pause is awaited.
                await (producer.publish(key=text) if gap else producer.submit(key=text))
        with suppress(UnistreamError, ExceptionGroup):
            await producer.producer.flush(self.trial.pace.patience)
        await producer.watched()

    async def torment(self) -> None:
        """Let every fault of the plan happen at its time."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        for fault in self.plan.faults:
            await asyncio.sleep(max(0.0, start + fault.at - loop.time()))
            if fault.kind in ("refuse", "lose-reply"):
                await self._harm_producer(fault)
            else:
                self.seats[fault.whom].suffer(fault)

    async def _harm_producer(self, fault: FaultPlan) -> None:
        line = self._lines.get(fault.whom)
        if line is None:
            return
        since = self.trial.recorder.now()
        hits = line.hits
        if fault.kind == "refuse":
            line.refuse += 1
        else:
            line.lose_reply += 1
        await asyncio.sleep(fault.length)
        line.refuse = line.lose_reply = 0
        self.trial.recorder.record("fault", member=fault.whom, since=since, note=f"connection {fault.kind}")
        self.trial.tally("hit", line.hits - hits)


class _Seat:
    """One member's place in its group: a row of lives, one after another."""

    def __init__(self, workload: _Workload, plan: GroupPlan, group: Group, name: str) -> None:
        self.name = name
        self._workload = workload
        self._trial = workload.trial
        self._plan = plan
        self._group = group
        self._closing = False
        self._stalled_until = 0.0
        self._absence = 0.0
        self._life: asyncio.Task[Lent | None] | None = None
        self._errors: list[BaseException] = []
        self._ending = ""

    async def occupy(self) -> None:
        """Live one life after another until the seat is closed."""
        for number in self._numbers():
            self._ending = ""
            client, line = await self._trial.mortal()
            group = self._trial.regroup(client, self._group)
            member = await self._trial.member(
                group, max_in_flight=self._plan.max_in_flight, name=f"{self._workload.prefix}-{self.name}.{number}"
            )
            handlers: set[asyncio.Task[None]] = set()
            await self._live(member, handlers)
            if self._ending == "die":
                self._trial.kill(member, line)
                await _cancel(handlers)
            else:
                await self._leave(member, handlers)
            if self._errors:
                raise self._errors[0]
            if not self._closing:
                await asyncio.sleep(self._absence)

    def close(self) -> None:
        """Let the present life be the last one, and end properly."""
        self._closing = True
        self._interrupt()

    def suffer(self, fault: FaultPlan) -> None:
        """Let a fault happen to whoever sits here now."""
        loop = asyncio.get_running_loop()
        self._trial.tally(fault.kind)
        if fault.kind == "stall":
            self._stalled_until = loop.time() + fault.length
            return
        if fault.kind in ("die", "leave"):
            self._ending, self._absence = fault.kind, fault.length
        self._interrupt()

    def _numbers(self) -> Iterator[int]:
        number = 0
        while not self._closing:
            number += 1
            yield number

    def _interrupt(self) -> None:
        """Cancel the receive under way, whoever asked for it: afterwards the member looks what is wanted."""
        if self._life is not None:
            self._life.cancel()

    async def _live(self, member: RecordedMember, handlers: set[asyncio.Task[None]]) -> None:
        while not self._closing and not self._ending:
            life = self._life = asyncio.create_task(member.receive(POLL_SECONDS), name=f"receive {member.name}")
            await asyncio.wait({life})
            self._life = None
            if life.cancelled() or isinstance(life.exception(), BrokerUnavailableError):
                continue
            lent = life.result()
            if lent is not None:
                handler = asyncio.create_task(self._handle(lent), name=f"handler {lent.name}")
                handlers.add(handler)
                handler.add_done_callback(handlers.discard)
                handler.add_done_callback(self._note_error)

    def _note_error(self, handler: asyncio.Task[None]) -> None:
        if not handler.cancelled() and (error := handler.exception()) is not None:
            self._errors.append(error)

    async def _handle(self, lent: Lent) -> None:
        deed = self._workload.plan.deed(self._plan.name, lent.msg or "", lent.delivery.attempt)
        loop = asyncio.get_running_loop()
        try:
            if deed.extend is not None:
                await lent.extend(deed.extend)
            await asyncio.sleep(deed.hold)
            if self._stalled_until > loop.time():
                await asyncio.sleep(self._stalled_until - loop.time())
            if deed.op == "ack":
                await lent.ack(confirm=deed.confirm and bool(self._trial.claims.ack_confirm))
            elif deed.op == "nack":
                await lent.nack(deed.delay, "the plan says so")
            else:
                await lent.reject("the plan says so")
        except (SettleError, BrokerUnavailableError, unistream.PublishError):
            # Recorded. What was refused or is unknown comes again.
            lent.expired()

    async def _leave(self, member: RecordedMember, handlers: set[asyncio.Task[None]]) -> None:
        await member.leave(drain=self._workload.plan.lease)
        await _cancel(handlers)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait for their end."""
    for task in set(tasks):
        task.cancel()
    if tasks:
        await asyncio.wait(set(tasks))


def _retry(plan: Plan) -> unistream.Retry:
    backoff = unistream.Backoff(first=0.2, factor=2.0, max=2.0, jitter=0.1)
    return unistream.Retry(max_attempts=plan.max_attempts, backoff=backoff)
