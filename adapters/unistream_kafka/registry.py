"""Who created which group: claims in a compacted topic, of which the first of a group counts; and topics' orderings.

Kafka keeps nothing of a group but offsets, which expire, and lets anyone commit them for a group without members. A
log with one partition decides between concurrent creators: each appends a claim with the offsets it would pin, then
all read the log, and pin what the first claim says. Every claim has a key of its own, so compaction never removes a
claim that counts; deleting a group writes tombstones over its claims.

Runs in the control thread; blocks.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import TopicAlreadyExistsError

from unistream.driver.types import GroupSpec, Ordering
from unistream.errors import UnsupportedError
from unistream_kafka.client import Place, connect, discard

__all__ = ["FORMAT", "TOPIC", "Claim", "Registry", "group_id"]

FORMAT = 1
TOPIC = "__unistream_groups"
_LOG = TopicPartition(TOPIC, 0)
_TOPIC = "topic:"  # a colon is in no name
# Kafka compacts closed segments only: with its own week, a cluster whose groups come and go would be slow to read.
_CONFIGS = {
    "cleanup.policy": "compact",
    "segment.ms": "600000",
    "min.cleanable.dirty.ratio": "0.1",
    "delete.retention.ms": "3600000",
}
_ORDERINGS: dict[str, Ordering] = {"none": "none", "key": "key"}


def group_id(topic: str, group: str) -> str:
    """
    Kafka's name of a group: `topic.group`.

    Dots of the group's name are written `%2E`, so that the last dot always parts the two.
    """
    return f"{topic}.{group.replace('.', '%2E')}"


@dataclass(frozen=True, slots=True)
class Claim:
    """
    One creation of a group.

    Attributes:
        key: Of the claim, never used again.
        spec: The group as declared by its creator.
        topic_id: Of the topic then; another one means that the topic was deleted, and the group with it.
        offsets: Where the group begins, by partition.
        pinned: Whether Kafka held the offsets at some time since: where they are missing now, they expired.
    """

    key: str
    spec: GroupSpec
    topic_id: str
    offsets: tuple[int, ...]
    pinned: bool = False

    @classmethod
    def new(cls, spec: GroupSpec, topic_id: str, offsets: Sequence[int]) -> Claim:
        """A claim with a fresh key."""
        return cls(f"{group_id(spec.topic, spec.name)}/{secrets.token_hex(8)}", spec, topic_id, tuple(offsets))

    def text(self) -> bytes:
        """What is written down."""
        spec = self.spec
        start: dict[str, str] = (
            {"start_time": spec.start.isoformat()} if isinstance(spec.start, datetime) else {"start": spec.start}
        )
        record = {
            "format": FORMAT,
            "topic": spec.topic,
            "group": spec.name,
            "ordering": spec.ordering,
            **start,
            "lease": spec.lease,
            "max_lease": spec.max_lease,
            "topic_id": self.topic_id,
            "offsets": self.offsets,
            "pinned": self.pinned,
        }
        return json.dumps(record).encode()

    @classmethod
    def read(cls, key: str, text: bytes) -> Claim:
        """
        The claim that a record describes.

        Raises:
            UnsupportedError: A newer version wrote it.
        """
        said: dict[str, Any] = json.loads(text)
        if said.get("format") != FORMAT:
            raise UnsupportedError(
                f"group {key!r} is written in format {said.get('format')}, this version reads format {FORMAT}; "
                "upgrade unistream",
                capability="registry",
                driver="kafka",
            )
        spec = GroupSpec(
            topic=said["topic"],
            name=said["group"],
            ordering=_ORDERINGS[said["ordering"]],
            start=datetime.fromisoformat(said["start_time"]) if "start_time" in said else str(said["start"]),
            lease=float(said["lease"]),
            max_lease=float(said["max_lease"]),
        )
        return cls(key, spec, said["topic_id"], tuple(said["offsets"]), bool(said["pinned"]))


class Registry:
    """The claims of a cluster, kept up to date by reading on where the last reading ended."""

    def __init__(self, place: Place, admin: Callable[[], KafkaAdminClient]) -> None:
        self._place = place
        self._admin = admin
        self._reader: KafkaConsumer | None = None
        self._read_to = 0
        # Key of a claim -> its offset in the log and what it says; by first appearance.
        self._claims: dict[str, tuple[int, bytes]] = {}

    def close(self) -> None:
        """Close the reader's connections; it is opened again when needed, and reads from the beginning."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close(autocommit=False, timeout_ms=0)

    def declared(self, topic_id: str) -> tuple[str | None, Ordering | None]:
        """The name and the ordering that a topic was declared with here; `None`s: foreign tools made it."""
        self._catch_up(create=False)
        found = self._claims.get(f"{_TOPIC}{topic_id}")
        if found is None:
            return None, None
        said = json.loads(found[1])
        return said["topic"], _ORDERINGS[said["ordering"]]

    def declare(self, topic: str, topic_id: str, ordering: Ordering) -> None:
        """Note the name and the ordering of a topic that was made here."""
        self._catch_up(create=True)
        record = {"format": FORMAT, "topic": topic, "ordering": ordering}
        self._write((f"{_TOPIC}{topic_id}", json.dumps(record).encode()))

    def find(self, topic: str, group: str, topic_id: str) -> Claim | None:
        """The claim that counts, if the group exists."""
        self._catch_up(create=False)
        return self._first(f"{group_id(topic, group)}/", topic_id)

    def groups(self, topic: str, topic_id: str) -> list[Claim]:
        """The claims that count, of all groups of a topic, by name."""
        self._catch_up(create=False)
        prefixes = {key[: key.rindex("/") + 1] for key in self._claims if key.startswith(f"{topic}.") and "/" in key}
        found = [self._first(prefix, topic_id) for prefix in sorted(prefixes)]
        return [claim for claim in found if claim is not None and claim.spec.topic == topic]

    def claim(self, mine: Claim) -> Claim:
        """Write a claim; the one that counts, which is another's if that was written before."""
        self._catch_up(create=True)
        self._write((mine.key, mine.text()))
        self._catch_up(create=False)
        counts = self._first(mine.key[: mine.key.rindex("/") + 1], mine.topic_id)
        if counts is None:
            return mine  # deleted in the meantime: its creator is told when it joins
        if counts.key != mine.key:
            self._write((mine.key, None))
        return counts

    def pinned(self, claim: Claim) -> None:
        """Note that Kafka holds the offsets of a claim."""
        self._write((claim.key, replace(claim, pinned=True).text()))

    def remove(self, topic: str, group: str | None = None) -> None:
        """Delete the claims of a group, or of all groups of a topic."""
        self._catch_up(create=False)
        if group is not None:
            prefix = f"{group_id(topic, group)}/"
            keys = [key for key in self._claims if key.startswith(prefix)]
        else:
            keys = [key for key, (_, text) in self._claims.items() if json.loads(text).get("topic") == topic]
        if keys:
            self._write(*((key, None) for key in keys))

    def _first(self, prefix: str, topic_id: str) -> Claim | None:
        best: tuple[bool, int, Claim] | None = None
        for key, (offset, text) in self._claims.items():
            if key.startswith(prefix):
                claim = Claim.read(key, text)
                # Noting `pinned` moves a claim to the end of the log, so that comes before the order of the log.
                rank = (not claim.pinned, offset, claim)
                if claim.topic_id == topic_id and (best is None or rank[:2] < best[:2]):
                    best = rank
        return best[2] if best else None

    def _write(self, *records: tuple[str, bytes | None]) -> None:
        producer = connect(
            KafkaProducer, self._place, producer=True, metrics_enabled=False, max_block_ms=self._patience
        )
        try:
            sent = [producer.send(TOPIC, text, key=key.encode(), partition=0) for key, text in records]
            for each in sent:
                each.get(timeout=self._place.connect_timeout)
        finally:
            # A claim without an answer may be there; creating or deleting again is harmless.
            discard(producer)

    @property
    def _patience(self) -> int:
        return int(self._place.connect_timeout * 1000)

    def _catch_up(self, *, create: bool) -> None:
        if self._reader is None:
            if not self._there(create):
                return
            self._reader = connect(
                KafkaConsumer,
                self._place,
                group_id=None,
                enable_auto_commit=False,
                allow_auto_create_topics=False,
                metrics_enabled=False,
                fetch_max_wait_ms=50,
                # So that a slow wire gets on, one answer after the other.
                max_partition_fetch_bytes=64 * 1024,
            )
            self._reader.assign([_LOG])
            self._reader.seek(_LOG, 0)
            self._claims.clear()
        reader = self._reader
        end = reader.end_offsets([_LOG], timeout_ms=self._patience)[_LOG]
        while reader.position(_LOG, timeout_ms=self._patience) < end:
            for message in reader.poll(timeout_ms=self._patience, max_records=10_000).get(_LOG, ()):
                key = message.key.decode()
                if message.value is None:
                    self._claims.pop(key, None)
                else:
                    self._claims[key] = (message.offset, message.value)

    def _there(self, create: bool) -> bool:
        admin = self._admin()
        if admin.describe_topics([TOPIC])[0]["error_code"] == 0:
            return True
        if not create:
            return False
        try:
            admin.create_topics({TOPIC: {"num_partitions": 1, "configs": _CONFIGS}}, wait_for_metadata=True)
        except TopicAlreadyExistsError:
            admin.wait_for_topics([TOPIC])
        return True
