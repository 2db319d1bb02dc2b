"""Knows whether each assertion of each checker is needed: without it, some saboteur must pass a case that caught it.

An assertion of a checker is a `yield` of a violation. It is taken out of the source, the checker is compiled again, and
judges anew what the saboteurs left behind.
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from unistream.conformance.checkers import CHECKERS, THEMES, Run, Violation
from unistream.conformance.checkers.effort import VACUOUS
from unistream.conformance.checkers.table import Find
from unistream.conformance.kill import harm
from unistream.conformance.registry import load_cases
from unistream.conformance.runner import Result, run_case
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Assertion:
    """
    One assertion of the checkers.

    Attributes:
        place: File and line.
        checkers: Whose it is; a helper's assertion is that of all checkers of its module.
    """

    place: str
    checkers: tuple[str, ...]


@dataclass(slots=True)
class Proof:
    """
    Where an assertion was needed.

    Attributes:
        passes: By saboteur, a case that it passes without the assertion.
        lives: The saboteurs that pass every case without it.
    """

    passes: dict[str, str] = field(default_factory=dict)
    lives: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.lives:
            return f"{self.lives[0]} lives (it was caught in {self.passes[self.lives[0]]})"
        if self.passes:
            name, case = next(iter(self.passes.items()))
            return f"{name} passes {case}"
        return "NOTHING changes"


@cache
def assertions() -> Mapping[Assertion, ModuleType]:
    """Return every assertion with its module compiled again without it."""
    found = {}
    for module in THEMES:
        source = inspect.getsource(module)
        names = {each.find.__name__: each.name for each in CHECKERS.values() if each.find.__module__ == module.__name__}
        for owners, line in _places(source, names):
            # That a run showed something is no promise of a backend: `test_verdict` proves that assertion.
            if owners != (VACUOUS,):
                place = f"{Path(str(module.__file__)).name}:{line}"
                found[Assertion(place, owners)] = _without(module, source, line)
    return found


def proofs(target: Target, trials: Mapping[str, Sequence[str]], *, seed: int) -> dict[Assertion, Proof]:
    """
    Remove one assertion after another and return what that does to the suite.

    Args:
        target: A good backend.
        trials: By saboteur, the cases to try on it.
        seed: Of every case.
    """
    found = {assertion: Proof() for assertion in assertions()}
    tried = partial(_needed, url=target.url, seed=seed)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(tried, name, list(cases)): name for name, cases in trials.items()}
        for future in as_completed(futures):
            for assertion, (case, lives) in future.result().items():
                found[assertion].passes[futures[future]] = case
                if lives:
                    found[assertion].lives.append(futures[future])
    return found


def _needed(name: str, cases: Sequence[str], *, url: str, seed: int) -> dict[Assertion, tuple[str, bool]]:
    """Return the assertions without which the saboteur passes a case that caught it: the case, and whether it lives."""
    registry, saboteur = load_cases(), load_saboteurs()[name]
    caught = 0
    passes: dict[Assertion, list[str]] = {}
    with harm(saboteur, Target.of(url)) as harmed:
        for case in cases:
            result = run_case(registry[case], harmed, seed=seed)
            caught += result.verdict is Verdict.VIOLATION
            for assertion in _sole(result):
                passes.setdefault(assertion, []).append(case)
    return {assertion: (found[0], len(found) == caught) for assertion, found in passes.items()}


def _sole(result: Result) -> Iterator[Assertion]:
    """Yield the assertions without any one of which the run would have passed."""
    names = {violation.checker for violation in result.violations} - {VACUOUS}
    if result.verdict is not Verdict.VIOLATION or result.expected or len(names) != 1:
        return
    if result.reason not in {str(violation) for violation in result.violations}:
        return
    (name,) = names
    run = Run(result.history)
    for assertion, weakened in assertions().items():
        if name in assertion.checkers:
            find: Find = getattr(weakened, CHECKERS[name].find.__name__)
            left: Iterator[Violation] = find(run, result.terms)
            if next(left, None) is None:
                yield assertion


def _places(source: str, names: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the line of each assertion with the checkers that it may belong to."""
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            owners = (names[function.name],) if function.name in names else tuple(names.values())
            for node in ast.walk(function):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield | ast.YieldFrom):
                    yield owners, node.lineno


def _without(module: ModuleType, source: str, line: int) -> ModuleType:
    """Return the module compiled again without the assertion of that line."""

    class Remover(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            """Replace it by a yield that is never reached, so that its function still is a generator."""
            if node.lineno != line or not isinstance(node.value, ast.Yield | ast.YieldFrom):
                return node
            never = ast.If(ast.Constant(False), [ast.Expr(ast.Yield(ast.Constant(None)))], [])
            return ast.copy_location(never, node)

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            """Drop the decorators: the weak one must not enter the list of checkers."""
            node.decorator_list = []
            return self.generic_visit(node)

    tree = ast.fix_missing_locations(Remover().visit(ast.parse(source)))
    weakened = ModuleType(f"{module.__name__}_without_{line}")
    weakened.__dict__.update(vars(module))
    exec(compile(tree, str(module.__file__), "exec"), weakened.__dict__)
    return weakened
