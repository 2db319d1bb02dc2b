"""Saboteurs of publishing: what is confirmed, refused, stored, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from secrets import token_hex
from zlib import crc32

from unistream.conformance.identity import Identity
from unistream.conformance.saboteurs.table import saboteur
from unistream.conformance.wrap import ProducerLayer, resolve
from unistream.driver.contract import Driver, ProducerDriver
from unistream.driver.types import MaybeAwaitable, PublishOutcome, RawMessage, Receipt, TopicSpec
from unistream.errors import NotPublishedError, PublishError


@saboteur("null-sink", "PUB-1", "GRP-1")
class NullSink(ProducerLayer):
    """Confirms everything and stores nothing."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Confirm without storing."""
        return [Receipt(message.id) for message in batch]


class _EverySo(ProducerLayer):
    """Does its harm to one message in seven, always the same ones."""

    def harmed(self, message: RawMessage) -> bool:
        """Tell whether the message is one to harm."""
        return crc32(message.value) % 7 == 0


@saboteur("swallow-publish", "PUB-1", "GRP-1")
class SwallowPublish(_EverySo):
    """Confirms some messages that it never stores."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Store what is not swallowed."""
        kept = [message for message in batch if not self.harmed(message)]
        stored = iter(await resolve(self.inner.publish(kept, timeout)) if kept else [])
        there = {id(message) for message in kept}
        return [next(stored) if id(message) in there else Receipt(message.id) for message in batch]


@saboteur("lie-failed", "PUB-2")
class LieFailed(_EverySo):
    """Reports some stored messages as surely not stored."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Store all, deny some."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        return [
            NotPublishedError("denied") if self.harmed(message) else outcome
            for message, outcome in zip(batch, outcomes, strict=True)
        ]


@saboteur("publish-twice", "PUB-3")
class PublishTwice(_EverySo):
    """Stores some messages twice, as a blind retry would."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Store all, then some again under another deduplication key."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        again = [message._replace(dedupe=message.id + "-again") for message in batch if self.harmed(message)]
        if again:
            await resolve(self.inner.publish(again, timeout))
        return outcomes


@saboteur("reverse-batch", "PUB-4", "ORD-2", "ORD-5")
class ReverseBatch(ProducerLayer):
    """Stores every batch back to front."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Store in reverse, answer in order."""
        return (await resolve(self.inner.publish(batch[::-1], timeout)))[::-1]


@saboteur("receipt-shift", "PUB-1")
class ReceiptShift(ProducerLayer):
    """Gives every message of a batch its neighbour's receipt."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Rotate the outcomes by one."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        return outcomes[1:] + outcomes[:1]


@saboteur("phantom", "PUB-1")
class Phantom(_EverySo):
    """Stores messages that nobody published."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Add an invented message to some batches."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        invented = [_invented(message) for message in batch if self.harmed(message)]
        if invented:
            await resolve(self.inner.publish(invented, timeout))
        return outcomes


def _invented(message: RawMessage) -> RawMessage:
    run = message.value.split(b"|", 2)[1].decode() if message.value.startswith(b"us1|") else "x"
    body = Identity(run, "nobody", crc32(message.value), message.key).body()
    return message._replace(value=body, id=message.id + "-invented", dedupe="")


@saboteur("corrupt-body", "GRP-1")
class CorruptBody(_EverySo):
    """Cuts the last byte off some bodies."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Cut some bodies short."""
        return self.inner.publish(
            [message._replace(value=message.value[:-1]) if self.harmed(message) else message for message in batch],
            timeout,
        )


@saboteur("corrupt-key", "GRP-1", "ORD-2")
class CorruptKey(ProducerLayer):
    """Turns keys to upper case."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Alter every key."""
        return self.inner.publish(
            [message._replace(key=message.key and message.key.upper()) for message in batch], timeout
        )


@saboteur("none-to-empty", "GRP-1")
class NoneToEmpty(ProducerLayer):
    """Takes the absence of a key for an empty key."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Replace None by empty."""
        return self.inner.publish([message._replace(key=message.key or b"") for message in batch], timeout)


@saboteur("drop-headers", "GRP-1")
class DropHeaders(ProducerLayer):
    """Drops every header when one of them is not ASCII."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Drop headers that are hard to encode."""
        return self.inner.publish(
            [
                message if all(value.isascii() for _, value in message.headers) else message._replace(headers=())
                for message in batch
            ],
            timeout,
        )


@saboteur("lower-headers", "GRP-1")
class LowerHeaders(ProducerLayer):
    """Turns header names to lower case."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Lower every name."""
        return self.inner.publish(
            [
                message._replace(headers=tuple((name.lower(), value) for name, value in message.headers))
                for message in batch
            ],
            timeout,
        )


@saboteur("strip-headers", "GRP-1")
class StripHeaders(ProducerLayer):
    """Strips spaces from header values."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Strip every value."""
        return self.inner.publish(
            [
                message._replace(headers=tuple((name, value.strip()) for name, value in message.headers))
                for message in batch
            ],
            timeout,
        )


@saboteur("dedupe-too-much", "PUB-1", "PUB-3", "GRP-1")
class DedupeTooMuch(ProducerLayer):
    """Compares only the first characters of ids when it looks for duplicates."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Shorten the deduplication key."""
        return self.inner.publish(
            [message._replace(dedupe=(message.dedupe or message.id)[:12]) for message in batch], timeout
        )


@saboteur("dedupe-never", "PUB-3")
class DedupeNever(ProducerLayer):
    """Claims deduplication and compares nothing."""

    _numbers = count(1)

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Give every message a deduplication key of its own."""
        return self.inner.publish(
            [message._replace(dedupe=f"{message.id}-{next(self._numbers)}") for message in batch], timeout
        )


@saboteur("dedupe-per-producer", "PUB-3", by=("idm.producer-restart", "idm.producer-kill9"))
class DedupePerProducer(ProducerLayer):
    """Remembers ids for each producer apart, so that after a restart nothing is known."""

    def __init__(self, inner: ProducerDriver, driver: Driver, topic: TopicSpec) -> None:
        super().__init__(inner, driver, topic)
        self._life = token_hex(4)

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Let no other producer's ids be the same."""
        return self.inner.publish(
            [message._replace(dedupe=f"{message.dedupe or message.id}@{self._life}") for message in batch], timeout
        )


@saboteur("truncate-oversize", "GRP-1", "PUB-2")
class TruncateOversize(ProducerLayer):
    """Cuts bodies above 8 KiB instead of refusing or carrying them."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Cut large bodies."""
        return self.inner.publish([message._replace(value=message.value[:8192]) for message in batch], timeout)


@saboteur("batch-lies", "PUB-2", "PUB-6")
class BatchLies(ProducerLayer):
    """Fails a whole batch when one message of it is refused."""

    async def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """Spread one refusal over all."""
        outcomes = await resolve(self.inner.publish(batch, timeout))
        refused = next((outcome for outcome in outcomes if isinstance(outcome, PublishError)), None)
        return outcomes if refused is None else [refused for _ in batch]


@saboteur("key-hash-seeded", "ORD-3")
class KeyHashSeeded(ProducerLayer):
    """Chooses partitions by Python's own hash, which differs from process to process."""

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> MaybeAwaitable[list[PublishOutcome]]:
        """Choose another partition."""
        partitions = self.topic.partitions
        return self.inner.publish(
            [
                message if message.key is None else message._replace(partition=(message.partition + 1) % partitions)
                for message in batch
            ],
            timeout,
        )
