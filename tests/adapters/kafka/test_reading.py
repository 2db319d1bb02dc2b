"""What is read of Kafka's batches, compared with what the client library itself reads of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatchBuilder

from unistream_kafka.reading import Records

AT = TopicPartition("t", 3)
GZIP = 1


def batch(seed: int, *, first: int = 0, compression: int = 0) -> bytes:
    """A batch of messages of all kinds: no key, empty ones, long ones, any headers."""
    chance = random.Random(seed)
    builder = DefaultRecordBatchBuilder(2, compression, 0, -1, -1, -1, 1 << 24)

    def some() -> bytes | None:
        return chance.choice([None, b"", chance.randbytes(chance.choice([1, 63, 64, 200, 9000]))])

    for number in range(chance.randrange(1, 40)):
        headers = [(chance.choice(["a", "é" * 70, ""]), some()) for _ in range(chance.choice([0, 1, 2, 70]))]
        builder.append(number, 1_700_000_000_000 + chance.randrange(-100, 10**6), some(), some(), headers)
    built = bytearray(builder.build())
    built[:8] = first.to_bytes(8, "big")  # the broker's part; the checksum leaves it out
    return bytes(built)


def read(kind: Any, data: bytes, at: int = 0, each: int = 7) -> list[tuple[Any, ...]]:
    """All that a reader of this kind gives, with where the next fetch would begin after each bite."""
    reader = kind(at, AT, MemoryRecords(data))
    found: list[tuple[Any, ...]] = []
    while reader:
        found += [tuple(message) for message in reader.take(each)]
        found.append((reader.next_fetch_offset,))
    return found


@pytest.mark.parametrize("compression", [0, GZIP])
@pytest.mark.parametrize("seed", range(25))
def test_messages_are_read_as_the_client_reads_them(seed: int, compression: int) -> None:
    """Every field of every message is the client's, whatever was in it, from any offset on, in bites of any size."""
    data = batch(seed, compression=compression) + batch(seed + 1000, first=500, compression=compression)
    each = seed % 9 + 1

    assert read(Records, data, seed % 5, each) == read(Fetcher.PartitionRecords, data, seed % 5, each)
    assert len(read(Records, data)) > 2


def test_a_damaged_batch_is_an_error() -> None:
    """A batch whose checksum is wrong, or whose messages end elsewhere than they say, gives an error and no message."""
    data = bytearray(batch(1))
    data[-1] ^= 1

    with pytest.raises(CorruptRecordError):
        read(Records, bytes(data))


def test_a_compacted_end_is_passed() -> None:
    """After a batch whose last messages were compacted away the next fetch begins behind them."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1 << 20)
    builder.append(0, 0, None, b"x", [])
    builder.append(9, 0, None, b"y", [])
    whole = read(Records, bytes(builder.build()))

    assert whole == read(Fetcher.PartitionRecords, bytes(builder.build()))
    assert whole[-1] == (10,)
