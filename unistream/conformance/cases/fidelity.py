"""Cases `fid.*`: what was published is delivered, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from unistream.conformance.registry import Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import NotPublishedError, TooLargeError, UnistreamError
from unistream.message import Headers, HeadersLike

RULE = "GRP-1"


async def _echo(
    trial: Trial, messages: Sequence[tuple[bytes, bytes | None, HeadersLike]]
) -> list[tuple[bytes, bytes | None, Headers]]:
    """Publish each message bare, without the suite's identity, and return what one member receives."""
    topic = await trial.topic()
    group = await trial.group(topic)
    got = []
    async with trial.client.producer(topic) as producer, group.consumer() as consumer:
        for value, key, headers in messages:
            await producer.publish(value, key=key, headers=headers)
        for _ in messages:
            delivery = await consumer.receive(trial.pace.patience)
            trial.that(delivery is not None, RULE, "a delivery", delivery)
            if delivery is not None:
                got.append((delivery.value, delivery.key, delivery.headers))
                await delivery.ack()
                trial.tally("echoed")
    return got


async def _same(trial: Trial, messages: Sequence[tuple[bytes, bytes | None, HeadersLike]]) -> None:
    got = await _echo(trial, messages)
    for (value, key, headers), (got_value, got_key, got_headers) in zip(messages, got, strict=True):
        trial.that(got_value == value, RULE, f"value {value[:60]!r} ({len(value)} bytes)", repr(got_value[:60]))
        trial.equal(got_key, key, RULE, "key")
        trial.equal(got_headers.items(), Headers(headers).items(), RULE, "headers")


@case("fid.value-binary", rules=(RULE,), tier=Tier.SMOKE, sometimes=("echoed",))
async def value_binary(trial: Trial) -> None:
    """Every byte value, NUL, line ends and protocol text come back as they were."""
    texts = [bytes(range(256)), b"\x00", b"\r\n", b"*1\r\n$4\r\nPING\r\n", b"\xff\xfe\xfd", b"a" * 100_000]
    await _same(trial, [(text, None, {}) for text in texts])


@case("fid.value-empty", rules=(RULE,), tier=Tier.SMOKE, sometimes=("echoed",))
async def value_empty(trial: Trial) -> None:
    """An empty value is delivered, and is empty."""
    await _same(trial, [(b"", None, {}), (b"", b"k", {"a": b""})])


