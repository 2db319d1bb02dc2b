"""Knows how the suite is run by pytest: `class Suite`, to be subclassed, with one test for each case.

The cases run side by side in the background as soon as the first test asks for its verdict, and only those cases that
pytest selected; a test waits for its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import ClassVar, cast

import pytest

from unistream.conformance.redaction import scrub
from unistream.conformance.registry import Case, load_cases
from unistream.conformance.report import as_json
from unistream.conformance.rounds import JOBS, run_cases
from unistream.conformance.runner import Result
from unistream.conformance.target import Target
from unistream.conformance.terminal import lines
from unistream.conformance.verdict import Verdict, obstacles


class Run:
    """
    Cases that run in a thread of their own; whoever asks for a verdict waits for it.

    Attributes:
        target: What is judged.
    """

    def __init__(self, target: Target, cases: Sequence[Case], *, seed: int, jobs: int) -> None:
        self._results: dict[str, Future[Result]] = {case.id: Future() for case in cases}
        self.target = target
        self._work = (cases, seed, jobs)
        # A daemon: whoever interrupts pytest doesn't wait for the rest.
        threading.Thread(target=self._run, name="conformance", daemon=True).start()

    def _run(self) -> None:
        cases, seed, jobs = self._work
        try:
            for result in run_cases(cases, self.target, seed=seed, jobs=jobs):
                self._results[result.case.id].set_result(result)
        except BaseException as error:
            for future in self._results.values():
                if not future.done():
                    future.set_exception(error)
            raise

    def result(self, case: Case) -> Result:
        """Wait for a case's result and return it."""
        return self._results[case.id].result()


class Suite:
    """
    The conformance suite as a class of tests: subclass it and say what to judge.

    Attributes:
        target: A URL, or a `Target` with hooks or a pace of its own.
        profile: Which tiers.
        only: Ids or groups of cases, instead of a profile.
        seed: Of everything that is drawn.
        jobs: How many cases run at once on a real broker.
    """

    target: ClassVar[str | Target]
    profile: ClassVar[str] = "core"
    only: ClassVar[Sequence[str]] = ()
    seed: ClassVar[int] = 1
    jobs: ClassVar[int] = JOBS
    _run: ClassVar[Run | None] = None

    def __init_subclass__(cls) -> None:
        """Give every subclass a run of its own."""
        cls._run = None

    @classmethod
    def judged(cls) -> Target:
        """Return what is judged."""
        return Target.of(cls.target) if isinstance(cls.target, str) else cls.target

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Make one test of each case of the profile."""
        if "conformance_case" in metafunc.fixturenames:
            cases = load_cases().select(cls.profile, cls.only)
            metafunc.parametrize("conformance_case", cases, ids=[case.id for case in cases])

    def test_conformance(self, conformance_case: Case, request: pytest.FixtureRequest) -> None:
        """The backend keeps the promise of this case, or refuses what it does not offer."""
        kind = type(self)
        if kind._run is None:
            chosen = [
                cast(Case, item.callspec.params["conformance_case"])
                for item in request.session.items
                if isinstance(item, pytest.Function) and item.cls is kind and hasattr(item, "callspec")
            ]
            kind._run = Run(kind.judged(), chosen, seed=kind.seed, jobs=kind.jobs)
        tell(kind._run.result(conformance_case), kind._run.target)


def tell(result: Result, target: Target) -> None:
    """Fail with the evidence what binds the target, skip with the reason what does not, or pass."""
    if obstacles([result.judged]):
        pytest.fail("\n".join(lines(as_json([result], target, seed=result.seed))), pytrace=False)
    if result.verdict not in (Verdict.CONFORMS, Verdict.UNDERCLAIMED):
        pytest.skip(scrub(f"{result.verdict}: {result.reason}", target.url))
