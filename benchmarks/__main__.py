"""`python -m benchmarks [BACKEND…]`: alternating rounds, medians, ratios; a table, and JSON with `--json FILE`.

A backend is measured where its URL is in the environment (UNISTREAM_REDIS_URL and so on); memory always.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import MEMORY_WORKLOADS, WORKLOADS, Result

BACKENDS = ("memory", "redis", "kafka", "rabbitmq", "nats")
PEERS = ("faststream", "kombu", "aio_pika", "confluent_kafka")
MESSAGES = {"publish-sequential": 2000, "latency": 1000}


def url_of(backend: str) -> str | None:
    """Where a backend is."""
    return "memory://bench" if backend == "memory" else os.environ.get(f"UNISTREAM_{backend.upper()}_URL")


def measure(side: str, url: str, workload: str, messages: int, size: int) -> Result:
    """One measurement in a process of its own."""
    call = {"side": side, "url": url, "workload": workload, "messages": messages, "size": size}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker"], input=json.dumps(call), capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        sys.exit(f"{side} {workload} failed:\n{done.stderr}")
    return Result(**json.loads(done.stdout))


def compare(
    other: str, backend: str, url: str, workload: str, messages: int, size: int, rounds: int, tick: Any
) -> dict[str, Any]:
    """Alternate the two sides, and compare their medians; ratios above 1 favour unistream."""
    ours: list[Result] = []
    bare: list[Result] = []
    for _ in range(rounds):
        bare.append(measure(other, url, workload, messages, size))
        ours.append(measure("benchmarks.portable", url, workload, messages, size))
        tick()

    def median(results: list[Result], name: str) -> float:
        return statistics.median(getattr(result, name) for result in results)

    row: dict[str, Any] = {"backend": backend, "workload": workload, "bytes": size, "messages": messages}
    for side, results in (("bare", bare), ("unistream", ours)):
        row[side] = {
            "messages_per_second": round(messages / median(results, "seconds"), 1),
            "us_per_message": round(median(results, "seconds") / messages * 1e6, 2),
            "cpu_us_per_message": round(median(results, "cpu_seconds") / messages * 1e6, 2),
            "peak_mib": round(median(results, "peak_mib"), 1),
        }
        if workload == "latency":
            row[side]["p50_us"] = round(statistics.median(result.quantile(0.5) for result in results) * 1e6, 1)
            row[side]["p99_us"] = round(statistics.median(result.quantile(0.99) for result in results) * 1e6, 1)
    row["ratio"] = round(median(bare, "seconds") / median(ours, "seconds"), 3)
    row["cpu_ratio"] = round(median(bare, "cpu_seconds") / median(ours, "cpu_seconds"), 3)
    if workload == "latency":
        row["ratio"] = round(row["bare"]["p50_us"] / row["unistream"]["p50_us"], 3)
    return row


def _quantiles(side: dict[str, Any]) -> str:
    return f"{side['p50_us']:.0f}/{side['p99_us']:.0f}"


def show(rows: list[dict[str, Any]], other: str) -> None:
    """Print the table."""
    table = Table(
        "backend", "workload", "bytes", f"{other} µs", "unistream µs", "ratio", "CPU ratio", "p50/p99 µs", "peak MiB"
    )
    for row in rows:
        ours, bare = row["unistream"], row["bare"]
        quantiles = f"{_quantiles(ours)} ({_quantiles(bare)})" if "p50_us" in ours else ""
        table.add_row(
            row["backend"],
            row["workload"],
            str(row["bytes"]),
            f"{bare['us_per_message']:.2f}",
            f"{ours['us_per_message']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            quantiles,
            f"{ours['peak_mib']:.0f} ({bare['peak_mib']:.0f})",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(f"ratio = {other} / unistream, with the same confirms and acks: above 1 unistream takes less")
    print(f"in brackets: {other}")


def _workloads(backend: str, chosen: str | None) -> list[str]:
    offered = MEMORY_WORKLOADS if backend == "memory" else WORKLOADS
    return [name for name in offered if chosen is None or name in chosen.split(",")]


def _peer(name: str) -> Any:
    if name not in PEERS:
        raise typer.BadParameter(f"--peer {name}: give one of {', '.join(PEERS)}")
    try:
        return importlib.import_module(f"benchmarks.peers.{name}")
    except ImportError as error:
        raise typer.BadParameter(f"--peer {name}: {error}; python -m pip install --group peers") from error


def main(
    backends: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(BACKENDS)}; default: all that are up.")
    ] = None,
    messages: Annotated[int, typer.Option(help="Messages per run; fewer for one-at-a-time workloads.")] = 20_000,
    rounds: Annotated[int, typer.Option(help="Alternating rounds.")] = 5,
    sizes: Annotated[str, typer.Option(help="Body sizes in bytes.")] = "100,1024",
    workloads: Annotated[str | None, typer.Option(help="Which workloads; default: all.", show_default=False)] = None,
    peer: Annotated[str | None, typer.Option(help=f"Compare with this library instead: {', '.join(PEERS)}.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure unistream against the bare clients."""
    chosen = [name for name in backends or BACKENDS if url_of(name)]
    for name in backends or []:
        if name not in BACKENDS or not url_of(name):
            raise typer.BadParameter(f"{name}: give one of {', '.join(BACKENDS)}, with its URL in the environment")
    if peer:
        workloads = workloads or "publish-sequential,publish-window,consume-batch,consume-iterate"
        offered = _peer(peer).BACKENDS
        chosen = [name for name in chosen if name in offered]
    plan = [
        (name, workload, size)
        for name in chosen
        for workload in _workloads(name, workloads)
        for size in map(int, sizes.split(","))
    ]
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("measuring", total=len(plan) * rounds)
        for name, workload, size in plan:
            url = url_of(name)
            assert url is not None
            count = min(messages, MESSAGES.get(workload, messages))
            other = f"benchmarks.peers.{peer}" if peer else f"benchmarks.bare.{name}"
            rows.append(compare(other, name, url, workload, count, size, rounds, lambda: progress.advance(bar)))
    show(rows, peer or "bare")
    if out is not None:
        host = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
        out.write_text(json.dumps({"schema": 1, "host": host, "rounds": rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
