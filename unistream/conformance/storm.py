"""Random workloads on a real broker: producers and members as processes, and a nemesis that spares nobody.

`unistream conform storm URL --messages 100000 --faults 50` runs one, judges it, and keeps its history. In a storm
processes are killed, stopped and made to leave, wires are reset, cut, held, slowed and made to lose bytes, and with the
user's hooks the broker is restarted and killed too. Afterwards everything is healed, fresh members drain every group,
and the checkers judge the whole history.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from unistream.conformance.hooks import KILL9, RESTART, Broker, broker
from unistream.conformance.members import Worker, WorkerDiedError, worker
from unistream.conformance.plan import Handling, Shape
from unistream.conformance.registry import MUST, Case, Tier
from unistream.conformance.runner import Result, run_case
from unistream.conformance.target import Target
from unistream.conformance.tasks import Together
from unistream.conformance.trial import Trial
from unistream.conformance.verdict import Verdict

if TYPE_CHECKING:
    from unistream import Group

CLIENT = ("kill", "stop", "leave")
"""What can befall a process."""
NET = ("reset", "hold", "lose-up", "lose-down", "cut-up", "cut-down", "slow")
"""What can befall a wire."""
BROKER = (RESTART, KILL9)
"""What can befall the broker, where the user gave the hook."""

HANDLING = Handling(hold=(0.0, 0.02), confirm=0.3, nack=0.03, delay=(0.0, 0.5), reject=0.0, extend=0.0, overstay=0.0)
CHUNK = 500
"""Messages that a producer is told to publish at once."""
TRICKLE = 50
"""The same once there are enough, slowly, so that the faults still to come find something to harm."""
KEYS = 64


@dataclass(frozen=True, slots=True)
class Storm:
    """
    What a storm is made of.

    Attributes:
        shape: `queue`, `fan-out` or `keyed`.
        messages: To be published at least; publishing goes on as long as there are faults to come.
        faults: How many at least, one after another.
        kinds: Of these.
        members: Of each group.
        calm: The most seconds between two faults.
        handling: What members do with their deliveries.
        seconds: Faults go on for so long at least.
    """

    shape: Shape
    messages: int
    faults: int
    kinds: tuple[str, ...] = (*CLIENT, *NET)
    members: int = 3
    producers: int = 2
    calm: float = 1.0
    handling: Handling = field(default_factory=lambda: HANDLING)
    seconds: float = 0.0


async def rage(trial: Trial, storm: Storm) -> None:
    """Let a storm rage over the trial's target, heal everything, and drain every group."""
    weather = _Weather(trial, storm)
    await weather.prepare()
    async with Together() as tasks:
        for seat in weather.producers:
            tasks.create_task(weather.publish(seat))
        tasks.create_task(weather.torment())
    for seat in weather.seats:
        await seat.retire()
    await trial.drain(*weather.groups, limit=600.0)


class _Seat:
    """A place that is always taken: by one process, and after its death by the next."""

    def __init__(self, weather: _Weather, group: Group | None, dice: Random) -> None:
        self.weather = weather
        self.group = group
        self.dice = dice
        self.worker: Worker
        self.names: list[str] = []
        self.free = asyncio.Lock()
        """Held while the process is being harmed, so that it is replaced once."""

    async def fill(self) -> None:
        """Start a process and set it to work."""
        trial = self.weather.trial
        self.worker = await worker(trial, wire=True)
        if self.group is None:
            self.names = [trial.fresh(f"{self.worker.name}-p")]
            await self.worker.call("produce", producer=self.names[0], topic=self.weather.topic)
        else:
            await self.join()

    async def join(self) -> None:
        """Join as a new member and work."""
        assert self.group is not None
        self.names = [await self.worker.join(self.group, max_in_flight=self.dice.choice((5, 20, 100)))]
        await self.worker.work(self.weather.storm.handling, seed=self.weather.trial.seed)

    async def retire(self) -> None:
        """Finish what is in hand and leave."""
        await self.worker.wire("heal")
        if self.group is not None:
            await self.worker.call("rest")
            await self.worker.leave()
        self.weather.tally(await self.worker.wire("heal"))
        await self.worker.close()

    async def suffer(self, kind: str, length: float) -> None:
        """Let it happen, wait until it is over, and see to it that the seat is taken again."""
        trial = self.weather.trial
        since = trial.recorder.now()
        names = list(self.names)
        if kind == "kill":
            await self.worker.kill()
            await asyncio.sleep(length)
            await self.fill()
        elif kind == "stop":
            self.worker.stop()
            await asyncio.sleep(length)
            self.worker.resume()
        elif kind == "leave":
            if self.group is not None:
                await self.worker.call("rest")
                await self.worker.leave()
                await self.join()
        else:
            await self._harm_wire(kind, length)
        for name in names:
            trial.recorder.record("fault", member=name, since=since, note=f"process or connection: {kind}")

    async def _harm_wire(self, kind: str, length: float) -> None:
        wire = self.worker.wire
        match kind:
            case "reset":
                await wire("reset")
            case "hold":
                await wire("hold")
            case "lose-up" | "lose-down":
                await wire("drop", kind.removeprefix("lose-"))
            case "cut-up" | "cut-down":
                await wire("cut_after", self.dice.randrange(0, 5000), kind.removeprefix("cut-"))
            case "slow":
                await wire("delay", 0.05, 0.02)
        if kind != "reset":
            await asyncio.sleep(length)
            await wire("heal")


