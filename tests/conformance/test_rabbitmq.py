"""RabbitMQ keeps every promise: the smoke profile, and the cases in which a broker's own ways show."""

from __future__ import annotations

import pytest

from tests.urls import url_of
from unistream.conformance.registry import Tier, load_cases
from unistream.conformance.runner import run_case
from unistream.conformance.suite import Suite
from unistream.conformance.target import Target
from unistream.conformance.verdict import Verdict

TELLING = (
    "ack.stale-fenced",
    "ext.max-lease",
    "ord.per-key",
    "pub.order-pipelined",
    "red.lease-expiry",
)


def _target() -> Target:
    # Nobody kills this server, so new groups need not settle.
    return Target.of(f"{url_of('UNISTREAM_RABBITMQ_URL')}?heartbeat=2&creation_settles=0")


@pytest.mark.rabbitmq
@pytest.mark.timeout(300)
class TestRabbitMQ(Suite):
    """RabbitMQ at `UNISTREAM_RABBITMQ_URL`."""

    profile = "smoke"

    @classmethod
    def judged(cls) -> Target:
        """Return the server; a missing one is a failure."""
        return _target()


@pytest.mark.rabbitmq
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", TELLING)
def test_rabbitmq_keeps_what_is_hard_for_it(case: str) -> None:
    """Ended leases, fencing and order are kept above what AMQP offers."""
    assert load_cases()[case].tier is Tier.CORE
    result = run_case(load_cases()[case], _target(), seed=5)

    assert result.verdict is Verdict.CONFORMS, f"{result}\n{result.violations[:3]}\n{result.counts}"
