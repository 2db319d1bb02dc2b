"""`unistream publish TOPIC < lines`: every line a message, confirmed."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from unistream import Confirmation, UnistreamError, connect
from unistream.cli.output import JsonFlag, UrlOption, interruptible, terminal

__all__ = ["publish"]


def publish(
    topic: Annotated[str, typer.Argument(help="Topic to publish to.")],
    url: UrlOption = None,
    key: Annotated[str | None, typer.Option(help="One key for all messages.")] = None,
    key_separator: Annotated[
        str | None, typer.Option(help="What stands between key and value in each line, for example ':'.")
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Create the topic if there is none.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Publish each line of standard input as a message, and wait until all are confirmed."""
    raise typer.Exit(interruptible(lambda stop: _publish(stop, topic, url, key, key_separator, create, as_json)))


async def _publish(
    stop: asyncio.Event,
    topic: str,
    url: str | None,
    key: str | None,
    separator: str | None,
    create: bool,
    as_json: bool,
) -> int:
    started = time.monotonic()
    failures: list[UnistreamError] = []
    loop = asyncio.get_running_loop()
    async with connect(url) as client:
        if create:
            await client.create_topic(topic)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
            bar = progress.add_task(topic, total=None)
            async with client.producer(topic) as producer:
                pending: list[Confirmation] = []
                while not stop.is_set() and (lines := await loop.run_in_executor(None, _read)):
                    for line in lines:
                        name, value = _split(line, key, separator)
                        pending.append(await producer.submit(value, key=name))
                    pending = [one for one in pending if not _looked_at(one, failures)]
                    progress.update(bar, completed=producer.stats.confirmed)
                for one in pending:
                    try:
                        await one.result()
                    except UnistreamError as failure:
                        failures.append(failure)
                progress.update(bar, completed=producer.stats.confirmed, total=producer.stats.published)
                stats = producer.stats
    seconds = time.monotonic() - started
    rate = stats.confirmed / seconds if seconds else 0.0
    if as_json:
        counts = {"confirmed": stats.confirmed, "failed": stats.failed, "unknown": stats.unknown}
        print(json.dumps({"topic": topic, **counts, "seconds": round(seconds, 3)}))
    else:
        print(f"confirmed {stats.confirmed} · failed {stats.failed} · unknown {stats.unknown} · {rate:.0f} messages/s")
    for error in failures[:5]:
        sys.stderr.write(f"unistream: {error}\n")
    return 1 if failures else 0


def _read() -> list[bytes]:
    """Some lines of standard input, without their ends; empty at the end."""
    return [line.rstrip(b"\r\n") for line in sys.stdin.buffer.readlines(64 * 1024)]


def _split(line: bytes, key: str | None, separator: str | None) -> tuple[bytes | None, bytes]:
    if separator is None:
        return None if key is None else key.encode(), line
    name, found, value = line.partition(separator.encode())
    return (name, value) if found else (None, line)


def _looked_at(confirmation: Confirmation, failures: list[UnistreamError]) -> bool:
    """Whether it is decided; a failure is kept."""
    if (failure := confirmation.failure()) is not None:
        failures.append(failure)
    return confirmation.done()
