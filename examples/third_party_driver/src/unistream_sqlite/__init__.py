"""One SQLite file as a broker, shared by the processes of one machine: the worked example of an adapter.

Vocabulary
    topic, group: rows. loan: a row with a member and a deadline. token: (offset, number of the loan).

URL
    `sqlite:///absolute/path.db`. Option `poll` (seconds between looks for new messages; default 0.05).

Guarantees
    Confirmed means committed with `synchronous=FULL`. Leases of single messages, fenced; attempts exact; nack delays of
    any length; start at the earliest, the latest, a time or a position.

Refusals
    No order by key, no seek, no retention, no max_backlog, no deduplication: `UnsupportedError` at open.

Native objects
    `Client.native` is the `sqlite3.Connection`.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from secrets import token_hex
from typing import Any, ClassVar

from unistream.capabilities import (
    AckConfirm,
    Attempts,
    Capabilities,
    Dedupe,
    Durability,
    Fencing,
    LagReport,
    Lease,
    Level,
    MaxBacklog,
    MaxMessageBytes,
    NackDelay,
    OrderingByKey,
    RetentionLimits,
    Seek,
    Start,
)
from unistream.driver.contract import ConsumerDriver, Driver, ProducerDriver
from unistream.driver.types import (
    GroupSpec,
    Lag,
    Member,
    Option,
    PublishOutcome,
    RawDelivery,
    RawMessage,
    Receipt,
    Settlement,
    SettleOutcome,
    StartAt,
    Token,
    TopicSpec,
    Verb,
)
from unistream.errors import (
    BrokerUnavailableError,
    ClosedError,
    ConfigError,
    GroupMissingError,
    LeaseLostError,
    TopicMissingError,
    UnsupportedError,
)

__all__ = ["SqliteDriver"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, partitions INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS messages (
    topic TEXT NOT NULL REFERENCES topics ON DELETE CASCADE, offset INTEGER NOT NULL,
    id TEXT NOT NULL, value BLOB NOT NULL, key BLOB, headers TEXT NOT NULL, partition INTEGER NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (topic, offset)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    topic TEXT NOT NULL REFERENCES topics ON DELETE CASCADE, name TEXT NOT NULL, spec TEXT NOT NULL,
    cursor INTEGER NOT NULL, ephemeral INTEGER NOT NULL, PRIMARY KEY (topic, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS loans (
    topic TEXT NOT NULL, grp TEXT NOT NULL, offset INTEGER NOT NULL,
    member TEXT, due REAL NOT NULL, attempt INTEGER NOT NULL, number INTEGER NOT NULL, suspect INTEGER NOT NULL,
    PRIMARY KEY (topic, grp, offset),
    FOREIGN KEY (topic, grp) REFERENCES groups ON DELETE CASCADE) WITHOUT ROWID;
"""
# A loan with a member is lent until `due`; without one it may be lent from `due` on. `number` counts the lendings of a
# row and never falls, so that it is the fence.


