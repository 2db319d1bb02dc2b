"""Knows the suite's commands: run cases, run random workloads, replay a plan, and test the suite itself."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast, get_args

from unistream.conformance import report
from unistream.conformance.kill import idle_cases, sabotage
from unistream.conformance.plan import SHAPES, Plan, Shape, draw
from unistream.conformance.registry import MUST, PROFILES, Case, Tier, load_cases
from unistream.conformance.runner import Result, run_case, run_cases
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target
from unistream.conformance.trial import Trial
from unistream.conformance.verdict import Verdict, conformant
from unistream.conformance.workload import play

PASSED, NOT_CONFORMANT, WRONG_CALL = 0, 1, 2


def conform(
    url: str,
    *,
    profile: str = "core",
    only: Sequence[str] = (),
    seed: int = 1,
    jobs: int = 4,
    json_path: Path | None = None,
    histories: Path | None = None,
) -> int:
    """
    Judge the backend that a URL names; print the report; return the exit code.

    Args:
        url: The target.
        profile: Which tiers.
        only: Ids or groups of cases, instead of a profile.
        seed: Of everything that is drawn.
        jobs: How many cases run at once on a real broker.
        json_path: Where the JSON report goes; `-` prints it instead of the lines.
        histories: A folder for the histories of cases that failed.
    """
    target = Target.of(url)
    results = []
    began = time.perf_counter()
    for result in run_cases(load_cases().select(profile, only), target, seed=seed, jobs=jobs):
        results.append(result)
        if histories is not None and result.verdict is Verdict.VIOLATION:
            histories.mkdir(parents=True, exist_ok=True)
            result.history.save(histories / f"{result.case.id}.jsonl")
    seconds = time.perf_counter() - began
    whole = report.as_json(results, target, seed=seed, seconds=seconds)
    if str(json_path) == "-":
        print(json.dumps(whole, indent=1, ensure_ascii=False))
    else:
        print("\n".join(report.lines(results, target, seed=seed, seconds=seconds)))
        if json_path is not None:
            json_path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return PASSED if conformant(result.judged for result in results) else NOT_CONFORMANT


def simulate(plan: Plan, target: Target, *, seed: int) -> Result:
    """Carry out one plan on a target and judge it as a case of its own."""

    async def body(trial: Trial) -> None:
        await play(trial, plan)

    rules = ("PUB-1", "GRP-1", "GRP-2", "ORD-2") if plan.shape == "keyed" else ("PUB-1", "GRP-1", "GRP-2")
    name = f"sim.{plan.shape}-seed-{plan.seed}"
    # The library draws the jitter of its waits there.
    random.seed(seed)
    case = Case(name, rules, MUST, Tier.FAULTS, "A random workload breaks no rule.", body, limit=3600.0)
    return run_case(case, target, seed=seed)


def simulations(
    target: Target, seeds: range, shapes: Sequence[Shape] = SHAPES, *, faults: bool = True, messages: int = 60
) -> Iterator[tuple[Plan, Result]]:
    """Draw and carry out a plan for every seed and shape."""
    for seed in seeds:
        for shape in shapes:
            lease = max(5.0 if seed % 2 else target.pace.lease, target.pace.lease)
            plan = draw(seed, shape, faults=faults, messages=messages, lease=lease)
            yield plan, simulate(plan, target, seed=seed)


def sim(url: str, *, seeds: range, shapes: Sequence[Shape], messages: int, keep: Path | None) -> int:
    """Run random workloads; print what breaks a rule; keep plan and history of those; return the exit code."""
    target = Target.of(url)
    runs = events = bad = 0
    seconds = 0.0
    for plan, result in simulations(target, seeds, shapes, messages=messages):
        runs, events, seconds = runs + 1, events + len(result.history), seconds + result.seconds
        if result.verdict is Verdict.CONFORMS:
            continue
        bad += 1
        print("\n".join(report.lines([result], target, seed=plan.seed)))
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            plan.save(keep / f"{plan.shape}-{plan.seed}.plan.json")
            result.history.save(keep / f"{plan.shape}-{plan.seed}.history.jsonl")
    print(f"{runs} runs, {events} events, {bad} with violations, {seconds:.1f} s")
    return PASSED if not bad else NOT_CONFORMANT


def replay(url: str, path: Path) -> int:
    """Carry out a plan that was kept, and judge it again."""
    plan = Plan.load(path)
    target = Target.of(url)
    result = simulate(plan, target, seed=plan.seed)
    print("\n".join(report.lines([result], target, seed=plan.seed)))
    return PASSED if result.verdict is Verdict.CONFORMS else NOT_CONFORMANT


def kill(url: str, *, names: Sequence[str], profile: str, seed: int, quick: bool) -> int:
    """Print the kill matrix: who caught each saboteur, and which cases caught nobody; return the exit code."""
    cases = load_cases().select(profile)
    target = Target.of(url)
    saboteurs = load_saboteurs()
    unknown = set(names) - set(saboteurs)
    if unknown:
        raise ValueError(f"no saboteur is named {', '.join(sorted(unknown))}; there are {', '.join(saboteurs)}")
    fates = []
    for name in names or saboteurs:
        fate = sabotage(saboteurs[name], target, cases, seed=seed, quick=quick)
        fates.append(fate)
        word = "killed" if fate.killed else "LIVES"
        killers = list(fate.killers)
        print(
            f"{word:<6} {name:<22} {'/'.join(fate.saboteur.rules):<24} by {len(killers):>3}: {', '.join(killers[:4])}"
        )
    living = [fate.saboteur.name for fate in fates if not fate.killed]
    print(f"{len(fates) - len(living)} of {len(fates)} saboteurs killed" + (f"; alive: {living}" if living else ""))
    if not quick and not names:
        print(f"cases that killed nobody: {', '.join(idle_cases(fates, cases)) or 'none'}")
    return NOT_CONFORMANT if living else PASSED


def _range(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last)) if last else range(int(first))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unistream.conformance", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="judge a backend")
    run.add_argument("--profile", choices=list(PROFILES), default="core")
    run.add_argument("--only", action="append", default=[], help="id or group of cases; may repeat")
    run.add_argument("--jobs", type=int, default=4, help="cases at once on a real broker")
    run.add_argument("--json", type=Path, dest="json_path", help="file for the JSON report, or - to print it")
    run.add_argument("--histories", type=Path, help="folder for the histories of failed cases")
    random = commands.add_parser("sim", help="run random workloads")
    random.add_argument("--seeds", type=_range, default=range(20), help="N or FIRST:LAST")
    random.add_argument("--shape", action="append", choices=get_args(Shape), default=[])
    random.add_argument("--messages", type=int, default=60)
    random.add_argument("--keep", type=Path, help="folder for plans and histories of runs that break a rule")
    again = commands.add_parser("replay", help="carry out a plan that was kept")
    again.add_argument("plan", type=Path)
    matrix = commands.add_parser("kill", help="prove that the suite notices broken promises")
    matrix.add_argument("--saboteur", action="append", default=[])
    matrix.add_argument("--profile", choices=list(PROFILES), default="faults")
    matrix.add_argument("--quick", action="store_true", help="stop at the first case that kills a saboteur")
    for command in (run, random, again, matrix):
        command.add_argument("--url", default="memory://conformance")
        command.add_argument("--seed", type=int, default=1)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "run":
            return conform(
                given.url,
                profile=given.profile,
                only=given.only,
                seed=given.seed,
                jobs=given.jobs,
                json_path=given.json_path,
                histories=given.histories,
            )
        if given.command == "sim":
            shapes = cast(list[Shape], given.shape) or SHAPES
            return sim(given.url, seeds=given.seeds, shapes=shapes, messages=given.messages, keep=given.keep)
        if given.command == "replay":
            return replay(given.url, given.plan)
        return kill(given.url, names=given.saboteur, profile=given.profile, seed=given.seed, quick=given.quick)
    except ValueError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return WRONG_CALL
