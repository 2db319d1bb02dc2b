"""What holds for every test on Kafka."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    """The client's threads and ours end with the driver, whatever happened to it."""
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + 6.0
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(("unistream-kafka", "kafka-")):
            thread.join(max(0.0, until - time.monotonic()))
            assert not thread.is_alive(), f"{thread.name} still runs"
