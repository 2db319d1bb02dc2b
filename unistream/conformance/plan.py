"""Knows random workloads: a seed becomes a plan, whole and in advance, and the plan is a file that can be replayed.

Nothing is drawn while the workload runs. What a member does with a delivery follows from the seed, the group, the
message and the attempt, so it stays the same when other parts of the plan are taken away to shrink it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

Shape = Literal["queue", "fan-out", "keyed"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

FAULTS_OF_MEMBERS = ("die", "leave", "cancel", "stall")
FAULTS_OF_PRODUCERS = ("refuse", "lose-reply")


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group and how many members it has, each with the same bound."""

    name: str
    members: int
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class ProducerPlan:
    """
    One producer: for every message the seconds to wait before it, and the number of its key (None: no key).

    Instead of a message that was left out there is None, so that the others keep their names.
    """

    name: str
    messages: tuple[tuple[float, int | None] | None, ...]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """
    One fault, `at` seconds after the start.

    Attributes:
        kind: `die` (dropped without a word), `leave` (close and rejoin), `cancel` (a receive under way), `stall` (the
            handlers stop for `length` seconds), `refuse` and `lose-reply` (of a publish).
        whom: The member or the producer, `group.number` or its name.
        length: Seconds until it is over, or a new life begins.
    """

    at: float
    kind: str
    whom: str
    length: float


@dataclass(frozen=True, slots=True)
class Handling:
    """How members deal with deliveries: shares of all deliveries, and ranges of seconds."""

    hold: tuple[float, float] = (0.0, 0.2)
    confirm: float = 0.5
    nack: float = 0.15
    delay: tuple[float, float] = (0.0, 3.0)
    reject: float = 0.03
    extend: float = 0.1
    overstay: float = 0.04
    """Held beyond the lease and settled all the same."""


@dataclass(frozen=True, slots=True)
class Deed:
    """What a member does with one delivery: hold it so long, maybe extend it, and settle it."""

    op: Literal["ack", "nack", "reject"]
    hold: float
    confirm: bool = False
    delay: float | None = None
    extend: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole workload. `renew` False: leases end after `lease` seconds whatever the library does."""

    seed: int
    shape: Shape
    lease: float
    renew: bool
    partitions: int
    groups: tuple[GroupPlan, ...]
    producers: tuple[ProducerPlan, ...]
    faults: tuple[FaultPlan, ...] = ()
    handling: Handling = field(default_factory=Handling)
    max_attempts: int | None = None
    dead_letters: bool = False

    @property
    def ordering(self) -> Literal["none", "key"]:
        """Of the topic and its groups."""
        return "key" if self.shape == "keyed" else "none"

    @property
    def members(self) -> Iterator[tuple[GroupPlan, str]]:
        """Every group with the name of each of its members."""
        for group in self.groups:
            for number in range(group.members):
                yield group, f"{group.name}.{number}"

    @property
    def size(self) -> int:
        """Messages of all producers together."""
        return sum(message is not None for producer in self.producers for message in producer.messages)

    def deed(self, group: str, msg: str, attempt: int) -> Deed:
        """Return what is done with this delivery."""
        dice = Random(f"{self.seed}/{group}/{msg}/{attempt}")
        how = self.handling
        hold = dice.uniform(*how.hold)
        extend = dice.uniform(0.2, 1.0) * self.lease if dice.random() < how.extend else None
        if dice.random() < how.overstay:
            hold = self.lease * dice.uniform(1.05, 2.0)
        draw = dice.random()
        if draw < how.reject:
            return Deed("reject", hold, extend=extend)
        if draw < how.reject + how.nack:
            return Deed("nack", hold, delay=round(dice.uniform(*how.delay), 3), extend=extend)
        return Deed("ack", hold, confirm=dice.random() < how.confirm, extend=extend)

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan that was saved."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Return the plan that the JSON object describes."""
        parts: dict[str, Any] = {
            "groups": tuple(GroupPlan(**group) for group in data["groups"]),
            "producers": tuple(
                ProducerPlan(each["name"], tuple(message and (message[0], message[1]) for message in each["messages"]))
                for each in data["producers"]
            ),
            "faults": tuple(FaultPlan(**fault) for fault in data["faults"]),
            "handling": Handling(**{name: _untangled(value) for name, value in data["handling"].items()}),
        }
        return cls(**{**data, **parts})


def _untangled(value: Any) -> Any:
    """Return JSON's lists as the tuples that they were."""
    return tuple(value) if isinstance(value, list) else value


def draw(seed: int, shape: Shape, *, faults: bool = True, messages: int = 60, lease: float = 5.0) -> Plan:
    """
    Return the plan of a seed.

    Args:
        seed: The same seed and arguments give the same plan.
        shape: `queue` (one group, several members), `fan-out` (several groups), `keyed` (ordered groups).
        faults: Whether members die, leave and stall, and publishes fail; without them only the handlers are moody.
        messages: Of all producers together.
        lease: Of every group, in seconds; what the backend takes at least, on a real one.
    """
    dice = Random(f"{seed}/{shape}/{faults}/{messages}/{lease}")
    groups = tuple(
        GroupPlan(f"g{number}", dice.randint(1, 3), dice.choice((1, 2, 5, 20)))
        for number in range(dice.randint(2, 3) if shape == "fan-out" else dice.randint(1, 2) if shape == "keyed" else 1)
    )
    keys = dice.choice((1, 3, 8))
    names = [f"p{number}" for number in range(dice.randint(1, 3))]
    producers = tuple(
        ProducerPlan(name, tuple(_message(dice, shape, keys) for _ in range(messages // len(names)))) for name in names
    )
    length = max(sum(message[0] for message in producer.messages if message) for producer in producers)
    limited = dice.random() < 0.4
    plan = Plan(
        seed=seed,
        shape=shape,
        lease=lease,
        renew=dice.random() < 0.5,
        partitions=dice.choice((1, 2, 4)),
        groups=groups,
        producers=producers,
        handling=Handling() if faults else Handling(overstay=0.0),
        max_attempts=dice.randint(2, 6) if limited else None,
        dead_letters=limited or dice.random() < 0.5,
    )
    return _with_faults(plan, dice, length) if faults else plan


def _message(dice: Random, shape: Shape, keys: int) -> tuple[float, int | None]:
    keyed = dice.random() < (0.9 if shape == "keyed" else 0.5)
    # Bursts and pauses: most follow at once, some after a while.
    gap = 0.0 if dice.random() < 0.6 else round(dice.expovariate(4.0), 3)
    return gap, dice.randrange(keys) if keyed else None


def _with_faults(plan: Plan, dice: Random, length: float) -> Plan:
    """Return the plan with faults spread over its time; a quarter of all plans stay quiet."""
    if dice.random() < 0.25:
        return plan
    members = [name for _, name in plan.members]
    # A different mix in every plan: some kinds alone, some together.
    kinds = dice.sample(FAULTS_OF_MEMBERS + FAULTS_OF_PRODUCERS, dice.randint(1, 4))
    faults = []
    for _ in range(dice.randint(1, 6)):
        kind = dice.choice(kinds)
        whom = dice.choice(members if kind in FAULTS_OF_MEMBERS else [producer.name for producer in plan.producers])
        at = round(dice.uniform(0.0, length + plan.lease), 3)
        faults.append(FaultPlan(at, kind, whom, round(dice.uniform(0.0, 1.5) * plan.lease, 3)))
    ordered = tuple(sorted(faults, key=lambda fault: fault.at))
    return Plan(**{**{name: getattr(plan, name) for name in plan.__slots__}, "faults": ordered})
