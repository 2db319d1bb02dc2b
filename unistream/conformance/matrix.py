"""Knows the kill matrix: every saboteur against the cases, to prove that the suite notices what it should.

A saboteur that lives is a hole in the suite; so is a case that kills nobody.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

from unistream.conformance.kill import Fate, sabotage
from unistream.conformance.registry import Case, load_cases
from unistream.conformance.saboteurs import Saboteur, load_saboteurs
from unistream.conformance.target import Target

AT_ONCE = 6
"""So many saboteurs at once on a real broker: most of their time they wait."""
WIDTH = 118


def lacking(case: Case, target: Target) -> str:
    """Return what the case needs and can't have on the target, or nothing."""
    missing = [name for name in case.facilities if name in target.lacks]
    missing += [name for name in case.facilities if name.startswith("hook:") and name[5:] not in target.hooks]
    return min(missing, default="")


def pairs(target: Target, cases: Iterable[Case], saboteurs: Iterable[Saboteur]) -> dict[str, list[str]]:
    """
    Return for each saboteur the cases to try on it.

    On a virtual clock these are all; of those that take real time, and on a real broker, only the cases that are made
    to kill it.
    """
    chosen = list(cases)
    found = {}
    for each in saboteurs:
        wide = target.virtual and not set(each.needs) & target.lacks.keys()
        tried = [case.id for case in chosen if case.id in each.by or (wide and not case.alone)]
        if tried:
            found[each.name] = tried
    return found


def fates(target: Target, trials: Mapping[str, Sequence[str]], *, seed: int, jobs: int | None = None) -> Iterator[Fate]:
    """
    Yield every saboteur's fate as soon as it is known.

    Saboteurs work in processes of their own, since some of them harm the library itself, and several at once; one by
    one with the cases that strike the broker itself.

    Args:
        target: A good backend, as its URL and its hooks say it.
        trials: By saboteur, the cases to try on it; see `pairs`.
        seed: Of every case.
        jobs: So many processes; one for each core unless given, more on a real broker.
    """
    jobs = jobs or ((os.cpu_count() or 1) if target.virtual else AT_ONCE)
    tried = partial(_tried, url=target.url, hooks=dict(target.hooks), seed=seed)
    strikes = {case.id for case in load_cases() if any(need.startswith("hook:") for need in case.facilities)}
    for at_once, part in ((jobs, lambda case: case not in strikes), (1, strikes.__contains__)):
        with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
            chosen = {name: list(filter(part, cases)) for name, cases in trials.items()}
            futures = [pool.submit(tried, name, cases) for name, cases in chosen.items() if cases]
            for future in as_completed(futures):
                yield future.result()


def _tried(name: str, cases: list[str], *, url: str, hooks: Mapping[str, str], seed: int) -> Fate:
    registry = load_cases()
    return sabotage(load_saboteurs()[name], Target.of(url, hooks=hooks), [registry[each] for each in cases], seed=seed)


@dataclass(frozen=True, slots=True)
class Matrix:
    """
    The whole matrix, as far as it was tried.

    Attributes:
        fates: Of the saboteurs.
        cases: Those that were tried.
        elsewhere: Cases that could not be tried, and what they lack.
    """

    fates: Sequence[Fate]
    cases: Sequence[Case]
    elsewhere: Mapping[str, str]

    @property
    def living(self) -> list[str]:
        """Saboteurs that were tried and not caught."""
        return [fate.name for fate in self.fates if fate.tried and not fate.killed]

    @property
    def unseen(self) -> list[str]:
        """Saboteurs whose harm could not be seen where it was tried."""
        return [fate.name for fate in self.fates if not fate.tried]

    def kills(self) -> dict[str, list[tuple[str, str]]]:
        """Return for each case whom it kills, with the message; those first whom few others kill."""
        found: dict[str, list[tuple[int, str, str]]] = {case.id: [] for case in self.cases}
        for fate in self.fates:
            for case, message in fate.killers.items():
                found[case].append((len(fate.killers), fate.name, message))
        return {case: [(name, message) for _, name, message in sorted(killed)] for case, killed in found.items()}

    def idle(self) -> list[str]:
        """Return the cases that kill nobody: a saboteur is missing, or the case shows nothing."""
        return [case for case, killed in self.kills().items() if not killed]

    def lines(self) -> Iterator[str]:
        """Yield the matrix by cases: how many each kills, and with which words the one whom few others kill."""
        for case, killed in sorted(self.kills().items()):
            who = f"{killed[0][0]}: {killed[0][1]}" if killed else "nobody"
            yield f"{case:<36} kills {len(killed):>3}: {who}"[:WIDTH]

    def summary(self) -> Iterator[str]:
        """Yield what remains to be done, and the count of all."""
        if self.elsewhere:
            needs = ", ".join(sorted(set(self.elsewhere.values())))
            yield f"{len(self.elsewhere)} cases were not tried: they need {needs} (--on URL, --hook NAME=COMMAND)"
        if self.unseen:
            yield f"{len(self.unseen)} saboteurs do no harm there: {', '.join(self.unseen)}"
        idle, living = self.idle(), self.living
        if living:
            yield f"LIVING saboteurs: {', '.join(living)}"
        if idle:
            yield f"cases that kill NOBODY: {', '.join(idle)}"
        seen = len(self.fates) - len(self.unseen)
        busy = len(self.cases) - len(idle)
        yield f"{busy} of {len(self.cases)} cases kill a saboteur by a message that names its rule"
        yield f"{seen - len(living)} of {seen} saboteurs are killed"

    def as_json(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {
            "schema": 1,
            "cases": {case: dict(killed) for case, killed in sorted(self.kills().items())},
            "saboteurs": {
                fate.name: {
                    "rules": list(fate.rules),
                    "killed_by": sorted(fate.killers),
                    "failed_otherwise": dict(sorted(fate.others.items())),
                }
                for fate in sorted(self.fates, key=lambda fate: fate.name)
            },
            "not_tried": dict(self.elsewhere),
        }


def told(fate: Fate) -> str:
    """Return one saboteur's line."""
    word = "killed" if fate.killed else "LIVES"
    by = ", ".join(list(fate.killers)[:4])
    others = ", ".join(list(fate.others)[:4]) or next((f"{case} {why}"[:80] for case, why in fate.silent.items()), "")
    by = by or f"nobody named its rule; {others or 'all passed'}"
    return (
        f"{word:<6} {fate.name:<24} {'/'.join(fate.rules):<24} by {len(fate.killers):>3}: {by} ({fate.seconds:.1f} s)"
    )
