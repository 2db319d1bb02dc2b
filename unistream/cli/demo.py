"""`unistream demo`: real departures through two groups; a member dies, handlers fail, one message is poison."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from unistream import Client, Message, connect
from unistream.cli.demo_member import POISON, Member, MemberPlan, ProcessMember, Report, ThreadMember
from unistream.cli.output import JsonFlag, interruptible, terminal
from unistream.config import scheme_of
from unistream.message import Headers

__all__ = ["demo"]

BOARD = "board"
BILLING = "billing"
LEASE_SECONDS = 3.0
PATIENCE_SECONDS = 120.0
"""How long nothing may happen before the rest counts as lost."""


@dataclass
class Tally:
    """What the members reported."""

    total: int
    handled: dict[str, set[int]] = field(default_factory=lambda: {BOARD: set(), BILLING: set()})
    attempts: Counter[str] = field(default_factory=Counter)
    redelivered: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    by_member: Counter[str] = field(default_factory=Counter)
    dead: set[int] = field(default_factory=set)
    published: int = 0
    killed: str = ""
    # (time of handling, number) per key, in the ordered group.
    order: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def report(self, group: str, line: dict[str, Any]) -> None:
        """Take one line of a member."""
        self.changed.set()
        if line["event"] not in ("handled", "failed"):
            return
        self.attempts[group] += 1
        self.redelivered[group] += line["attempt"] > 1
        if line["event"] == "failed":
            self.failed[group] += 1
            return
        self.by_member[line["who"]] += 1
        if line["number"] not in self.handled[group] and group == BOARD:
            self.order.setdefault(line["key"], []).append((line["at"], line["number"]))
        self.handled[group].add(line["number"])

    def lost(self) -> int:
        """Messages that a group neither handled nor dead-lettered."""
        return sum(
            self.total - len(handled | (self.dead if group == BILLING else set()))
            for group, handled in self.handled.items()
        )

    def out_of_order(self) -> int:
        """Keys whose messages the ordered group did not handle in the order of publishing."""
        return sum(
            [number for _, number in sorted(times)] != sorted(number for _, number in times)
            for times in self.order.values()
        )

    def summary(self) -> str:
        """The last line."""
        return (
            f"published {self.published} · redelivered {sum(self.redelivered.values())} · "
            f"dead-lettered {len(self.dead)} · lost {self.lost()}"
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return {
            "published": self.published,
            "redelivered": sum(self.redelivered.values()),
            "dead_lettered": len(self.dead),
            "lost": self.lost(),
            "keys": len(self.order),
            "keys_out_of_order": self.out_of_order(),
            "killed": self.killed,
            "groups": {
                group: {
                    "handled": len(handled),
                    "redelivered": self.redelivered[group],
                    "failed": self.failed[group],
                }
                for group, handled in self.handled.items()
            },
            "handled_by": dict(sorted(self.by_member.items())),
        }


def demo(
    url: Annotated[str, typer.Argument(help="Broker URL.")] = "memory://demo",
    source: Annotated[
        Path | None, typer.Option("--input", help="CSV file whose first column is the key; default: 5000 departures.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Publish real events and handle them in two groups while a member is killed; nothing may be lost."""
    lines = _read(source)
    raise typer.Exit(interruptible(lambda stop: _demo(stop, url, lines, as_json)))


def _read(source: Path | None) -> list[str]:
    if source is not None and not source.is_file():
        raise typer.BadParameter(f"{source} is no file", param_hint="--input")
    text = source.read_text() if source else (files("unistream.cli") / "data" / "departures.csv").read_text()
    lines = text.splitlines()[1:]
    if not lines:
        raise typer.BadParameter(f"{source} has no lines below its heading", param_hint="--input")
    return lines


async def _demo(stop: asyncio.Event, url: str, lines: list[str], as_json: bool) -> int:
    tally = Tally(len(lines))
    topic = f"demo-{token_hex(4)}"
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(url))
        await client.create_topic(topic, partitions=4, ordering="key")
        await client.create_topic(f"{topic}.dead")
        stack.push_async_callback(_clean_up, client, topic)
        lease = max(LEASE_SECONDS, client.capabilities.lease.least)
        await client.group(BOARD, topic, ordering="key", lease=lease).create()
        await client.group(BILLING, topic, lease=lease).create()
        inspection = client.group("inspection", f"{topic}.dead")
        await inspection.create()
        print(f"{client.capabilities.product}: topic {topic}, 4 partitions, two groups of 2 and 3 members")
        members = [
            *[await _member(url, topic, BOARD, f"board-{number}", "key", lease, tally) for number in (1, 2)],
            *[await _member(url, topic, BILLING, f"billing-{number}", "none", lease, tally) for number in (1, 2, 3)],
        ]
        for member in members:
            stack.push_async_callback(member.stop)
        tasks = [
            asyncio.create_task(_publish(client, topic, lines, tally)),
            asyncio.create_task(_inspect(inspection, tally)),
        ]
        stack.push_async_callback(_cancel, tasks)
        await _watch(stop, tally, members[-1], tasks)
    _print(tally, as_json)
    return 1 if tally.lost() or tally.out_of_order() else 0


