"""Targets of the system tests: the reference broker, and every real broker whose adapter is installed."""

from __future__ import annotations

import secrets

import pytest

from tests import urls
from unistream._registry import installed_schemes

VARIABLES = {
    "redis": "UNISTREAM_REDIS_URL",
    "kafka": "UNISTREAM_KAFKA_URL",
    "amqp": "UNISTREAM_RABBITMQ_URL",
    "nats": "UNISTREAM_NATS_URL",
}
TARGETS = ["memory", *(scheme for scheme in VARIABLES if scheme in installed_schemes())]


def url_of(target: str) -> str:
    """The URL of a target; a promised broker that is absent fails the test."""
    if target == "memory":
        return f"memory://system-{secrets.token_hex(4)}"
    return urls.url_of(VARIABLES[target])


@pytest.fixture(params=TARGETS)
def url(request: pytest.FixtureRequest) -> str:
    """The URL of one target."""
    return url_of(request.param)


@pytest.fixture(params=[target for target in TARGETS if target != "memory"])
def real_url(request: pytest.FixtureRequest) -> str:
    """The URL of one real broker."""
    return url_of(request.param)


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"system-{secrets.token_hex(6)}"
