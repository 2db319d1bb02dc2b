"""Knows what happens around a run: the check beforehand, and what must not be left on the broker afterwards.

Everything that the suite creates is named `us-<run>-…`, the run being eight hexadecimal digits. Nothing else is ever
deleted.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass

from unistream.conformance.identity import new_run
from unistream.conformance.runner import on_loop
from unistream.conformance.target import Target
from unistream.errors import UnistreamError

PREFIX = "us-"
OURS = re.compile(r"us-[0-9a-f]{8}-")


class PreflightError(ValueError):
    """The target can't be judged at all; the message says what it lacks."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a target says of itself: broker and version, and its claims in a few words each."""

    driver: str
    product: str
    claims: dict[str, str]


def preflight(target: Target) -> Identity:
    """
    Connect, create a topic and a group, publish and consume one message, delete the topic.

    Raises:
        PreflightError: One of these did not work.
    """
    trial = target.fresh()
    try:
        return on_loop(trial, lambda: _preflight(trial))
    except UnistreamError as error:
        raise PreflightError(f"preflight: {type(error).__name__}: {error}") from error
    finally:
        trial.forget()


async def _preflight(target: Target) -> Identity:
    name = f"{PREFIX}{new_run()}-preflight"
    async with target.connect() as client:
        claims = client.capabilities
        await client.create_topic(name)
        try:
            group = client.group("g", name)
            await group.create()
            async with client.producer(name) as producer, group.consumer() as consumer:
                await producer.publish(b"preflight", timeout=target.pace.patience)
                delivery = await consumer.receive(timeout=target.pace.patience)
                if delivery is None:
                    raise PreflightError(f"preflight: a message did not come within {target.pace.patience} s")
                await delivery.ack()
        finally:
            await client.delete_topic(name)
        return Identity(claims.driver, claims.product, {name: each.summary() for name, each in claims})


def leftovers(target: Target, runs: Iterable[str]) -> list[str]:
    """Return the topics that runs of the suite left behind; on a virtual clock every broker went with its case."""
    prefixes = tuple(f"{PREFIX}{run}-" for run in runs if run)
    if target.virtual or not prefixes:
        return []
    return [name for name in on_loop(target, lambda: _topics(target)) if name.startswith(prefixes)]


def cleanup(target: Target, prefix: str, *, delete: bool = True) -> list[str]:
    """
    Delete the topics that the suite made and whose names begin with `prefix`; return their names.

    Args:
        target: The broker.
        prefix: `us-` for everything, `us-<run>-` for what one case left.
        delete: Only look when False.

    Raises:
        ValueError: The prefix is not one of the suite's.
    """
    if not prefix.startswith(PREFIX):
        raise ValueError(f"the suite's names begin with {PREFIX!r}; {prefix!r} might be somebody else's")

    async def clean() -> list[str]:
        ours = [name for name in await _topics(target) if name.startswith(prefix) and OURS.match(name)]
        if delete:
            async with target.connect() as client:
                for name in ours:
                    await client.delete_topic(name)
        return ours

    return on_loop(target, clean)


async def _topics(target: Target) -> list[str]:
    """Return all topics; a broker that a case restarted may need a moment."""
    loop = asyncio.get_running_loop()
    until = loop.time() + target.pace.patience
    while True:
        try:
            async with target.connect() as client:
                return [topic.name for topic in await client.topics()]
        except UnistreamError as error:
            if not error.retryable or loop.time() > until:
                raise
            await asyncio.sleep(0.2)
