"""Knows the suite's commands: run cases, run random workloads, replay a plan, and test the suite itself."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unistream.conformance import report, terminal
from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.compare import checked, compare, is_worse, told
from unistream.conformance.exclusions import load_exclusions
from unistream.conformance.housekeeping import cleanup, leftovers, preflight
from unistream.conformance.junit import junit
from unistream.conformance.kill import Fate
from unistream.conformance.matrix import Matrix, fates, lacking, pairs
from unistream.conformance.matrix import told as told_fate
from unistream.conformance.page import page
from unistream.conformance.plan import SHAPES, Plan, Shape, draw
from unistream.conformance.redaction import redacted, scrub
from unistream.conformance.registry import MUST, Case, Tier, load_cases
from unistream.conformance.rounds import JOBS, in_order, run_cases
from unistream.conformance.runner import Result, run_case
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.shrink import shrunk
from unistream.conformance.target import Target
from unistream.conformance.trial import Trial
from unistream.conformance.verdict import Verdict
from unistream.conformance.weaken import proofs
from unistream.conformance.workload import play

PASSED, NOT_CONFORMANT, WRONG_CALL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Order:
    """
    What `conform` shall do.

    Attributes:
        profile: Which tiers.
        only: Ids or groups of cases, instead of a profile.
        seed: Of everything that is drawn.
        jobs: How many cases run at once on a real broker.
        rounds: How often each case runs.
        json: Where the JSON report goes; `-` prints it instead of the lines.
        junit: Where the report for a build server goes.
        html: Where the page goes.
        histories: A folder for the histories of cases that failed.
        exclude: The list of cases that are known to fail.
        hooks: Commands that act on the broker.
        strict_claims: What works and is not claimed is a failure too.
        require_complete: What was not verified is a failure too, whoever it binds.
        dry_run: Only say what would run.
    """

    profile: str = "core"
    only: Sequence[str] = ()
    seed: int = 1
    jobs: int = JOBS
    rounds: int = 1
    json: Path | None = None
    junit: Path | None = None
    html: Path | None = None
    histories: Path | None = None
    exclude: Path | None = None
    hooks: Mapping[str, str] = field(default_factory=dict)
    strict_claims: bool = False
    require_complete: bool = False
    dry_run: bool = False


def conform(url: str, order: Order) -> int:
    """
    Judge the backend that a URL names; write the reports; return the exit code.

    Raises:
        ValueError: The order is wrong, or the preflight failed: nothing was judged.
        UnistreamError: The URL is wrong.
    """
    registry = load_cases()
    cases = registry.select(order.profile, order.only)
    exclusions = load_exclusions(order.exclude, registry, datetime.now(UTC).date()) if order.exclude else []
    target = Target.of(url, hooks=order.hooks)
    if order.dry_run:
        print("\n".join(planned(cases, target)))
        return PASSED
    identity = preflight(target)
    began = time.perf_counter()
    results = []
    for result in run_cases(
        cases, target, seed=order.seed, jobs=order.jobs, rounds=order.rounds, exclusions=exclusions
    ):
        results.append(result)
        _progress(len(results), len(cases), result)
        _keep_history(result, target, order.histories)
    whole = report.as_json(
        in_order(results, cases),
        target,
        seed=order.seed,
        seconds=time.perf_counter() - began,
        identity=identity,
        left=leftovers(target, [result.run for result in results]),
        profile=",".join(order.only) or order.profile,
        jobs=1 if target.virtual else order.jobs,
    )
    _write(whole, order)
    return exit_code(whole, strict_claims=order.strict_claims, require_complete=order.require_complete)


def exit_code(whole: Mapping[str, Any], *, strict_claims: bool = False, require_complete: bool = False) -> int:
    """Return 0 for a conformant target, also if nothing but excluded cases stands in its way, else 1."""
    counts = whole["counts"]
    if strict_claims and counts.get(Verdict.UNDERCLAIMED):
        return NOT_CONFORMANT
    if require_complete and (counts.get(Verdict.UNVERIFIED) or counts.get(Verdict.BLOCKED)):
        return NOT_CONFORMANT
    return PASSED if whole["conformant"] or whole["conformant_except"] else NOT_CONFORMANT


def planned(cases: Sequence[Case], target: Target) -> Iterator[str]:
    """Yield what would run: each case with its tier, its level and its promise."""
    for case in cases:
        lacking = sorted(name for name in case.facilities if name in target.lacks)
        missing = sorted(n for n in case.facilities if n.startswith("hook:") and n[5:] not in target.hooks)
        note = f" [INAPPLICABLE: no {lacking[0]}]" if lacking else f" [UNVERIFIED: no {missing[0]}]" if missing else ""
        yield f"{case.id:<34} {case.tier:<7} {case.level}{note}\n    {case.sentence}"
    yield f"{len(cases)} cases on {redacted(target.url)}, each at most {max(case.limit for case in cases):.0f} s"


def _progress(done: int, of: int, result: Result) -> None:
    """On a terminal, say how far it is; a pipe gets the report alone."""
    if sys.stderr.isatty():
        end = "\n" if done == of else ""
        print(f"\r\x1b[K{done}/{of} {result.case.id} {result.verdict}", end=end, file=sys.stderr, flush=True)


def _keep_history(result: Result, target: Target, folder: Path | None) -> None:
    if folder is not None and result.verdict in report.TOLD and len(result.history):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{result.case.id}.jsonl"
        result.history.save(path)
        path.write_text(scrub(path.read_text(encoding="utf-8"), target.url), encoding="utf-8")


def _write(whole: dict[str, Any], order: Order) -> None:
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    if str(order.json) == "-":
        print(text, end="")
    else:
        print("\n".join(terminal.lines(whole)))
    written = {
        order.json: text,
        order.junit: junit(whole, require_complete=order.require_complete) if order.junit else "",
        order.html: page([whole]) if order.html else "",
    }
    for path, content in written.items():
        if path is not None and str(path) != "-":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")


def read_report(path: Path) -> Mapping[str, Any]:
    """
    Return the JSON report in a file.

    Raises:
        ValueError: There is none.
    """
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def diff(before: Path, after: Path) -> int:
    """Print what changed between two JSON reports; return 1 if something was lost."""
    old, new = read_report(before), read_report(after)
    print("\n".join(told(old, new)))
    return NOT_CONFORMANT if is_worse(compare(old, new)) else PASSED


def render(reports: Sequence[Path], out: Path) -> int:
    """Write one page about several JSON reports, a column for each."""
    out.write_text(page([read_report(path) for path in reports]), encoding="utf-8")
    return PASSED


def clean(url: str, prefix: str, *, dry_run: bool) -> int:
    """Delete what runs of the suite left on a broker, and print the names."""
    names = cleanup(Target.of(url), prefix, delete=not dry_run)
    for name in names:
        print(name)
    print(f"{len(names)} topics {'found' if dry_run else 'deleted'}", file=sys.stderr)
    return PASSED


def simulate(plan: Plan, target: Target, *, seed: int) -> Result:
    """Carry out one plan on a target and judge it as a case of its own."""

    async def body(trial: Trial) -> None:
        await play(trial, plan)

    rules = ("PUB-1", "GRP-1", "GRP-2", "ORD-2") if plan.shape == "keyed" else ("PUB-1", "GRP-1", "GRP-2")
    name = f"sim.{plan.shape}-seed-{plan.seed}"
    # The library draws the jitter of its waits there.
    random.seed(seed)
    # On a virtual clock only a run that never ends is too long.
    limit = 3600.0 if target.virtual else 300.0 + sum(len(each.messages) for each in plan.producers) / 10
    case = Case(name, rules, MUST, Tier.FAULTS, "A random workload breaks no rule.", body, limit=limit)
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
        if not target.virtual:
            took = f"{len(result.history)} events, {result.seconds:.1f} s"
            print(f"{plan.shape} seed {plan.seed}: {result.verdict}, {took}", file=sys.stderr, flush=True)
        if result.verdict is Verdict.CONFORMS:
            continue
        bad += 1
        print("\n".join(terminal.lines(report.as_json([result], target, seed=plan.seed))))
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
    print("\n".join(terminal.lines(report.as_json([result], target, seed=plan.seed))))
    return PASSED if result.verdict is Verdict.CONFORMS else NOT_CONFORMANT


def shrink(url: str, path: Path, out: Path, *, tries: int = 1) -> int:
    """
    Carry out a plan that breaks a rule, make it as small as it can be, and write the small one.

    Args:
        url: Where.
        path: The plan.
        out: File for the small plan.
        tries: How often each smaller one is carried out before it is believed to break nothing.

    Raises:
        ValueError: The plan breaks no rule here.
    """
    target, plan = Target.of(url), Plan.load(path)
    runs = 0

    def accused(plan: Plan) -> set[str]:
        nonlocal runs
        runs += 1
        result = simulate(plan, target, seed=plan.seed)
        return {each.checker for each in result.violations if each.checker != VACUOUS}

    wanted = set[str]().union(*(accused(plan) for _ in range(tries)))
    if not wanted:
        raise ValueError(f"{path} breaks no rule on {redacted(url)}")
    small = shrunk(plan, lambda smaller: any(wanted & accused(smaller) for _ in range(tries)))
    small.save(out)
    result = simulate(small, target, seed=small.seed)
    print("\n".join(terminal.lines(report.as_json([result], target, seed=small.seed))))
    parts = f"{small.size} messages, {len(list(small.members))} members, {len(small.faults)} faults"
    print(f"{parts}, after {runs} runs: {out}")
    return NOT_CONFORMANT


def kill(
    url: str,
    *,
    on: Sequence[str] = (),
    hooks: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    profile: str = "long",
    only: Sequence[str] = (),
    seed: int = 1,
    jobs: int | None = None,
    out: Path | None = None,
) -> int:
    """
    Print the kill matrix: who caught each saboteur, and whom each case caught; return the exit code.

    Args:
        url: A good backend, on which all cases are tried that can run there.
        on: Real brokers, for the others; each gets what could not be tried, or killed nobody, on those before it.
        hooks: Commands that act on the first of them.
        names: Only these saboteurs.
        profile: The cases of these tiers.
        only: Only these cases.
        seed: Of every case.
        jobs: So many processes at once.
        out: File for the whole matrix, as JSON.
    """
    began = time.perf_counter()
    cases = load_cases().select(profile, only)
    saboteurs = load_saboteurs()
    unknown = set(names) - set(saboteurs)
    if unknown:
        raise ValueError(f"no saboteur is named {', '.join(sorted(unknown))}; there are {', '.join(saboteurs)}")
    chosen = [saboteurs[name] for name in names or saboteurs]
    found = {each.name: Fate(each.name, each.rules) for each in chosen}
    left, tried = cases, set()
    targets = [Target.of(url), *(Target.of(each, hooks=None if place else hooks) for place, each in enumerate(on))]
    for target in targets:
        here = [case for case in left if not lacking(case, target)]
        tried |= {case.id for case in here}
        trials = pairs(target, here, chosen)
        runs = sum(map(len, trials.values()))
        print(f"{redacted(target.url)}: {len(here)} cases, {len(trials)} saboteurs, {runs} runs", flush=True)
        for fate in fates(target, trials, seed=seed, jobs=jobs):
            found[fate.name].join(fate)
            print(told_fate(fate), flush=True)
        done = {case for fate in found.values() for case in fate.killers} | {c.id for c in here if target.virtual}
        left = [case for case in left if case.id not in done]
    elsewhere = {case.id: lacking(case, targets[-1]) for case in cases if case.id not in tried}
    whole = Matrix(list(found.values()), [case for case in cases if case.id in tried], elsewhere)
    if not names:
        print("\n".join((*whole.lines(), *whole.summary())))
    print(f"{time.perf_counter() - began:.0f} s")
    if out is not None:
        out.write_text(json.dumps(whole.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return NOT_CONFORMANT if whole.living or (whole.idle() and not names) else PASSED


def weaken(url: str, *, names: Sequence[str] = (), profile: str, seed: int) -> int:
    """Remove each assertion of each checker and print which saboteur then passes; return 1 if one is not needed."""
    began = time.perf_counter()
    target, saboteurs = Target.of(url), load_saboteurs()
    cases = [case for case in load_cases().select(profile) if not case.alone and not lacking(case, target)]
    found = proofs(target, pairs(target, cases, [saboteurs[name] for name in names or saboteurs]), seed=seed)
    for assertion, proof in found.items():
        print(f"without {assertion.place:<22} {'/'.join(assertion.checkers)[:40]:<26} {proof}")
    needed = [proof for proof in found.values() if proof.passes]
    whole = sum(bool(proof.lives) for proof in needed)
    print(f"{len(needed)} of {len(found)} assertions are needed; without {whole} of them a saboteur lives altogether")
    print(f"{time.perf_counter() - began:.0f} s")
    return PASSED if len(needed) == len(found) else NOT_CONFORMANT


def seeds_of(text: str) -> range:
    """Return the seeds of `N` or `FIRST:LAST`."""
    first, _, last = text.partition(":")
    return range(int(first), int(last)) if last else range(int(first))
