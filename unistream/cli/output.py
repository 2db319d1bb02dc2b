"""What commands print: tables and progress on a terminal, plain lines or JSON when piped."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["JsonFlag", "UrlOption", "interruptible", "show_rows", "terminal"]

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", help="Broker URL; else UNISTREAM_URL, else the profile in unistream.toml.", show_default=False
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]

terminal = Console(stderr=True)
"""Progress goes here, so that results can be piped."""


def show_rows(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print rows: as JSON lines if asked, as a table on a terminal, as tab-separated lines when piped."""
    rows = list(rows)
    if as_json:
        for row in rows:
            print(json.dumps(row, default=str))
    elif sys.stdout.isatty():
        table = Table(*columns)
        for row in rows:
            table.add_row(*(str(row[column]) for column in columns))
        Console().print(table)
    else:
        print("\t".join(columns))
        for row in rows:
            print("\t".join(str(row[column]) for column in columns))


def interruptible(main: Callable[[asyncio.Event], Coroutine[Any, Any, int]]) -> int:
    """
    Run an async command; the first Ctrl-C or SIGTERM sets its event, so that it can drain, the second ends it.

    Returns:
        The command's exit code.
    """

    async def run() -> int:
        stop = asyncio.Event()
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            if stop.is_set():
                task.cancel()
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        return await main(stop)

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
