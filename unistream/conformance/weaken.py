"""Knows whether each assertion of each checker is needed: without it, some saboteur must pass a case that caught it.

An assertion of a checker is a `yield` of a violation. It is taken out of the source, the checker is compiled again, and
judges anew what the saboteurs left behind.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from unistream.conformance.checkers import CHECKERS, THEMES, Run, Violation
from unistream.conformance.checkers.table import Find
from unistream.conformance.kill import harm
from unistream.conformance.registry import Case
from unistream.conformance.runner import Result, run_case
from unistream.conformance.saboteurs import Saboteur
from unistream.conformance.target import Target

KEPT = 6
"""So many runs are kept for each checker and saboteur: enough to find one that hangs on each assertion."""

Evidence = Mapping[str, list[tuple[str, Result]]]
"""By checker: saboteurs, and runs in which that checker alone caught them."""


@dataclass(frozen=True, slots=True)
class Removal:
    """
    One assertion that was taken out.

    Attributes:
        checker: Whose it was; a helper's assertion is that of the checkers of its module.
        place: File and line.
        saboteur: Who lives without it; empty for nobody.
        case: In which case.
    """

    checker: str
    place: str
    saboteur: str = ""
    case: str = ""


def gather(saboteurs: Iterable[Saboteur], target: Target, cases: Iterable[Case], *, seed: int) -> Evidence:
    """Run every saboteur through the cases, and keep the runs that one checker alone brought down."""
    found: dict[str, list[tuple[str, Result]]] = defaultdict(list)
    chosen = list(cases)
    for saboteur in saboteurs:
        with harm(saboteur, target) as harmed:
            for case in chosen:
                result = run_case(case, harmed, seed=seed)
                checker = _sole(result)
                if checker and sum(name == saboteur.name for name, _ in found[checker]) < KEPT:
                    found[checker].append((saboteur.name, result))
    return found


def _sole(result: Result) -> str:
    """Return the checker without which the run would have passed, or nothing."""
    names = {violation.checker for violation in result.violations}
    told = {str(violation) for violation in result.violations} | {each.message for each in result.violations}
    return names.pop() if len(names) == 1 and result.reason in told else ""


def removals(evidence: Evidence) -> Iterator[Removal]:
    """Take out one assertion after another, and yield who then lives."""
    for module in THEMES:
        source = inspect.getsource(module)
        names = {each.find.__name__: each.name for each in CHECKERS.values() if each.find.__module__ == module.__name__}
        for owner, line in _assertions(source, names):
            weakened = _without(module, source, line)
            yield _tried(owner or names, f"{Path(str(module.__file__)).name}:{line}", weakened, evidence)


def _tried(owners: Mapping[str, str], place: str, weakened: ModuleType, evidence: Evidence) -> Removal:
    for function, checker in owners.items():
        find: Find = getattr(weakened, function)
        for saboteur, result in evidence.get(checker, ()):
            left: Iterator[Violation] = find(Run(result.history), result.terms)
            if next(left, None) is None:
                return Removal(checker, place, saboteur, result.case.id)
    return Removal("/".join(owners.values()), place)


def _assertions(source: str, names: Mapping[str, str]) -> Iterator[tuple[dict[str, str], int]]:
    """Yield the line of each assertion with the checker that it is in; none for a helper's."""
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            owner = {function.name: names[function.name]} if function.name in names else {}
            for node in ast.walk(function):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield | ast.YieldFrom):
                    yield owner, node.lineno


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
