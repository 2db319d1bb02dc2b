"""Knows the cases: stable ids, the rules they test, how binding they are, and which tier runs them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unistream.conformance.trial import Trial

Body = Callable[["Trial"], Awaitable[None]]

_ID = re.compile(r"[a-z]{3,4}\.[a-z0-9]+(-[a-z0-9]+)*")
_RULE = re.compile(r"(PUB|GRP|DEL|BPC|ORD|END|CAP|WIRE|CFG)-\d+")


class Tier(StrEnum):
    """What a case needs and costs; each profile runs its own tier and those before it."""

    SMOKE = "smoke"
    CORE = "core"
    FAULTS = "faults"
    """Faults in our own processes and connections only: safe on a shared cluster."""
    BROKER = "broker"
    """Stops, kills or pauses the broker, by the hooks that the user gives."""
    LONG = "long"


PROFILES: Mapping[str, tuple[Tier, ...]] = {
    "smoke": (Tier.SMOKE,),
    "core": (Tier.SMOKE, Tier.CORE),
    "faults": (Tier.SMOKE, Tier.CORE, Tier.FAULTS),
    "broker": (Tier.SMOKE, Tier.CORE, Tier.FAULTS, Tier.BROKER),
    "long": tuple(Tier),
}


@dataclass(frozen=True, slots=True)
class Level:
    """How binding a case is: MUST, SHOULD for quality, or MUST for those who claim what it needs."""

    word: str
    needs: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.needs:
            return self.word
        return f"{self.word} if " + ", ".join(
            name if need is True else f"{name}={need}" for name, need in self.needs.items()
        )


MUST = Level("MUST")
SHOULD = Level("SHOULD")


def GATED(*names: str, **needs: object) -> Level:  # noqa: N802 - reads as a level beside MUST and SHOULD
    """Return the level of a case that binds whoever claims these capabilities, in the words of `connect(require=…)`."""
    return Level("MUST", {**dict.fromkeys(names, True), **needs})


@dataclass(frozen=True, slots=True)
class Case:
    """
    One thing that is tested.

    Attributes:
        id: Stable name, `group.what-is-promised`; never reused for something else.
        rules: Ids of the contract's rules.
        sentence: The promise in one sentence, as the docstring's first line has it.
        facilities: What the case needs of the world: `socket`, `process`, `password`, `proxy`, `hook:restart`, …
        sometimes: Counters that must not be zero, or the case has shown nothing.
        limit: Seconds after which it is cut off and fails.
        alone: Needs real time and the process to itself: it uses threads, forks, or measures what the process costs.
    """

    id: str
    rules: tuple[str, ...]
    level: Level
    tier: Tier
    sentence: str
    body: Body
    facilities: frozenset[str] = frozenset()
    sometimes: tuple[str, ...] = ()
    limit: float = 60.0
    alone: bool = False

    @property
    def group(self) -> str:
        """The first part of the id."""
        return self.id.partition(".")[0]


class Registry:
    """A set of cases by id."""

    def __init__(self) -> None:
        self._cases: dict[str, Case] = {}

    def add(self, case: Case) -> None:
        """
        Add a case.

        Raises:
            ValueError: Its id is taken or badly formed, it names no rule, or it has no sentence.
        """
        if not _ID.fullmatch(case.id):
            raise ValueError(f"case id {case.id!r} is not of the form group.what-is-promised")
        if case.id in self._cases:
            raise ValueError(f"two cases have the id {case.id}")
        bad = [rule for rule in case.rules if not _RULE.fullmatch(rule)]
        if bad or not case.rules:
            raise ValueError(f"case {case.id} names no rules of the contract: {bad}")
        if not case.sentence:
            raise ValueError(f"case {case.id} has no docstring; its first line is the promise")
        self._cases[case.id] = case

    def __iter__(self) -> Iterator[Case]:
        return iter(self._cases.values())

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, case_id: str) -> Case:
        return self._cases[case_id]

    def select(self, profile: str = "core", only: Iterable[str] = ()) -> list[Case]:
        """
        Return the cases of a profile, or those named: an id, or a group (`ack`, `ack.*`).

        Raises:
            ValueError: The profile is unknown, or a name matches no case.
        """
        names = list(only)
        if not names:
            if profile not in PROFILES:
                raise ValueError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
            return [case for case in self._cases.values() if case.tier in PROFILES[profile]]
        chosen: dict[str, Case] = {}
        for name in names:
            group = name.removesuffix(".*")
            found = {case.id: case for case in self._cases.values() if case.id == name or case.group == group}
            if not found:
                raise ValueError(f"no case is named {name!r}")
            chosen |= found
        return list(chosen.values())


CASES = Registry()


def case(
    case_id: str,
    *,
    rules: tuple[str, ...],
    level: Level = MUST,
    tier: Tier = Tier.CORE,
    facilities: Iterable[str] = (),
    sometimes: tuple[str, ...] = (),
    limit: float = 60.0,
    alone: bool = False,
    registry: Registry = CASES,
) -> Callable[[Body], Body]:
    """Enter a case into the registry; the first line of its docstring is the promise that reports show."""

    def enter(body: Body) -> Body:
        sentence = (body.__doc__ or "").strip().partition("\n")[0]
        needs = frozenset(facilities)
        registry.add(Case(case_id, rules, level, tier, sentence, body, needs, tuple(sometimes), limit, alone))
        return body

    return enter


def load_cases() -> Registry:
    """Import every module of cases and return the registry that they filled."""
    package = import_module("unistream.conformance.cases")
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    return CASES
