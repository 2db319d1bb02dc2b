"""`python -m benchmarks.scale URL`: cost per message from 10³ to 10⁶, memory with a backlog, and what idling costs.

Figures are ratios to the smallest run, so that a loaded machine does not matter much.
"""

from __future__ import annotations

import asyncio
import json
import resource
import secrets
import subprocess
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import unistream

SIZES = (1_000, 10_000, 100_000, 1_000_000)
IDLE_SECONDS = 10.0
BODY = b"x" * 100


def rss_mib() -> float:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


async def through(url: str, messages: int) -> dict[str, float]:
    """Publish a backlog, then drain it: microseconds of CPU per message for each, and how far memory rose."""
    topic = f"scale-{secrets.token_hex(4)}"
    async with unistream.connect(url) as client:
        await client.create_topic(topic)
        group = client.group("drain", topic)
        await group.create()
        try:
            cpu = time.process_time()
            async with client.producer(topic) as producer:
                for first in range(0, messages, 1000):
                    await producer.publish_many([BODY] * min(1000, messages - first))
                confirmed = producer.stats.confirmed
            publishing = time.process_time() - cpu
            before = rss_mib()
            highest = before
            cpu = time.process_time()
            left = messages
            async with group.consumer(max_in_flight=1000) as consumer:
                while left:
                    deliveries = await consumer.receive_many(100)
                    for delivery in deliveries:
                        await delivery.ack()
                    left -= len(deliveries)
                    if left % 10_000 < 100:
                        highest = max(highest, rss_mib())
            draining = time.process_time() - cpu
        finally:
            await client.delete_topic(topic)
    assert confirmed == messages
    return {
        "publish_us": publishing / messages * 1e6,
        "consume_us": draining / messages * 1e6,
        "grown_mib": highest - before,
    }


async def stalled(url: str, messages: int) -> dict[str, float]:
    """A handler that never returns, with a backlog waiting: how far the consumer's process grows (BPC-2)."""
    topic = f"scale-{secrets.token_hex(4)}"
    async with unistream.connect(url) as client:
        await client.create_topic(topic)
        group = client.group("stalled", topic)
        await group.create()
        try:
            async with client.producer(topic) as producer:
                for first in range(0, messages, 1000):
                    await producer.publish_many([bytes(1024)] * min(1000, messages - first))
            before = rss_mib()
            async with group.consumer() as consumer:
                first_one = await consumer.receive(10)
                assert first_one is not None
                await asyncio.sleep(3)
                return {"grown_mib": rss_mib() - before}
        finally:
            await client.delete_topic(topic)


async def idle(url: str) -> dict[str, float]:
    """A consumer with nothing to do: its share of a core."""
    topic = f"scale-{secrets.token_hex(4)}"
    async with unistream.connect(url) as client:
        await client.create_topic(topic)
        try:
            async with client.group("idle", topic).consumer() as consumer:
                await consumer.receive(1)
                cpu, wall = time.process_time(), time.perf_counter()
                await consumer.receive(IDLE_SECONDS)
                return {"share": (time.process_time() - cpu) / (time.perf_counter() - wall)}
        finally:
            await client.delete_topic(topic)


def alone(what: str, url: str, messages: int = 0) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    call = json.dumps({"what": what, "url": url, "messages": messages})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale"], input=call, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main(
    url: Annotated[str, typer.Argument(help="Broker URL.")] = "memory://scale",
    largest: Annotated[int, typer.Option(help="The largest run.")] = SIZES[-1],
) -> None:
    """Measure how cost and memory grow."""
    table = Table("messages", "publish µs", "consume µs", "ratio to the first", "grown while draining, MiB")
    first = None
    for messages in [size for size in SIZES if size <= largest]:
        figures = alone("through", url, messages)
        total = figures["publish_us"] + figures["consume_us"]
        first = first or total
        table.add_row(
            f"{messages}",
            f"{figures['publish_us']:.1f}",
            f"{figures['consume_us']:.1f}",
            f"{total / first:.2f}",
            f"{figures['grown_mib']:.1f}",
        )
    Console().print(table)
    grown = alone("stalled", url, 100_000)["grown_mib"]
    print(f"stalled handler, 100 000 × 1 KiB waiting: the process grew by {grown:.1f} MiB")
    print(f"idle consumer: {alone('idle', url)['share']:.2%} of a core")


if __name__ == "__main__":
    if sys.stdin.isatty() or len(sys.argv) > 1:
        typer.run(main)
    else:
        asked = json.loads(sys.stdin.read())
        work = {"through": through, "stalled": stalled, "idle": idle}[asked["what"]]
        arguments = [asked["url"], asked["messages"]] if asked["messages"] else [asked["url"]]
        print(json.dumps(asyncio.run(work(*arguments))))
