"""Cases `cap.*`, `cfg.*`, `err.*`: claims that are complete and true, clear errors, secrets that stay secret."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import fields
from inspect import isclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch
from urllib.parse import urlsplit

import unistream
from unistream import errors
from unistream.capabilities import Capabilities, Level
from unistream.conformance.registry import Tier, case
from unistream.conformance.trial import CheckError, ImpossibleError, Trial
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    ClosedError,
    ConfigError,
    UnistreamError,
    UnknownSchemeError,
    UnsupportedError,
)

CAPABILITIES = {field.name for field in fields(Capabilities)} - {"driver", "product"}


@case("cap.complete", rules=("CAP-3",), tier=Tier.SMOKE)
async def complete(trial: Trial) -> None:
    """Every capability is answered with a level, and the backend says what it is."""
    offered = dict(trial.claims)
    trial.equal(set(offered), CAPABILITIES, "CAP-3", "capabilities")
    for name, capability in offered.items():
        trial.that(isinstance(capability.level, Level), "CAP-3", f"a level for {name}", capability.level)
    trial.that(bool(trial.claims.product), "CAP-3", "a product and version", trial.claims.product)
    kind = trial.claims.durability.kind
    trial.that(kind in ("memory", "process_crash", "fsync", "replicated"), "PUB-1", "a durability", kind)
    trial.that(trial.claims.lease.recover_within >= 0, "GRP-4", "a bound", trial.claims.lease.recover_within)


@case("cap.refused", rules=("CAP-2",), tier=Tier.SMOKE)
async def refused(trial: Trial) -> None:
    """A call that needs a missing capability raises UnsupportedError, naming it, before anything is touched."""
    topic = await trial.topic()
    plain = trial.client.group("plain", topic)
    await plain.create()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "ordering": lambda: trial.client.create_topic(topic + "-ordered", ordering="key"),
        "seek": lambda: plain.seek("earliest"),
        "lag": plain.lag,
        "retention": lambda: trial.client.create_topic(topic + "-kept", retention=unistream.Retention(max_messages=5)),
        "max_backlog": lambda: trial.client.create_topic(topic + "-bounded", max_backlog=5),
    }
    for name, call in calls.items():
        if not dict(trial.claims)[name]:
            error = await trial.raises(UnsupportedError, call(), "CAP-2")
            trial.equal(getattr(error, "capability", None), name, "CAP-2", "capability named")
    there = [spec.name for spec in await trial.client.topics() if spec.name.startswith(topic + "-")]
    trial.equal(there, [], "CAP-2", "topics made on the way")


@case("cap.limits-true", rules=("CAP-3", "GRP-4", "DEL-6"), sometimes=("died", "redelivered"))
async def limits_true(trial: Trial) -> None:
    """The least lease and `recover_within` are as declared: a dead member's message comes in time."""
    topic = await trial.topic()
    least = trial.claims.lease.least
    group = await trial.group(topic, lease=max(least, 0.2), max_lease=3600.0)
    producer = await trial.producer(topic)
    member, line = await trial.doomed(group)
    await producer.publish()
    held = await trial.next(member)
    held.renewed()
    trial.kill(member, line)
    loop = asyncio.get_running_loop()
    began = loop.time()
    lease = max(least, 0.2)
    allowed = lease + trial.claims.lease.recover_within + trial.pace.slack
    again = await trial.next(await trial.member(group), "GRP-4", timeout=allowed)
    took = loop.time() - began
    trial.that(took <= allowed, "GRP-4", f"a redelivery within {allowed:.2f} s", f"{took:.2f} s")
    await again.ack()


@case("cfg.require", rules=("CAP-1", "END-6"), tier=Tier.SMOKE)
async def require(trial: Trial) -> None:
    """`require` fails at open if a need is not met, and is silent if all are."""
    for name, capability in trial.claims:
        if capability.level is Level.NONE:
            await trial.raises(UnsupportedError, trial.open(require={name: True}), "CAP-1")
    offered = [name for name, capability in trial.claims if capability and capability.satisfies(True)]
    await trial.open(require=dict.fromkeys(offered, True))
    error = await trial.raises(ConfigError, trial.open(require={"orderin": "key"}), "END-6")
    trial.that("ordering" in str(error), "END-6", "a suggestion in the message", error)


