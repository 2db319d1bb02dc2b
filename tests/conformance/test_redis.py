"""Redis keeps every promise: the core profile on the oldest server supported, smoke on a newer one."""

from __future__ import annotations

import os

import pytest

from unistream.conformance.suite import Suite
from unistream.conformance.target import Target


def _url(variable: str) -> str:
    url = os.environ.get(variable)
    if not url:
        pytest.fail(f"{variable} is not set: run the tests by `python -m tests.brokers run -- pytest`", pytrace=False)
    return url


@pytest.mark.redis
@pytest.mark.timeout(900)
class TestRedis(Suite):
    """Redis at `UNISTREAM_REDIS_URL`."""

    profile = "core"

    @classmethod
    def judged(cls) -> Target:
        """Return the server; a missing one is a failure."""
        return Target.of(_url("UNISTREAM_REDIS_URL"))


@pytest.mark.redis
@pytest.mark.timeout(300)
class TestRedis8(Suite):
    """Redis at `UNISTREAM_REDIS8_URL`."""

    profile = "smoke"

    @classmethod
    def judged(cls) -> Target:
        """Return the server; a missing one is a failure."""
        return Target.of(_url("UNISTREAM_REDIS8_URL"))
