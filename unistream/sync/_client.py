"""The blocking client: topics, and the makers of everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, cast

from unistream import _client
from unistream._client import MIB
from unistream._confirmation import WhenFull
from unistream._group import Drop
from unistream._health import Health
from unistream._portal import Portal, soon
from unistream.capabilities import Capabilities
from unistream.core.backoff import Retry
from unistream.driver.types import Event, GroupSpec, Ordering, Overflow, Retention, StartAt, TopicSpec
from unistream.sync._consuming import Group
from unistream.sync._producing import Producer

__all__ = ["Client"]


class Client:
    """See `unistream.Client`."""

    def __init__(self, client: _client.Client) -> None:
        self._client = client
        self._portal: Portal | None = None

    def __enter__(self) -> Client:
        portal = Portal(f"unistream {self._client._target.scheme}")
        try:
            portal.call(self._client.__aenter__())
        except BaseException:
            portal.close()
            raise
        self._portal = portal
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Portal:
        if self._portal is None:
            # Raises the error that says what is wrong: not entered, or closed.
            self._client._use()
        return cast(Portal, self._portal)

    @property
    def capabilities(self) -> Capabilities:
        """See `unistream.Client.capabilities`."""
        return self._client.capabilities

    @property
    def native(self) -> Any:
        """See `unistream.Client.native`; it belongs to the client's own thread."""
        return self._client._driver.native

    def create_topic(
        self,
        name: str,
        *,
        partitions: int = 1,
        ordering: Ordering = "none",
        retention: Retention | None = None,
        max_backlog: int | None = None,
        overflow: Overflow = "reject",
    ) -> None:
        """See `unistream.Client.create_topic`."""
        self._open().call(
            self._client.create_topic(
                name,
                partitions=partitions,
                ordering=ordering,
                retention=retention,
                max_backlog=max_backlog,
                overflow=overflow,
            )
        )

    def delete_topic(self, name: str) -> None:
        """See `unistream.Client.delete_topic`."""
        self._open().call(self._client.delete_topic(name))

    def topics(self) -> Sequence[TopicSpec]:
        """See `unistream.Client.topics`."""
        return self._open().call(self._client.topics())

    def producer(
        self,
        topic: str,
        *,
        max_unconfirmed: int = 1000,
        max_unconfirmed_bytes: int = 16 * MIB,
        when_full: WhenFull = "block",
    ) -> Producer:
        """See `unistream.Client.producer`."""
        producer = self._client.producer(
            topic, max_unconfirmed=max_unconfirmed, max_unconfirmed_bytes=max_unconfirmed_bytes, when_full=when_full
        )
        return Producer(self, producer)

    def group(
        self,
        name: str | None,
        topic: str,
        *,
        ordering: Ordering = "none",
        start: StartAt = "latest",
        lease: float = 30.0,
        max_lease: float = 3600.0,
        retry: Retry | None = None,
        dead_letter: str | Drop | None = None,
    ) -> Group:
        """See `unistream.Client.group`."""
        group = self._client.group(
            name,
            topic,
            ordering=ordering,
            start=start,
            lease=lease,
            max_lease=max_lease,
            retry=retry,
            dead_letter=dead_letter,
        )
        return Group(self, group)

    def groups(self, topic: str | None = None) -> Sequence[GroupSpec]:
        """See `unistream.Client.groups`."""
        return self._open().call(self._client.groups(topic))

    def health(self) -> Health:
        """See `unistream.Client.health`."""
        return self._open().call(self._client.health())

    def events(self) -> Iterator[Event]:
        """See `unistream.Client.events`."""
        portal = self._open()
        return _told(portal, portal.call(soon(self._client.events)))

    def close(self) -> None:
        """See `unistream.Client.close`."""
        portal, self._portal = self._portal, None
        if portal is not None:
            try:
                portal.call(self._client.close())
            finally:
                portal.close()

    def __repr__(self) -> str:
        return f"<sync {self._client!r}>"


def _told(portal: Portal, events: Any) -> Iterator[Event]:
    while True:
        try:
            yield portal.call(_first(events))
        except StopAsyncIteration:
            return


async def _first(events: Any) -> Event:
    return cast(Event, await anext(events))
