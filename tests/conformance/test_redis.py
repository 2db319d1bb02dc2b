"""Redis keeps every promise: the core profile on the oldest server supported, smoke on a newer one."""

from __future__ import annotations

import pytest

from tests.urls import url_of
from unistream.conformance.suite import Suite
from unistream.conformance.target import Target


@pytest.mark.redis
@pytest.mark.timeout(900)
class TestRedis(Suite):
    """Redis at `UNISTREAM_REDIS_URL`."""

    profile = "core"

    @classmethod
    def judged(cls) -> Target:
        """Return the server; a missing one is a failure."""
        return Target.of(url_of("UNISTREAM_REDIS_URL"))


@pytest.mark.redis
@pytest.mark.timeout(300)
class TestRedis8(Suite):
    """Redis at `UNISTREAM_REDIS8_URL`."""

    profile = "smoke"

    @classmethod
    def judged(cls) -> Target:
        """Return the server; a missing one is a failure."""
        return Target.of(url_of("UNISTREAM_REDIS8_URL"))
