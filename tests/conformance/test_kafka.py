"""Kafka keeps its promises: the smoke profile, and the cases of `core` in which groups share out partitions."""

from __future__ import annotations

import pytest

from tests.urls import url_of
from unistream.conformance.registry import Tier, load_cases
from unistream.conformance.suite import Suite
from unistream.conformance.target import Target

SMOKE = [case.id for case in load_cases() if case.tier is Tier.SMOKE]


@pytest.mark.kafka
@pytest.mark.timeout(300)
class TestKafka(Suite):
    """Kafka at `UNISTREAM_KAFKA_URL`; dead members are noticed soon, so that the cases are short."""

    only = (
        *SMOKE,
        "ack.out-of-order",
        "can.every-await-point",
        "grp.combined",
        "ord.m3-m4-crash",
        "red.never-early",
        "top.no-crosstalk",
    )

    @classmethod
    def judged(cls) -> Target:
        """Return the server; a missing one is a failure."""
        return Target.of(f"{url_of('UNISTREAM_KAFKA_URL')}?session_timeout=4")