async def _member(url: str, topic: str, group: str, name: str, ordering: Any, lease: float, tally: Tally) -> Member:
    plan = MemberPlan(url, topic, group, name, ordering, lease, f"{topic}.dead")
    loop = asyncio.get_running_loop()

    def report(line: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(tally.report, group, line)

    reports: Report = report
    if scheme_of(url) == "memory":
        return ThreadMember(plan, reports)
    return await ProcessMember.start(plan, reports)


async def _publish(client: Client, topic: str, lines: list[str], tally: Tally) -> None:
    poison = len(lines) // 2
    async with client.producer(topic) as producer:
        for first in range(0, len(lines), 250):
            batch = [
                Message(
                    line.encode(),
                    line.partition(",")[0].encode(),
                    _headers(first + n, poison),
                )
                for n, line in enumerate(lines[first : first + 250])
            ]
            for outcome in await producer.publish_many(batch):
                if isinstance(outcome, Exception):
                    raise outcome
            tally.published = producer.stats.confirmed
            tally.changed.set()


def _headers(number: int, poison: int) -> Headers:
    pairs = [("number", str(number).encode())]
    return Headers([*pairs, ("mark", POISON)] if number == poison else pairs)


async def _inspect(inspection: Any, tally: Tally) -> None:
    async with inspection.consumer() as consumer:
        async for delivery in consumer:
            async with delivery:
                tally.dead.add(int(delivery.headers["number"]))
                tally.changed.set()


async def _watch(stop: asyncio.Event, tally: Tally, victim: Member, tasks: list[asyncio.Task[None]]) -> None:
    """Show what happens, kill one member in the middle, and return when all is done, stuck or interrupted."""
    with Live(_table(tally), console=terminal, refresh_per_second=8) if terminal.is_terminal else _Silent() as live:
        while not stop.is_set():
            tally.changed.clear()
            live.update(_table(tally))
            if not tally.killed and len(tally.handled[BILLING]) > tally.total // 3:
                victim.kill()
                tally.killed = victim.name
            for task in tasks:
                if task.done():
                    task.result()
            if tally.published == tally.total and not tally.lost() and tally.killed:
                return
            waiting = [asyncio.ensure_future(tally.changed.wait()), asyncio.ensure_future(stop.wait())]
            done, rest = await asyncio.wait(waiting, timeout=PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for each in rest:
                each.cancel()
            if not done:
                return


class _Silent:
    """Stands in for the live table where there is no terminal."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, table: Table) -> None:
        """Show nothing."""


def _table(tally: Tally) -> Table:
    table = Table("", "handled", "of", "failed", "redelivered", "members", title=f"published {tally.published}")
    for group, handled in tally.handled.items():
        shares = "  ".join(
            f"{name}: {count}{' (killed)' if name == tally.killed else ''}"
            for name, count in sorted(tally.by_member.items())
            if name.startswith(group)
        )
        table.add_row(
            group, str(len(handled)), str(tally.total), str(tally.failed[group]), str(tally.redelivered[group]), shares
        )
    return table


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _clean_up(client: Client, topic: str) -> None:
    await client.delete_topic(topic)
    await client.delete_topic(f"{topic}.dead")


def _print(tally: Tally, as_json: bool) -> None:
    if as_json:
        print(json.dumps(tally.as_dict()))
        return
    for group, handled in tally.handled.items():
        print(
            f"{group}: handled {len(handled)} · failed {tally.failed[group]} · redelivered {tally.redelivered[group]}"
        )
    shares = ", ".join(f"{name} {count}" for name, count in sorted(tally.by_member.items()))
    print(f"handled by {shares}; {tally.killed or 'nobody'} was killed in the middle")
    kept = len(tally.order) - tally.out_of_order()
    print(f"order kept for {kept} of {len(tally.order)} keys in the ordered group")
    print(tally.summary())
    sys.stdout.flush()
