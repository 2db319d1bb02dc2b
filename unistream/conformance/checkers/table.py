"""Knows the list of checkers: their names, the rules they prove broken, and the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unistream.conformance.checkers.run import Run
from unistream.conformance.checkers.terms import Terms, Violation

Find = Callable[[Run, Terms], Iterator[Violation]]


@dataclass(frozen=True, slots=True)
class Checker:
    """A named function from a run to the violations in it."""

    name: str
    rules: tuple[str, ...]
    sentence: str
    find: Find


CHECKERS: dict[str, Checker] = {}


def checker(name: str, *rules: str) -> Callable[[Find], Find]:
    """Enter a function into the list; the first line of its docstring is the sentence that reports show."""

    def enter(find: Find) -> Find:
        if name in CHECKERS:
            raise ValueError(f"two checkers named {name}")
        sentence = (find.__doc__ or "").strip().partition("\n")[0]
        CHECKERS[name] = Checker(name, rules, sentence, find)
        return find

    return enter
