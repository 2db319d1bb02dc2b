"""The blocking half of a member: a KafkaConsumer, polled by the one thread that owns it.

Polls as long as the member lives, so that membership does not depend on anybody asking for messages; fetches only when
the other half wants some. Rebalances and commits run on the client's own event loop, and go through the crossing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kafka import KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.base import MemberState
from kafka.errors import KafkaConnectionError, KafkaError, KafkaTimeoutError, OffsetOutOfRangeError
from kafka.structs import OffsetAndMetadata

from unistream.driver.owner_thread import Crossing
from unistream_kafka.client import Place, abandon, connect, connected
from unistream_kafka.generation import beat, keep_fetching, keep_shares, store
from unistream_kafka.listener import Listener
from unistream_kafka.reading import Records, unpark

__all__ = ["Assigned", "Half", "Member", "UnsentError"]

_IDLE_SECONDS = 0.1
"""Between two looks at the group while nothing is wanted."""
_POLL_MS = 250
_LOST_CONTACT = 0.8
"""Of the session, without a heartbeat, after which this side takes its membership for lost: before the broker does."""
_LEAVE_MS = 3000
_ASK_SECONDS = 0.5
_HEARTBEAT_MS = 500
_ALONE_SECONDS = 0.5
"""Without any connection before the way to the cluster counts as lost: the client opens and closes some on its way."""

Assigned = Mapping[int, tuple[int, str] | None]
"""Partition -> the stored cursor and its text, or `None` where Kafka holds none."""


class UnsentError(KafkaConnectionError):  # type: ignore[misc]
    """Nothing of a commit has left this process."""


class Half(Protocol):
    """The other half, on the event loop; a member calls it through the crossing, but for `place`."""

    def joined(self) -> None:
        """The member takes part in the group."""

    def assigned(self, stored: Assigned) -> None:
        """Partitions came."""

    def revoked(self, partitions: Sequence[int], done: Callable[[], None]) -> None:
        """Partitions go to others after `done` is called."""

    def lost(self, partitions: Sequence[int] | None, reason: str) -> None:
        """Partitions, or all of them, are gone already."""

    def arrived(self, found: Mapping[int, Sequence[Any]]) -> None:
        """Messages, in order."""

    def trimmed(self, partition: int, wanted: int, first: int, end: int) -> None:
        """The messages from `wanted` to `first` are gone."""

    def failed(self, error: BaseException) -> None:
        """The member has ended."""

    def left(self) -> None:
        """The thread has ended."""

    def reachable(self, error: str | None) -> None:
        """The way to the cluster is lost, for a reason, or back."""

    def place(self, partition: int) -> int:
        """Where a partition begins for which Kafka holds no cursor; called from the client's thread."""