@case("cfg.unknown-option", rules=("END-6",), tier=Tier.SMOKE)
async def unknown_option(trial: Trial) -> None:
    """A misspelt option in the URL is refused before anything is contacted, with its name in the message."""
    url = trial.target.url
    wrong = f"{url}{'&' if '?' in url else '?'}conect_timeout=1"
    try:
        unistream.connect(wrong, driver=trial.target.driver_class())
    except ConfigError as error:
        trial.that("conect_timeout" in str(error), "END-6", "the option named", error)
    else:
        trial.that(False, "END-6", "ConfigError", "it was accepted")


@case("err.url", rules=("END-6",), tier=Tier.SMOKE)
async def url(trial: Trial) -> None:
    """A misspelt scheme is an error that names one that is near."""
    scheme, _, rest = trial.target.url.partition("://")
    try:
        unistream.connect(f"{scheme}x://{rest}")
    except UnknownSchemeError as error:
        trial.that(scheme in str(error), "END-6", f"{scheme} suggested", error)
    else:
        trial.that(False, "END-6", "UnknownSchemeError", "it was accepted")


@case("err.taxonomy", rules=("END-5",), tier=Tier.SMOKE)
async def taxonomy(trial: Trial) -> None:
    """Every error is of one tree and says whether trying again may help."""
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isclass(kind) and issubclass(kind, Exception) and name != "Reject":
            trial.that(issubclass(kind, UnistreamError), "END-5", f"{name} in the tree", kind.__mro__)
            retryable = getattr(kind, "retryable", None)
            trial.that(isinstance(retryable, bool), "END-5", f"{name}.retryable", retryable)


@case("err.redacted", rules=("END-5",), tier=Tier.SMOKE, facilities=("password",))
async def redacted(trial: Trial) -> None:
    """The password of the URL appears in no repr, error or log line."""
    scheme, _, rest = trial.target.url.partition("://")
    host = rest.rpartition("@")[2]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("unistream").addHandler(handler)
    try:
        client = unistream.connect(f"{scheme}://user:geh31m@{host}", driver=trial.target.driver_class())
        lines.append(repr(client))
        try:
            async with client:
                lines.append(repr(await client.health()))
        except UnistreamError as error:
            lines += [str(error), repr(error)]
    finally:
        logging.getLogger("unistream").removeHandler(handler)
    leaks = [line for line in lines if "geh31m" in line]
    trial.equal(leaks, [], "END-5", "lines with the password")


@case("err.auth", rules=("END-5", "END-2"), facilities=("password",), sometimes=("refused",))
async def auth(trial: Trial) -> None:
    """A wrong password is an AccessError within seconds, which names the user and not the password."""
    scheme, _, rest = trial.target.url.partition("://")
    url = f"{scheme}://nobody-of-ours:geh31m@{rest.rpartition('@')[2]}"
    opening = _open_and_list(unistream.connect(url, driver=trial.target.driver_class()))
    try:
        await trial.within(5.0 + trial.pace.slack, opening, "END-2", "an answer to a wrong password")
    except AccessError as error:
        trial.tally("refused")
        trial.that("nobody-of-ours" in str(error), "END-5", "the user named", error)
        trial.that("geh31m" not in f"{error} {error!r}", "END-5", "the password kept secret", error)
        trial.that(not error.retryable, "END-5", "an error that is not retryable", error.retryable)
    except UnistreamError as error:
        if "@" not in rest:
            raise ImpossibleError(f"nothing says that this server asks for a password; it answered: {error}") from error
        raise CheckError("END-5", "AccessError", f"{type(error).__name__}: {error}") from error
    else:
        raise ImpossibleError("this server lets everybody in, whatever the user and password")


async def _open_and_list(client: unistream.Client) -> None:
    async with client:
        await client.topics()


