"""The virtual clock: hours in milliseconds, the same every time, and never a hang."""

from __future__ import annotations

import asyncio
import time

import pytest

from unistream.conformance.clock import START, StuckError, run


def test_virtual_hours_take_no_real_time() -> None:
    """Sleeping moves virtual time by exactly what was asked, and real time by next to nothing."""

    async def main() -> float:
        await asyncio.sleep(36_000)
        return asyncio.get_running_loop().time()

    began = time.perf_counter()

    assert run(main()) == pytest.approx(START + 36_000)
    assert time.perf_counter() - began < 5


def test_timeouts_and_timers_run_in_order() -> None:
    """Timers fire in the order of their times, and a timeout cuts off what is longer."""

    async def main() -> list[str]:
        seen: list[str] = []
        loop = asyncio.get_running_loop()
        loop.call_later(2, seen.append, "two")
        loop.call_at(loop.time() + 1, seen.append, "one")
        try:
            async with asyncio.timeout(3):
                await asyncio.sleep(4)
        except TimeoutError:
            seen.append("three")
        return seen

    assert run(main()) == ["one", "two", "three"]


def test_a_deadlock_is_an_error_that_says_who_waits() -> None:
    """Waiting for what nobody will do is noticed at once, with the name of the waiting task and its line."""

    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        await asyncio.create_task(forever(), name="sleeping-beauty")

    with pytest.raises(StuckError, match=r"sleeping-beauty: .*forever line \d+"):
        run(main())


def test_a_spinning_program_is_an_error() -> None:
    """A loop that never lets time pass does not hang the suite."""

    async def main() -> None:
        while True:  # noqa: ASYNC110 - spinning is what is tested
            await asyncio.sleep(0)

    with pytest.raises(StuckError, match="without time passing"):
        run(main())


def test_a_program_that_never_ends_is_an_error() -> None:
    """A loop that only waits is cut off at the limit of virtual time."""

    async def main() -> None:
        while True:  # noqa: ASYNC110 - never ending is what is tested
            await asyncio.sleep(1)

    with pytest.raises(StuckError, match="still running"):
        run(main(), limit=100)
