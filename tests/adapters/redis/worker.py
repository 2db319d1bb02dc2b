"""A member in a process of its own: handles messages and writes down when each began and ended.

Run as python -m tests.adapters.redis.worker URL TOPIC GROUP ORDERING LEASE LOG; SIGTERM makes it leave properly.
Each line of the log is one write, so that it survives SIGKILL: `begin|end id key attempt time`, by the machine's
monotonic clock.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from typing import Literal, cast

import unistream


async def work(url: str, topic: str, name: str, ordering: str, lease: float, log: str) -> None:
    """Handle messages until SIGTERM."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(what: str, delivery: unistream.Delivery) -> None:
        key = (delivery.key or b"-").decode()
        os.write(file, f"{what} {delivery.id} {key} {delivery.attempt} {time.monotonic()}\n".encode())

    async def handle(delivery: unistream.Delivery) -> None:
        note("begin", delivery)
        await asyncio.sleep(random.random() / 50)
        note("end", delivery)

    async with unistream.connect(url) as client:
        kind = cast('Literal["none", "key"]', ordering)
        group = client.group(name, topic, ordering=kind, lease=lease, max_lease=max(lease, 60.0))
        running = asyncio.create_task(group.run(handle, concurrency=8, max_in_flight=16))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        await asyncio.wait([running])


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], float(sys.argv[5]), sys.argv[6]))
