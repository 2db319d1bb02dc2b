"""`unistream consume TOPIC --group G`: print messages, and ack what was printed."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Annotated

import typer

from unistream import Delivery, connect
from unistream.cli.output import JsonFlag, UrlOption, interruptible, terminal
from unistream.driver.types import Ordering

__all__ = ["consume"]


def consume(
    topic: Annotated[str, typer.Argument(help="Topic to consume.")],
    group: Annotated[str, typer.Option(help="Group to join; it is created if there is none.")],
    url: UrlOption = None,
    start: Annotated[str, typer.Option(help="Where a new group begins: latest or earliest.")] = "latest",
    ordering: Annotated[Ordering, typer.Option(help="Of the group; key: one message per key at a time.")] = "none",
    count: Annotated[int | None, typer.Option(help="End after so many messages.")] = None,
    idle: Annotated[float | None, typer.Option(help="End when none came for so many seconds.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print each message of a group on a line and ack it; Ctrl-C drains and leaves."""
    raise typer.Exit(
        interruptible(lambda stop: _consume(stop, topic, group, url, start, ordering, count, idle, as_json))
    )


async def _consume(
    stop: asyncio.Event,
    topic: str,
    group: str,
    url: str | None,
    start: str,
    ordering: Ordering,
    count: int | None,
    idle: float | None,
    as_json: bool,
) -> int:
    printed = 0
    async with connect(url) as client:
        members = client.group(group, topic, start=start, ordering=ordering)
        async with members.consumer() as consumer:
            stopping = asyncio.ensure_future(stop.wait())
            while not stop.is_set() and (count is None or printed < count):
                receiving = asyncio.ensure_future(consumer.receive(idle))
                await asyncio.wait([receiving, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    receiving.cancel()
                    break
                delivery = receiving.result()
                if delivery is None:
                    break
                sys.stdout.write(_line(delivery, as_json) + "\n")
                sys.stdout.flush()
                await delivery.ack()
                printed += 1
            stopping.cancel()
            report = await consumer.close(drain=5)
    terminal.print(f"handled {report.handled} · returned {report.returned} · abandoned {report.abandoned}")
    return 0


def _line(delivery: Delivery, as_json: bool) -> str:
    if not as_json:
        return delivery.value.decode("utf-8", "backslashreplace")
    return json.dumps(
        {
            "id": delivery.id,
            "key": _text(delivery.key),
            "value": _text(delivery.value),
            "headers": [[name, _text(value)] for name, value in delivery.headers.items()],
            "partition": delivery.partition,
            "position": delivery.position,
            "attempt": delivery.attempt,
            "published_at": delivery.published_at,
        },
        default=str,
    )


def _text(value: bytes | None) -> str | dict[str, str] | None:
    """Bytes as text, or as `{"base64": …}` where they are none."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