class SqliteDriver(Driver):
    """See the package."""

    schemes: ClassVar[tuple[str, ...]] = ("sqlite",)
    options: ClassVar[dict[str, Option]] = {
        "poll": Option(float, 0.05, "Seconds between looks for new messages."),
        "connect_timeout": Option(float, 5.0, "Seconds to wait for another process's lock."),
    }
    lacks: ClassVar[dict[str, str]] = {
        "socket": "the broker is a file",
        "password": "the broker is a file",
    }

    async def open(self) -> None:
        """See `Driver.open`."""
        if not self.target.path:
            raise ConfigError("the sqlite URL names no file; it looks like sqlite:////var/lib/app/queue.db")
        with self._translated():
            self.connection = sqlite3.connect(
                f"/{self.target.path.lstrip('/')}", timeout=self.target.options["connect_timeout"], isolation_level=None
            )
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self.connection.execute(f"PRAGMA {pragma}")
            self.connection.executescript(SCHEMA)
        nothing: dict[str, Any] = {"level": Level.NONE, "note": "this example leaves it out"}
        self.capabilities = Capabilities(
            driver="sqlite",
            product=f"SQLite {sqlite3.sqlite_version}",
            durability=Durability(kind="fsync", note="synchronous=FULL"),
            ordering=OrderingByKey(**nothing),
            start=Start(at=frozenset({"latest", "earliest", "time", "position"})),
            seek=Seek(**nothing),
            nack_delay=NackDelay(),
            lease=Lease(least=0.2, recover_within=1.0, dead_peer_after=1.0, note="by the machine's clock"),
            fencing=Fencing(),
            attempts=Attempts(),
            ack_confirm=AckConfirm(),
            dedupe=Dedupe(**nothing),
            retention=RetentionLimits(**nothing),
            max_backlog=MaxBacklog(**nothing),
            max_message_bytes=MaxMessageBytes(limit=16 * 1024 * 1024),
            lag=LagReport(),
        )

    async def close(self) -> None:
        """See `Driver.close`."""
        if hasattr(self, "connection"):
            self.connection.close()

    async def ping(self) -> None:
        """See `Driver.ping`."""
        self.rows("SELECT 1")

    @property
    def native(self) -> sqlite3.Connection:
        """See `Driver.native`."""
        return self.connection

    # Access

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise BrokerUnavailableError(f"{self.target}: {error}", driver="sqlite") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start, so that no lock has to be upgraded."""
        with self._translated():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of a query outside a transaction."""
        with self._translated():
            return self.connection.execute(query, values).fetchall()

    # Topics and groups

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """See `Driver.create_topic`."""
        with self.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO topics VALUES (?, ?)", (spec.name, spec.partitions))
        return await self.topic(spec.name)

    async def delete_topic(self, name: str) -> None:
        """See `Driver.delete_topic`."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM topics WHERE name = ?", (name,))

    async def topic(self, name: str) -> TopicSpec:
        """See `Driver.topic`."""
        for row in self.rows("SELECT name, partitions FROM topics WHERE name = ?", name):
            return TopicSpec(*row)
        raise TopicMissingError(f"there is no topic {name!r} in {self.target}; create it first", topic=name)

    async def topics(self) -> Sequence[TopicSpec]:
        """See `Driver.topics`."""
        return [TopicSpec(*row) for row in self.rows("SELECT name, partitions FROM topics ORDER BY name")]

    async def create_group(self, spec: GroupSpec) -> GroupSpec:
        """See `Driver.create_group`."""
        await self.topic(spec.topic)
        start = spec.start.isoformat() if isinstance(spec.start, datetime) else spec.start
        text = json.dumps([start, spec.lease, spec.max_lease])
        with self.transaction() as connection:
            cursor = self._place(spec.topic, spec.start)
            connection.execute(
                "INSERT OR IGNORE INTO groups VALUES (?, ?, ?, ?, ?)",
                (spec.topic, spec.name, text, cursor, spec.ephemeral),
            )
        return self.group(spec.topic, spec.name)

    def _place(self, topic: str, at: StartAt) -> int:
        """The offset before the first one that a group which starts at `at` receives."""
        last = "SELECT coalesce(max(offset), 0) FROM messages WHERE topic = ?"
        if at == "earliest":
            return 0
        if at == "latest":
            return int(self.rows(last, topic)[0][0])
        if isinstance(at, datetime):
            return int(self.rows(f"{last} AND at < ?", topic, at.timestamp())[0][0])
        if not at.isdigit():
            raise ConfigError(f"{at!r} is no position of this broker")
        return int(at) - 1

    def group(self, topic: str, name: str) -> GroupSpec:
        """A group as it stands."""
        for text, ephemeral in self.rows(
            "SELECT spec, ephemeral FROM groups WHERE topic = ? AND name = ?", topic, name
        ):
            start, lease, max_lease = json.loads(text)
            at = start if start in ("latest", "earliest") or start.isdigit() else datetime.fromisoformat(start)
            return GroupSpec(topic, name, "none", at, lease, max_lease, bool(ephemeral))
        if not self.rows("SELECT 1 FROM topics WHERE name = ?", topic):
            raise TopicMissingError(f"the topic {topic!r} does not exist, or was deleted", topic=topic)
        raise GroupMissingError(f"topic {topic!r} has no group {name!r}, or it was deleted", topic=topic)

    async def delete_group(self, topic: str, name: str) -> None:
        """See `Driver.delete_group`."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM groups WHERE topic = ? AND name = ?", (topic, name))

    async def groups(self, topic: str) -> Sequence[GroupSpec]:
        """See `Driver.groups`."""
        await self.topic(topic)
        query = "SELECT name FROM groups WHERE topic = ? AND NOT ephemeral ORDER BY name"
        return [self.group(topic, name) for (name,) in self.rows(query, topic)]

    async def lag(self, topic: str, group: str) -> Lag:
        """See `Driver.lag`."""
        self.group(topic, group)
        query = """SELECT (SELECT count(*) FROM loans WHERE topic = g.topic AND grp = g.name)
                        + (SELECT count(*) FROM messages WHERE topic = g.topic AND offset > g.cursor)
                   FROM groups g WHERE topic = ? AND name = ?"""
        return Lag(self.rows(query, topic, group)[0][0], True)

    async def members(self, topic: str, group: str) -> Sequence[Member]:
        """See `Driver.members`; only members that hold something can be seen."""
        self.group(topic, group)
        query = """SELECT member, count(*) FROM loans
                   WHERE topic = ? AND grp = ? AND member IS NOT NULL AND due > ? GROUP BY member"""
        return [Member(*row) for row in self.rows(query, topic, group, time.time())]

    async def seek(self, topic: str, group: str, to: StartAt) -> None:
        """See `Driver.seek`; never called, since the capability is absent."""
        raise UnsupportedError("this broker has no seek", capability="seek", driver="sqlite", topic=topic)

    async def producer(self, topic: TopicSpec) -> ProducerDriver:
        """See `Driver.producer`."""
        return _Producer(self, topic.name)

    async def consumer(
        self,
        group: GroupSpec,
        topic: TopicSpec,
        *,
        max_in_flight: int,
        lost: Callable[[Collection[Token], str], None],
    ) -> ConsumerDriver:
        """See `Driver.consumer`."""
        if group.ephemeral:
            await self.create_group(group)
        self.group(group.topic, group.name)
        return _Consumer(self, group)


