"""One measurement in a process of its own, so that memory and CPU time are its own: prints a Result as JSON."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
from dataclasses import asdict


def main() -> None:
    """Arguments as one JSON object on standard input: a URL may hold a password."""
    call = json.loads(sys.stdin.readline())
    side = importlib.import_module(call["side"])
    gc.collect()
    result = asyncio.run(side.run(call["url"], call["workload"], call["messages"], call["size"]))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