@case("fid.value-at-limit", rules=(RULE, "PUB-2"), sometimes=("echoed",))
async def value_at_limit(trial: Trial) -> None:
    """A value as large as the backend takes passes; one above it is TooLargeError, surely not stored."""
    limit = min(int(min(trial.claims.max_message_bytes.limit, 1 << 40)), 4 * 1024 * 1024)
    await _same(trial, [(b"x" * (limit * 9 // 10), None, {})])
    if limit < trial.claims.max_message_bytes.limit:
        return
    topic = await trial.topic()
    async with trial.client.producer(topic) as producer:
        error = await trial.raises(TooLargeError, producer.publish(b"x" * (limit + 1)), "PUB-2")
        trial.equal(getattr(error, "stored", None), "no", "PUB-2", "stored")
        await producer.publish(b"small")


@case("fid.too-large", rules=("PUB-2",), sometimes=("unpublished",))
async def too_large(trial: Trial) -> None:
    """A message above the declared limit is refused as TooLargeError, and the producer works on."""
    limit = trial.claims.max_message_bytes.limit
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, max_unconfirmed_bytes=1 << 31)
    size = int(limit) + 1 if limit <= 64 * 1024 * 1024 else 0
    if not size:
        trial.tally("unpublished")  # no limit that a test could reach
    else:
        error = await trial.raises(NotPublishedError, producer.publish(size=size), "PUB-2")
        trial.that(isinstance(error, TooLargeError), "PUB-2", "TooLargeError", error)
    await producer.publish()
    await trial.drain(group)


@case("fid.key", rules=(RULE,), tier=Tier.SMOKE, sometimes=("echoed",))
async def key(trial: Trial) -> None:
    """Keys are bytes, any bytes; no key and the empty key are different."""
    keys = [None, b"", b"\x00\xff", b"a b", "\u00fcml\u00e4ut".encode(), b"k" * 200]
    await _same(trial, [(b"v", each, {}) for each in keys])


@case("fid.header-values", rules=(RULE,), tier=Tier.SMOKE, sometimes=("echoed",))
async def header_values(trial: Trial) -> None:
    """Header values are bytes: emoji, binary, empty, with spaces at both ends, line ends, 4 kB."""
    values = {
        "emoji": "\U0001f600 e\u0301 \u05d0".encode(),
        "binary": bytes(range(256)),
        "empty": b"",
        "spaces": b"  both ends  ",
        "lines": b"a\r\nb: c\r\n\r\nd\x00e",
        "long": b"x" * 4096,
    }
    await _same(trial, [(b"v", None, {name: value}) for name, value in values.items()] + [(b"v", None, values)])


@case("fid.header-names", rules=(RULE,), sometimes=("echoed",))
async def header_names(trial: Trial) -> None:
    """Header names keep their case and may be any text, or are refused before anything is sent."""
    await _same(trial, [(b"v", None, [("X-a", b"1"), ("x-A", b"2")])])
    for name in ("\u00fcml\u00e4ut", "with space", "a:b", "line\nend"):
        try:
            await _same(trial, [(b"v", None, {name: b"1"})])
        except UnistreamError as error:
            trial.equal(getattr(error, "stored", "no"), "no", "PUB-2", f"stored, for the header name {name!r},")


@case("fid.header-repeat", rules=(RULE,), sometimes=("echoed",))
async def header_repeat(trial: Trial) -> None:
    """A header may repeat; all values come back in order, between the others."""
    await _same(trial, [(b"v", None, [("a", b"2"), ("b", b"x"), ("a", b"1"), ("a", b"2")])])


@case("fid.header-many", rules=(RULE,), sometimes=("echoed",))
async def header_many(trial: Trial) -> None:
    """Sixty-four headers of 1 kB come back."""
    await _same(trial, [(b"v", None, {f"name-{number}": bytes([number]) * 1024 for number in range(64)})])


@case("fid.reserved-hidden", rules=("PUB-2", RULE), tier=Tier.SMOKE, sometimes=("echoed",))
async def reserved_hidden(trial: Trial) -> None:
    """Headers of the library's own are not visible, and publishing one is an error."""
    [(_, _, headers)] = await _echo(trial, [(b"v", b"k", {"mine": b"1"})])
    trial.equal([name for name in headers if name.startswith("unistream-")], [], RULE, "reserved headers seen")
    topic = await trial.topic()
    async with trial.client.producer(topic) as producer:
        error = await trial.raises(Exception, producer.publish(b"v", headers={"unistream-id": b"forged"}), "PUB-2")
        trial.that(isinstance(error, UnistreamError | ValueError), "PUB-2", "a clear error", error)


@case("fid.id", rules=("PUB-3",), sometimes=("delivered",))
async def given_id(trial: Trial) -> None:
    """An id that was given comes back; one that was not is made, and differs from all others."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    ids = [(await producer.publish(id=id_))[1].id for id_ in ("a-given-id", "x" * 128, None, None)]
    trial.equal(ids[:2], ["a-given-id", "x" * 128], "PUB-3", "ids given")
    trial.equal(len(set(ids)), 4, "PUB-3", "different ids")
    member = await trial.member(group)
    got = []
    for lent in await trial.take(member, 4):
        got.append(lent.delivery.id)
        await lent.ack()
    trial.equal(got, ids, "PUB-3", "ids delivered")


@case("fid.timestamp", rules=(RULE,), sometimes=("delivered",))
async def timestamp(trial: Trial) -> None:
    """`published_at` is the time of publishing, to the millisecond, aware and in UTC."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    before = time.time()
    await producer.publish()
    after = time.time()
    lent = await trial.next(await trial.member(group))
    at = lent.delivery.published_at
    trial.that(isinstance(at, datetime) and at.tzinfo is UTC, RULE, "an aware time in UTC", at)
    if at is not None:
        # A broker's clock may differ from this machine's; by how much is the operator's affair up to a minute.
        trial.that(before - 60 <= at.timestamp() <= after + 60, RULE, "the time of publishing", str(at))
    await lent.ack()
