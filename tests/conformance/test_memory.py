"""The reference broker keeps every promise of the core profile."""

from __future__ import annotations

import pytest

from unistream.conformance.suite import Suite


@pytest.mark.timeout(600)
class TestMemory(Suite):
    """The reference broker on a virtual clock."""

    target = "memory://core"
    profile = "core"
