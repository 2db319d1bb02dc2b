"""The blocking producer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

from unistream import _confirmation, _producer
from unistream._portal import Portal
from unistream._producer import DEFAULT_TIMEOUT
from unistream._stats import ProducerStats
from unistream.errors import UnistreamError
from unistream.message import HeadersLike, Message, Receipt

if TYPE_CHECKING:
    from unistream.sync._client import Client

__all__ = ["Confirmation", "Producer"]

MESSAGES_PER_CALL = 1000
"""How many messages of `publish_many` cross to the loop's thread at a time."""


class Confirmation:
    """See `unistream.Confirmation`; `result` blocks."""

    def __init__(self, portal: Portal, confirmation: _confirmation.Confirmation) -> None:
        self._portal = portal
        self._confirmation = confirmation

    @property
    def id(self) -> str:
        """See `unistream.Confirmation.id`."""
        return self._confirmation.id

    @property
    def failed(self) -> bool:
        """See `unistream.Confirmation.failed`."""
        return self._confirmation.failed

    def done(self) -> bool:
        """See `unistream.Confirmation.done`."""
        return self._confirmation.done()

    def failure(self) -> UnistreamError | None:
        """See `unistream.Confirmation.failure`."""
        return self._confirmation.failure()

    def result(self, timeout: float | None = None) -> Receipt:
        """See `unistream.Confirmation.result`."""
        return self._portal.call(self._confirmation.result(timeout))


class Producer:
    """See `unistream.Producer`."""

    def __init__(self, client: Client, producer: _producer.Producer) -> None:
        self._client = client
        self._producer = producer

    def __enter__(self) -> Producer:
        self._client._open().call(self._producer.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client._portal is not None:
            self._client._portal.call(self._producer.__aexit__(kind, error, trace))

    @property
    def topic(self) -> str:
        """See `unistream.Producer.topic`."""
        return self._producer.topic

    @property
    def stats(self) -> ProducerStats:
        """See `unistream.Producer.stats`."""
        return self._producer.stats

    def publish(
        self,
        value: bytes,
        *,
        key: bytes | str | None = None,
        headers: HeadersLike | None = None,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Receipt:
        """See `unistream.Producer.publish`."""
        return self._client._open().call(
            self._producer.publish(value, key=key, headers=headers, id=id, timeout=timeout)
        )

    def submit(
        self,
        value: bytes,
        *,
        key: bytes | str | None = None,
        headers: HeadersLike | None = None,
        id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Confirmation:
        """See `unistream.Producer.submit`."""
        portal = self._client._open()
        submitted = self._producer.submit(value, key=key, headers=headers, id=id, timeout=timeout)
        return Confirmation(portal, portal.call(submitted))

    def publish_many(
        self, messages: Iterable[Message | bytes], *, timeout: float = DEFAULT_TIMEOUT
    ) -> list[Receipt | UnistreamError]:
        """See `unistream.Producer.publish_many`."""
        portal = self._client._open()
        outcomes: list[Receipt | UnistreamError] = []
        # Read here, in the caller's thread: an iterable may block, and may call unistream itself.
        rest = iter(messages)
        while batch := list(islice(rest, MESSAGES_PER_CALL)):
            outcomes += portal.call(self._producer.publish_many(batch, timeout=timeout))
        return outcomes

    def flush(self, timeout: float | None = None) -> None:
        """See `unistream.Producer.flush`."""
        self._client._open().call(self._producer.flush(timeout))

    def close(self) -> None:
        """See `unistream.Producer.close`."""
        self._client._open().call(self._producer.close())
