"""What one measurement is, and taking it: wall and CPU time of a block, and the process's peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

WINDOW = 256
WORKLOADS = ("publish-sequential", "publish-window", "consume-batch", "consume-iterate", "latency")
MEMORY_WORKLOADS = ("through", "through-batch", "latency")
"""In one process a message's whole way is compared with a put and a get of asyncio.Queue."""
BATCH = 100
LATENCY_RATE = 500


@dataclass
class Result:
    """One run of one workload; latencies in seconds, one per message."""

    messages: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure a block; preparations stay outside."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.seconds = time.perf_counter() - wall
        self.cpu_seconds = time.process_time() - cpu
        self.peak_mib = peak_mib()

    def quantile(self, share: float) -> float:
        """A quantile of the latencies, in seconds."""
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def peak_mib() -> float:
    """Peak resident memory of this process; getrusage would count the parent's from before exec."""
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def body(size: int) -> bytes:
    """A value whose first bytes are the time of making it, for end-to-end latency."""
    return b"%020d" % time.perf_counter_ns() + b"x" * (size - 20)


def age(value: bytes) -> float:
    """Seconds since `body` made this value, in the same process."""
    return (time.perf_counter_ns() - int(value[:20])) / 1e9