class _Weather:
    """What the parts of one storm share."""

    def __init__(self, trial: Trial, storm: Storm) -> None:
        self.trial = trial
        self.storm = storm
        self.dice = Random(f"{trial.seed}/{storm.shape}/{storm.faults}")
        self.topic = ""
        self.groups: list[Group] = []
        self.producers: list[_Seat] = []
        self.seats: list[_Seat] = []
        self.over = asyncio.Event()
        self._published = 0
        self._broker: Broker | None = None

    async def prepare(self) -> None:
        """Create topic and groups, and fill every seat."""
        trial, storm = self.trial, self.storm
        ordering = "key" if storm.shape == "keyed" else "none"
        self.topic = await trial.topic(partitions=4, ordering=ordering)
        for _ in range(2 if storm.shape == "fan-out" else 1):
            self.groups.append(await trial.group(self.topic, ordering=ordering))
        if set(storm.kinds) & set(BROKER):
            self._broker = await broker(trial)
        self.producers = [_Seat(self, None, Random(self.dice.random())) for _ in range(storm.producers)]
        members = [
            _Seat(self, group, Random(self.dice.random())) for group in self.groups for _ in range(storm.members)
        ]
        self.seats = [*self.producers, *members]
        for seat in self.seats:
            await seat.fill()

    def tally(self, carried: dict[str, int]) -> None:
        """Tally what a wire did."""
        for name, number in carried.items():
            self.trial.tally(name, number)

    async def publish(self, seat: _Seat) -> None:
        """Publish chunk after chunk until there is enough and the nemesis is done, whoever sits in the seat."""
        while self._published < self.storm.messages or not self.over.is_set():
            enough = self._published >= self.storm.messages
            chunk, gap = (TRICKLE, 0.01) if enough else (min(CHUNK, self.storm.messages), 0.0)
            keys = [f"k{seat.dice.randrange(KEYS)}" for _ in range(chunk)]
            async with seat.free:
                at_work, producer = seat.worker, seat.names[0]
            try:
                await at_work.call("publish", producer=producer, keys=keys, size=100, timeout=15.0, gap=gap)
                self._published += chunk
            except WorkerDiedError:
                self._published += chunk // 2

    async def torment(self) -> None:
        """Let the faults happen one after another, each to somebody else, with a calm in between."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.storm.seconds
        for turn in count():
            if turn >= self.storm.faults and loop.time() >= until:
                break
            await asyncio.sleep(self.dice.uniform(0.1, self.storm.calm))
            kind = self.dice.choice(self.storm.kinds) if turn >= len(self.storm.kinds) else self.storm.kinds[turn]
            self.trial.tally("fault")
            if kind in BROKER:
                assert self._broker is not None
                await self._broker.strike(kind)
                continue
            seat = self.dice.choice(self.seats if kind != "leave" else self.seats[len(self.producers) :])
            async with seat.free:
                await seat.suffer(kind, self.dice.uniform(0.1, 1.5 * self.trial.lease))
        self.over.set()


def as_case(storm: Storm, name: str = "sim.storm") -> Case:
    """Return a storm as a case of its own."""

    async def body(trial: Trial) -> None:
        await rage(trial, storm)

    rules = ("PUB-1", "GRP-1", "GRP-2", *(("ORD-2",) if storm.shape == "keyed" else ()))
    sometimes = ("fault", "confirmed", "delivered", "redelivered", "drained")
    facilities = frozenset({"process", "socket"})
    return Case(name, rules, MUST, Tier.FAULTS, "A storm breaks no rule.", body, facilities, sometimes, 7200.0)


def _summary(result: Result, storm: Storm) -> list[str]:
    kinds: Counter[str] = Counter()
    for event in result.history:
        if event.op == "fault":
            kinds[(event.note or "").rpartition(": ")[2]] += 1
    counts: dict[str, Any] = dict(result.counts)
    told = ", ".join(f"{name} {counts.get(name, 0)}" for name in ("confirmed", "unknown", "delivered", "redelivered"))
    return [
        f"{storm.shape}: {result.verdict}, seed {result.seed}, {len(result.history)} events, {result.seconds:.0f} s",
        f"  {told}, {counts.get('fault', 0)} faults ({', '.join(f'{k} {n}' for k, n in sorted(kinds.items()))})",
        *(f"  {violation}" for violation in result.violations[:10]),
        *([f"  {result.reason}"] if result.reason else []),
    ]


def run(
    target: Target,
    *,
    shapes: Sequence[Shape],
    messages: int,
    faults: int,
    minutes: float,
    calm: float,
    seed: int,
    keep: Path | None,
) -> int:
    """Run a storm of each shape and say how it went; 0 if no rule was broken."""
    kinds = (*CLIENT, *NET, *(name for name in BROKER if name in target.hooks))
    broken = False
    for shape in shapes:
        storm = Storm(shape, messages, faults, kinds, calm=calm, seconds=minutes * 60)
        result = run_case(as_case(storm), target, seed=seed)
        broken = broken or result.verdict is not Verdict.CONFORMS
        print("\n".join(_summary(result, storm)), flush=True)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            result.history.save(keep / f"{shape}-{seed}.history.jsonl")
    return 1 if broken else 0