@case("err.down", rules=("END-3", "END-5"), tier=Tier.SMOKE, facilities=("socket",), sometimes=("refused",))
async def down(trial: Trial) -> None:
    """Where nobody listens, connecting is a retryable error at once that names the address, with its cause."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parts = urlsplit(trial.target.url)
    user = parts.netloc.rpartition("@")[0]
    address = f"127.0.0.1:{port}"
    url = parts._replace(netloc=f"{user}@{address}" if user else address).geturl()
    opening = _open_and_list(unistream.connect(url, driver=trial.target.driver_class()))
    error = await trial.raises(BrokerUnavailableError, opening, "END-3")
    trial.tally("refused")
    trial.that(address in str(error), "END-5", f"{address} in the message", error)
    trial.that(error.__cause__ is not None, "END-5", "the client's own error as the cause", error)
    trial.that(bool(getattr(error, "retryable", False)), "END-5", "a retryable error", error)


@case("cfg.swap", rules=("END-6",), tier=Tier.SMOKE, sometimes=("connected", "delivered"))
async def swap(trial: Trial) -> None:
    """A program that knows nothing of the broker but its URL, from the environment or a file, works."""
    topic = await trial.topic()
    judged = trial.target.driver_class()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "unistream.toml"
        file.write_text(f'[profile.default]\nurl = "{trial.target.url}"\n', encoding="utf-8")
        for settings in ({"UNISTREAM_URL": trial.target.url}, {"UNISTREAM_CONFIG": str(file)}):
            # Without a pause in between: other cases run beside this one, in the same environment.
            with patch.dict(os.environ, settings):
                for name in {"UNISTREAM_URL", "UNISTREAM_CONFIG", "UNISTREAM_PROFILE"} - settings.keys():
                    os.environ.pop(name, None)
                try:
                    found = unistream.connect()
                    # The driver under judgement is the one found by the URL, and whatever a saboteur put over it.
                    client = unistream.connect(driver=judged)
                except ConfigError as error:
                    trial.that(False, "END-6", f"a client by {', '.join(settings)} alone", error)
            async with found:
                trial.tally("connected")
            async with client:
                group = client.group("g", topic)
                await group.create()
                async with client.producer(topic) as producer, group.consumer() as consumer:
                    await producer.publish(b"x", key="k")
                    delivery = await consumer.receive(trial.pace.patience)
                    trial.that(delivery is not None, "END-6", "a delivery", "none")
                    assert delivery is not None
                    await delivery.ack()
            trial.tally("delivered")


@case("err.before-entering", rules=("END-6",), tier=Tier.SMOKE)
async def before_entering(trial: Trial) -> None:
    """Using a client that was not entered, or is closed, is a clear error."""
    client = trial.target.connect()
    await trial.raises(ClosedError, client.create_topic("x"), "END-6")
    async with client:
        await client.topics()
    await trial.raises(ClosedError, client.topics(), "END-6")


@case("err.max-attempts-needs-a-place", rules=("DEL-3", "END-6"), tier=Tier.SMOKE)
async def max_attempts_needs_a_place(trial: Trial) -> None:
    """`max_attempts` without a dead letter topic is a ConfigError unless the user said DROP."""
    topic = await trial.topic()
    try:
        trial.client.group("g", topic, retry=unistream.Retry(max_attempts=3))
    except ConfigError as error:
        trial.that("dead_letter" in str(error), "END-6", "dead_letter named", error)
    else:
        trial.that(False, "DEL-3", "ConfigError", "it was accepted")
    trial.client.group("g", topic, retry=unistream.Retry(max_attempts=3), dead_letter=unistream.DROP)


@case("err.health", rules=("END-3",), tier=Tier.SMOKE)
async def health(trial: Trial) -> None:
    """A client that works says so, and one that is closed does not."""
    client = await trial.open()
    found = await client.health()
    trial.that(found.ok and found.state == "connected", "END-3", "connected", found)
    await client.close()
    found = await client.health()
    trial.that(not found.ok, "END-3", "not ok once closed", found)
