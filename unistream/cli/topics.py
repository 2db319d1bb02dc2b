"""`unistream topics` and `unistream groups`: what there is, and how far behind."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import typer

from unistream import Client, GroupMissingError, GroupSpec, TopicMissingError, connect
from unistream.cli.output import JsonFlag, UrlOption, interruptible, show_rows

__all__ = ["groups", "topics"]


def topics(url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """List the topics."""

    async def run(stop: object) -> int:
        async with connect(url) as client:
            rows = await overview(client)
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
            rows = await lags(client, topic)
        show_rows(("topic", "group", "ordering", "lag", "exact", "members"), rows, as_json=as_json)
        return 0

    raise typer.Exit(interruptible(run))


async def overview(client: Client) -> list[dict[str, Any]]:
    """The topics and how many groups each has; one that is deleted meanwhile is left out."""
    rows = []
    for topic in await client.topics():
        with suppress(TopicMissingError):
            groups = len(await client.groups(topic.name))
            rows.append(
                {
                    "topic": topic.name,
                    "partitions": topic.partitions,
                    "ordering": topic.ordering,
                    "max_backlog": topic.max_backlog,
                    "groups": groups,
                }
            )
    return rows


async def lags(client: Client, topic: str | None) -> list[dict[str, Any]]:
    """How each group of a topic, or of all topics, stands; one that is deleted meanwhile is left out."""
    rows = []
    for spec in await client.groups(topic):
        with suppress(TopicMissingError, GroupMissingError):
            rows.append(await _row(client, spec))
    return rows


async def _row(client: Client, spec: GroupSpec) -> dict[str, Any]:
    group = client.group(spec.name, spec.topic)
    lag = await group.lag() if client.capabilities.lag else None
    return {
        "topic": spec.topic,
        "group": spec.name,
        "ordering": spec.ordering,
        "lag": lag.messages if lag else None,
        "exact": lag.exact if lag else None,
        "members": len(await group.members()),
    }
