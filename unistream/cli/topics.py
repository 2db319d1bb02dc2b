"""`unistream topics` and `unistream groups`: what there is, and how far behind."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from unistream import Client, connect
from unistream.cli.output import JsonFlag, UrlOption, interruptible, show_rows

__all__ = ["groups", "topics"]


def topics(url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """List the topics."""

    async def run(stop: object) -> int:
        async with connect(url) as client:
            rows = [
                {
                    "topic": topic.name,
                    "partitions": topic.partitions,
                    "ordering": topic.ordering,
                    "max_backlog": topic.max_backlog,
                    "groups": len(await client.groups(topic.name)),
                }
                for topic in await client.topics()
            ]
        show_rows(("topic", "partitions", "ordering", "max_backlog", "groups"), rows, as_json=as_json)
        return 0

    raise typer.Exit(interruptible(run))


def groups(
    topic: Annotated[str | None, typer.Argument(help="Only the groups of this topic.")] = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List the groups with their lag and members."""

    async def run(stop: object) -> int:
        async with connect(url) as client:
            rows = [await _row(client, spec.topic, spec.name, spec.ordering) for spec in await client.groups(topic)]
        show_rows(("topic", "group", "ordering", "lag", "exact", "members"), rows, as_json=as_json)
        return 0

    raise typer.Exit(interruptible(run))


async def _row(client: Client, topic: str, name: str, ordering: str) -> dict[str, Any]:
    group = client.group(name, topic)
    lag = await group.lag() if client.capabilities.lag else None
    return {
        "topic": topic,
        "group": name,
        "ordering": ordering,
        "lag": lag.messages if lag else None,
        "exact": lag.exact if lag else None,
        "members": len(await group.members()),
    }
