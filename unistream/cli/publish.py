"""`unistream publish TOPIC < lines`: every line a message, confirmed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from unistream import Confirmation, PublishError, UnistreamError, connect
from unistream.cli.output import JsonFlag, UrlOption, interruptible, terminal

__all__ = ["publish"]

CHUNK = 64 * 1024
"""Bytes that are read at once."""


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
    async with connect(url) as client:
        if create:
            await client.create_topic(topic)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
            bar = progress.add_task(topic, total=None)
            async with client.producer(topic) as producer:
                pending: list[Confirmation] = []
                async for lines in _lines(stop):
                    for line in lines:
                        name, value = _split(line, key, separator)
                        try:
                            pending.append(await producer.submit(value, key=name))
                        except PublishError as failure:
                            failures.append(failure)
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


async def _lines(stop: asyncio.Event) -> AsyncIterator[list[bytes]]:
    """The lines of standard input, as they come, without their ends; until its end, or `stop`."""
    stopping = asyncio.ensure_future(stop.wait())
    rest = b""
    try:
        while True:
            reading = _read()
            either: list[asyncio.Future[Any]] = [reading, stopping]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                return
            chunk = reading.result()
            *lines, rest = (rest + chunk).split(b"\n")
            if not chunk and rest:
                lines, rest = [rest], b""
            if lines:
                yield [line.removesuffix(b"\r") for line in lines]
            if not chunk:
                return
    finally:
        stopping.cancel()


def _read() -> asyncio.Future[bytes]:
    """Some bytes of standard input, on a thread that nobody has to wait for when the command ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes] = loop.create_future()

    def settle(chunk: bytes, error: OSError | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(chunk)
        else:
            done.set_exception(error)

    def read() -> None:
        chunk, failed = b"", None
        try:
            # Not by the buffered file, whose lock a thread that waits would hold when the interpreter ends.
            chunk = os.read(sys.stdin.fileno(), CHUNK)
        except OSError as error:
            failed = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, chunk, failed)

    threading.Thread(target=read, daemon=True, name="unistream-stdin").start()
    return done


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