class Member:
    """
    One KafkaConsumer and its owner thread.

    Args:
        place: The cluster.
        half: The other half.
        crossing: The way to it.
        topic: Kafka's name of the topic.
        group: Kafka's name of the group; `None`: ephemeral, all partitions, nothing is stored.
        starts: Of an ephemeral member: where each partition begins.
        session: Seconds without a heartbeat after which the broker puts a member out.
        patience: Seconds for which the event loop may be blocked. Beyond them the member leaves the group: its
            heartbeats, in a thread of their own, would keep messages from others that nobody here works on.

    Attributes:
        blocked: Partitions that are not fetched from; see `block`.
        mute: Whether the other half is not waited for any more.
    """

    def __init__(
        self,
        place: Place,
        half: Half,
        crossing: Crossing,
        *,
        topic: str,
        group: str | None,
        starts: Sequence[int],
        session: float,
        patience: float,
    ) -> None:
        self.blocked: frozenset[int] = frozenset()
        self.mute = False
        self._place = place
        self._half = half
        self._crossing = crossing
        self._topic = topic
        self._group = group
        self._starts = starts
        self._session = session
        self._patience = patience
        self._asked = self._answered = time.monotonic()
        self._client: KafkaConsumer | None = None
        # Set by whatever the owner thread may be waiting for; cleared before it looks.
        self._news = threading.Event()
        self._wanted = 0
        self._leaving = False
        self._handing_over = False
        self._joined = False
        self._alone = time.monotonic()
        self._down = False
        self._contact = True
        self._heard = 0.0
        self._beat_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"unistream-kafka-member-{topic}", daemon=True)

    # For the event loop

    def start(self) -> None:
        """Begin; `Half.joined` or `Half.failed` follows."""
        self._thread.start()

    def want(self, messages: int) -> None:
        """Have up to so many messages fetched, once."""
        self._wanted = messages
        self._news.set()

    def block(self, partitions: frozenset[int]) -> None:
        """Have nothing fetched from these partitions, but from all others."""
        if partitions != self.blocked:
            self.blocked = partitions
            self._news.set()

    def leave(self) -> None:
        """Leave the group and end the thread, without waiting."""
        self._leaving = True
        self._news.set()

    def commit(
        self,
        offsets: Mapping[int, tuple[int, str]],
        done: Callable[[BaseException | None], None],
    ) -> None:
        """
        Store cursors and texts in the name of this generation of the group, and tell `done` on the loop.

        Goes past the owner thread, to the client's event loop: `poll` may be waiting for messages just now.
        """
        client = self._client
        if client is None:
            done(UnsentError("the member has ended"))
            return
        wanted = {
            TopicPartition(self._topic, at): OffsetAndMetadata(cursor, text, -1)
            for at, (cursor, text) in offsets.items()
        }
        try:
            answer = client._manager.call_soon(store, client._coordinator, wanted)
        except RuntimeError as error:
            done(UnsentError(str(error)))
            return
        answer.add_callback(lambda _: self._has_stored(done))
        answer.add_errback(lambda error: self._crossing.put(done, error))

    def _has_stored(self, done: Callable[[BaseException | None], None]) -> None:
        self._heard = time.monotonic()
        self._crossing.put(done, None)

    def _has_beaten(self, known: bool) -> None:
        if known:
            self._heard = time.monotonic()

    # For the client's own event loop

    def hand_over(self, partitions: Sequence[int]) -> None:
        """Have the other half let partitions go, and ask for no other share until it has."""
        self._handing_over = True
        if not self._crossing.put(self._half.revoked, partitions, self._handed_over):
            self._handing_over = False

    def _handed_over(self) -> None:
        self._handing_over = False
        self._news.set()

    # The owner thread

    def _run(self) -> None:
        try:
            self._client = self._open()
        except Exception as error:
            self._crossing.put(self._half.failed, error)
            self._crossing.put(self._half.left)
            return
        try:
            while not self._leaving:
                self._step(self._client)
        except Exception as error:
            self._crossing.put(self._half.failed, error)
        finally:
            client, self._client = self._client, None
            self._close(client)
            self._crossing.put(self._half.left)

    def _open(self) -> KafkaConsumer:
        session_ms = int(self._session * 1000)
        options: dict[str, Any] = {
            "group_id": self._group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "allow_auto_create_topics": False,
            "metrics_enabled": False,
            "fetch_max_bytes": 8 * 1024 * 1024,
        }
        if self._group is not None:
            options |= {
                "partition_assignment_strategy": [CooperativeStickyAssignor],
                "session_timeout_ms": session_ms,
                # By a heartbeat a member learns that others join or leave, so this is what every rebalance takes.
                "heartbeat_interval_ms": min(_HEARTBEAT_MS, session_ms // 4),
                # Also how long the others wait for this member in a rebalance, and for the answer to a join request.
                "max_poll_interval_ms": max(session_ms, 5000),
            }
        client = connect(KafkaConsumer, self._place, **options)
        client._fetcher.PartitionRecords = Records
        if self._group is not None:
            keep_shares(client._coordinator)
            keep_fetching(client, lambda: self._handing_over)
            client.subscribe([self._topic], listener=Listener(self, client))
            self._learn(client)
        else:
            partitions = [TopicPartition(self._topic, at) for at in range(len(self._starts))]
            client.assign(partitions)
            for partition, offset in zip(partitions, self._starts, strict=True):
                client.seek(partition, offset)
            self._crossing.put(self._half.assigned, {at: (offset, "") for at, offset in enumerate(self._starts)})
            self._tell_joined()
        return client

    def _learn(self, client: KafkaConsumer) -> None:
        """
        Have the client know the topic's partitions before it joins.

        A leader of kafka-python 3.0.12 that does not know them yet shares out none of them: it takes from every member
        what it has, and asks for another round (`AbstractStickyAssignor`: "No partition metadata for topic").
        """
        until = time.monotonic() + self._place.connect_timeout
        while not self._leaving and not client._cluster.partitions_for_topic(self._topic):
            left = until - time.monotonic()
            if left <= 0:
                raise KafkaTimeoutError(f"no word of topic {self._topic!r} within {self._place.connect_timeout:g} s")
            client._manager.run(client._manager.wait_for, client._cluster.request_update(), left * 1000)

    def _step(self, client: KafkaConsumer) -> None:
        if not self._wanted and self._joined:
            self._news.wait(_IDLE_SECONDS)
        self._news.clear()
        wanted = self._wanted
        if self._leaving:
            return
        self._watch(client)
        self._ask()
        self._pause(client, everything=not wanted)
        unpark(client)
        settled = self._joined and (self._group is None or self._handing_over or self._settled(client._coordinator))
        idle = self._joined and (not wanted or self._down)
        try:
            found = client.poll(timeout_ms=0 if idle or settled else _POLL_MS, max_records=wanted or 1)
        except OffsetOutOfRangeError as error:
            self._trimmed(client, error)
            return
        if not self._joined and client.group_metadata().state is MemberState.STABLE:
            self._tell_joined()
        if found:
            self._wanted = 0
            self._crossing.put(self._half.arrived, {at.partition: messages for at, messages in found.items()})
        elif self._down:
            # The client answers at once while it can't connect.
            self._news.wait(_IDLE_SECONDS)
        elif settled and wanted:
            self._await_news(client)

    @staticmethod
    def _settled(coordinator: Any) -> bool:
        """Whether a poll has nothing to wait for but messages: in a rebalance it waits for its share, too."""
        return coordinator.state is MemberState.STABLE and not (
            coordinator.coordinator_unknown() or coordinator.need_rejoin()
        )

    def _await_news(self, client: KafkaConsumer) -> None:
        """
        Wait until a fetch is answered, or this member is to leave: a poll that waits could not be told to.

        One that was answered during the poll is no longer among the fetches of kafka-python 3.0.12, and not in what
        the poll returned (`Fetcher.fetch_records` calls that idle, and a poll of its own sleeps for 100 ms).
        """
        fetcher = client._fetcher
        fetches = list(fetcher._fetch_futures)
        for fetch in fetches:
            fetch.add_both(lambda _: self._news.set())
        if not fetcher._completed_fetches:
            self._news.wait(_POLL_MS / 1000 if fetches else _IDLE_SECONDS)

    def _tell_joined(self) -> None:
        self._joined = True
        self._crossing.put(self._half.joined)

    def _pause(self, client: KafkaConsumer, *, everything: bool) -> None:
        blocked, paused = self.blocked, client.paused()
        mine = client.assignment()
        pause = [at for at in mine if (everything or at.partition in blocked) and at not in paused]
        if pause:
            client.pause(*pause)
        if not everything:
            resume = [at for at in paused if at.partition not in blocked]
            if resume:
                client.resume(*resume)

    def _watch(self, client: KafkaConsumer) -> None:
        """Notice that the connections are gone, and that the membership may be."""
        now = time.monotonic()
        if connected(client._client):
            self._alone = now
            if self._down:
                self._down = False
                self._crossing.put(self._half.reachable, None)
        elif not self._down and self._joined and now - self._alone > _ALONE_SECONDS:
            self._down = True
            self._crossing.put(self._half.reachable, "no connection to any node")
        if self._group is None or not self._joined:
            return
        if client._coordinator.state is MemberState.REBALANCING and now - self._beat_at >= _HEARTBEAT_MS / 1000:
            self._beat_at = now
            client._manager.call_soon(beat, client._coordinator).add_callback(self._has_beaten)
        # Without a word of the broker this may be out of the group, and not know it.
        heartbeat = client._coordinator.heartbeat
        silent = now - max(heartbeat.last_receive, heartbeat.last_reset, self._heard)
        if silent <= _LOST_CONTACT * self._session:
            self._contact = True
        elif self._contact:
            self._contact = False
            self._crossing.put(self._half.lost, None, f"the group was silent for {silent:.1f} s")

    def _ask(self) -> None:
        """Notice that the event loop is blocked."""
        now = time.monotonic()
        if self._answered >= self._asked:
            if now - self._asked > _ASK_SECONDS:
                self._asked = now
                self._crossing.put(self._answer)
        elif now - self._asked > self._patience:
            self.mute = True
            raise KafkaError(f"the event loop did not run for {now - self._asked:.0f} s; handlers must not block it")

    def _answer(self) -> None:
        self._answered = time.monotonic()

    def _trimmed(self, client: KafkaConsumer, error: OffsetOutOfRangeError) -> None:
        for partition, wanted in error.args[0].items():
            patience = int(self._place.connect_timeout * 1000)
            first = client.beginning_offsets([partition], timeout_ms=patience)[partition]
            end = client.end_offsets([partition], timeout_ms=patience)[partition]
            client.seek(partition, first if wanted < first else end)
            self._crossing.put(self._half.trimmed, partition.partition, wanted, first, end)

    def _close(self, client: KafkaConsumer) -> None:
        try:
            if not self._down:
                client.close(autocommit=False, timeout_ms=_LEAVE_MS)
        except (KafkaError, RuntimeError):
            # Out of reach: the membership ends with its session.
            self._down = True
        finally:
            abandon(client._client)
