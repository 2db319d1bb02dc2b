"""Cases kill members on purpose, and what a dead member leaves behind is the garbage collector's."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sockets of members that died without a word are no leak of the library; the cases `lek.*` count its own."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))


@pytest.fixture(autouse=True, scope="module")
def bury_the_dead() -> Iterator[None]:
    """Collect what the dead left before other tests, which take such a warning for their own, go on."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
