"""Knows the options that pytest gets: `pytest --pyargs unistream.conformance --unistream-url URL`.

Without `--unistream-url` it does nothing; what it does is in `test_conformance`, which only `--pyargs` collects.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("unistream", "conformance of a message broker, by unistream")
    group.addoption("--unistream-url", metavar="URL", help="the backend to judge")
    group.addoption("--unistream-profile", metavar="NAME", default="core", help="smoke, core, faults, broker or long")
    group.addoption("--unistream-seed", metavar="N", type=int, default=1, help="seed of everything that is drawn")
