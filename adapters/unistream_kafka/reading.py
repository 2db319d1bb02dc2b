"""Takes messages out of the batches that Kafka sends, with less work than kafka-python 3.0.12 does for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord, Fetcher
from kafka.errors import CorruptRecordError
from kafka.record.util import decode_varint

__all__ = ["Records", "unpark"]

_new = tuple.__new__


class Records(Fetcher.PartitionRecords):  # type: ignore[misc]
    """
    What one partition brought with one fetch.

    The client makes two objects of every message, copies its body twice and asks for the checksum of each; with the
    two headers of ours that took 7 µs a message, and this takes 4. Only for `read_uncommitted`, without deserializers.
    """

    def _unpack_records(self, tp: TopicPartition, records: Any, *_: object) -> Iterator[ConsumerRecord]:
        while (batch := records.next_batch()) is not None:
            if not batch.validate_crc():
                raise CorruptRecordError(f"{tp.topic}, partition {tp.partition}: batch at {batch.base_offset}")
            if batch.magic < 2:
                yield from self._old(tp, batch)
                continue
            self.leader_epoch = batch.leader_epoch
            self.bytes_read += batch.size_in_bytes
            if not batch.is_control_batch:
                yield from self._unpacked(tp, batch)
            # Also past what compaction removed at its end.
            self.next_fetch_offset = batch.next_offset
        self.drain()

    def _unpacked(self, tp: TopicPartition, batch: Any) -> Iterator[ConsumerRecord]:
        """The messages of a batch of the format that Kafka has had since 0.11."""
        batch._maybe_uncompress()
        data, at, number = bytes(batch._buffer), batch._pos, decode_varint
        topic, partition = tp
        first_offset, epoch, kind = batch.base_offset, batch.leader_epoch, batch.timestamp_type
        first_time, last_time = batch.first_timestamp, batch.max_timestamp
        names: dict[bytes, str] = {}
        try:
            for _ in range(batch.records_count):
                size, at = number(data, at)
                end = at + size
                later, at = number(data, at + 1)
                beyond, at = number(data, at)
                key_size, at = number(data, at)
                key = None if key_size < 0 else data[at : at + key_size]
                at += max(key_size, 0)
                value_size, at = number(data, at)
                value = None if value_size < 0 else data[at : at + value_size]
                at += max(value_size, 0)
                count, at = number(data, at)
                headers: list[tuple[str, bytes | None]] = []
                headers_size = 0 if count > 0 else -1
                for _ in range(count):
                    size, at = number(data, at)
                    raw = data[at : at + size]
                    at += size
                    name = names.get(raw)
                    if name is None:
                        name = names[raw] = raw.decode()
                    headers_size += size
                    size, at = number(data, at)
                    if size < 0:
                        headers.append((name, None))
                    else:
                        headers.append((name, data[at : at + size]))
                        at += size
                        headers_size += size
                if at != end:
                    raise ValueError(f"{at - end} bytes beyond its end")
                offset = first_offset + beyond
                self.next_fetch_offset = offset + 1
                time = last_time if kind else first_time + later
                fields = (topic, partition, epoch, offset, time, kind, key, value, headers, None)
                yield _new(ConsumerRecord, (*fields, key_size, value_size, headers_size))
        except (ValueError, IndexError) as error:
            raise CorruptRecordError(f"{topic}, partition {partition}, batch at {first_offset}: {error}") from error

    def _old(self, tp: TopicPartition, batch: Any) -> Iterator[ConsumerRecord]:
        for record in batch:
            if not record.validate_crc():
                raise CorruptRecordError(f"{tp.topic}, partition {tp.partition}: message at {record.offset}")
            key, value = record.key, record.value
            sizes = (-1 if key is None else len(key), -1 if value is None else len(value), -1)
            self.bytes_read += record.size_in_bytes
            self.next_fetch_offset = record.offset + 1
            times = (record.timestamp, record.timestamp_type)
            yield ConsumerRecord(*tp, self.leader_epoch, record.offset, *times, key, value, [], record.checksum, *sizes)


def unpark(client: KafkaConsumer) -> None:
    """
    Let go of a batch that is used up, before a poll.

    What kafka-python 3.0.12 fetched of partitions that were paused it takes up again only when it has no batch in
    hand, and a used up one counts as one: with no other partition bringing news it would wait for ever
    (`Fetcher.fetched_records`).
    """
    fetcher = client._fetcher
    if fetcher._next_partition_records is not None and not fetcher._next_partition_records:
        fetcher._next_partition_records = None