class _Producer(ProducerDriver):
    def __init__(self, driver: SqliteDriver, topic: str) -> None:
        self._driver = driver
        self._topic = topic

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """One transaction for the batch; answers at once, since a local file needs no waiting."""
        topic, now = self._topic, time.time()
        with self._driver.transaction() as connection:
            if not connection.execute("SELECT 1 FROM topics WHERE name = ?", (topic,)).fetchone():
                return [TopicMissingError(f"the topic {topic!r} was deleted", topic=topic) for _ in batch]
            first = connection.execute(
                "SELECT coalesce(max(offset), 0) + 1 FROM messages WHERE topic = ?", (topic,)
            ).fetchone()[0]
            connection.executemany(
                "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        topic,
                        offset,
                        message.id,
                        message.value,
                        message.key,
                        _pack(message.headers),
                        message.partition,
                        now,
                    )
                    for offset, message in enumerate(batch, first)
                ],
            )
        return [Receipt(message.id, str(offset)) for offset, message in enumerate(batch, first)]

    async def close(self) -> None:
        """Nothing is held."""


class _Consumer(ConsumerDriver):
    def __init__(self, driver: SqliteDriver, group: GroupSpec) -> None:
        self._driver = driver
        self._group = group
        self._member = token_hex(8)
        self._closed = False

    async def receive(self, limit: int, timeout: float) -> list[RawDelivery]:
        """Look, and look again every `poll` seconds: a file wakes nobody."""
        until = time.monotonic() + timeout
        while True:
            if self._closed:
                raise ClosedError(f"this consumer of {self._group.name!r} is closed")
            lent = self._lend(limit)
            left = until - time.monotonic()
            if lent or left <= 0:
                return lent
            await asyncio.sleep(min(self._driver.target.options["poll"], left))

    def _lend(self, limit: int) -> list[RawDelivery]:
        topic, name = self._group.topic, self._group.name
        self._driver.group(topic, name)
        now = time.time()
        with self._driver.transaction() as connection:
            # Leases that ended: their holder may have died of the message.
            connection.execute(
                """UPDATE loans SET member = NULL, suspect = 1
                   WHERE topic = ? AND grp = ? AND member IS NOT NULL AND due <= ?""",
                (topic, name, now),
            )
            ready = connection.execute(
                """SELECT offset, suspect FROM loans WHERE topic = ? AND grp = ? AND member IS NULL AND due <= ?
                   ORDER BY due, offset LIMIT ?""",
                (topic, name, now, limit),
            ).fetchall()
            suspects = [offset for offset, suspect in ready if suspect]
            offsets = suspects[:1] or [offset for offset, _ in ready]
            if not suspects and len(offsets) < limit:
                fresh = connection.execute(
                    """SELECT m.offset FROM messages m JOIN groups g ON g.topic = m.topic AND g.name = ?
                       WHERE m.topic = ? AND m.offset > g.cursor ORDER BY m.offset LIMIT ?""",
                    (name, topic, limit - len(offsets)),
                ).fetchall()
                for (offset,) in fresh:
                    connection.execute("INSERT INTO loans VALUES (?, ?, ?, NULL, 0, 0, 0, 0)", (topic, name, offset))
                    offsets.append(offset)
                if fresh:
                    connection.execute(
                        "UPDATE groups SET cursor = ? WHERE topic = ? AND name = ?", (fresh[-1][0], topic, name)
                    )
            return [self._lent(connection, offset, now) for offset in offsets]

    def _lent(self, connection: sqlite3.Connection, offset: int, now: float) -> RawDelivery:
        topic, name = self._group.topic, self._group.name
        attempt, number, suspect = connection.execute(
            """UPDATE loans SET member = ?, due = ?, attempt = attempt + 1, number = number + 1
               WHERE topic = ? AND grp = ? AND offset = ? RETURNING attempt, number, suspect""",
            (self._member, now + self._group.lease, topic, name, offset),
        ).fetchone()
        id_, value, key, headers, partition, at = connection.execute(
            "SELECT id, value, key, headers, partition, at FROM messages WHERE topic = ? AND offset = ?",
            (topic, offset),
        ).fetchone()
        message = RawMessage(id_, value, key, _unpack(headers), partition)
        return RawDelivery(message, (offset, number), str(offset), at, attempt, bool(suspect))

    def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """One transaction for the batch; a loan is touched only while it is still this one."""
        with self._driver.transaction() as connection:
            return [self._settle(connection, settlement) for settlement in batch]

    def _settle(self, connection: sqlite3.Connection, settlement: Settlement) -> SettleOutcome:
        offset, number = settlement.token
        now = time.time()
        this = (self._group.topic, self._group.name, offset, number, self._member, now)
        where = "WHERE topic = ? AND grp = ? AND offset = ? AND number = ? AND member = ? AND due > ?"
        match settlement.verb:
            case Verb.ACK:
                done = connection.execute(f"DELETE FROM loans {where}", this)
            case Verb.NACK:
                update = f"UPDATE loans SET member = NULL, suspect = 0, due = ? {where}"
                done = connection.execute(update, (now + settlement.delay, *this))
            case Verb.RELEASE:
                update = f"UPDATE loans SET member = NULL, suspect = 0, due = 0, attempt = attempt - 1 {where}"
                done = connection.execute(update, this)
            case Verb.EXPIRE:
                return None
        return None if done.rowcount else self._lost(offset)

    def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`."""
        now = time.time()
        outcomes: list[SettleOutcome] = []
        with self._driver.transaction() as connection:
            for offset, number in tokens:
                done = connection.execute(
                    """UPDATE loans SET due = ?
                       WHERE topic = ? AND grp = ? AND offset = ? AND number = ? AND member = ? AND due > ?""",
                    (now + seconds, self._group.topic, self._group.name, offset, number, self._member, now),
                )
                outcomes.append(None if done.rowcount else self._lost(offset))
        return outcomes

    def _lost(self, offset: int) -> LeaseLostError:
        return LeaseLostError(
            f"the lease of message {offset} of {self._group.topic!r} to {self._group.name!r} has ended",
            topic=self._group.topic,
        )

    async def close(self) -> None:
        """Give back what is still held, and take an ephemeral group away."""
        if self._closed:
            return
        self._closed = True
        topic, name = self._group.topic, self._group.name
        with self._driver.transaction() as connection:
            if self._group.ephemeral:
                connection.execute("DELETE FROM groups WHERE topic = ? AND name = ?", (topic, name))
            connection.execute(
                "UPDATE loans SET member = NULL, due = 0 WHERE topic = ? AND grp = ? AND member = ?",
                (topic, name, self._member),
            )


def _pack(headers: tuple[tuple[str, bytes], ...]) -> str:
    return json.dumps([[name, b64encode(value).decode()] for name, value in headers])


def _unpack(text: str) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, b64decode(value)) for name, value in json.loads(text))
