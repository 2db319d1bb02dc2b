"""The publishing side: a batch goes to the broker as it is, and the answer is there at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from operator import itemgetter

from unistream.broker import BrokerError, Host, Published, TopicMissing
from unistream.driver.contract import ProducerDriver
from unistream.driver.types import PublishOutcome, RawMessage, Receipt
from unistream.errors import ClosedError, TooLargeError, TopicFullError, TopicMissingError
from unistream_builtin.errors import DRIVER, translated

__all__ = ["MemoryProducer"]

# Makes the named tuple from a plain one without a Python frame.
_receipt: Callable[[tuple[str, str, bool]], Receipt] = partial(tuple.__new__, Receipt)


class MemoryProducer(ProducerDriver):
    """Publishes to one topic."""

    batch_messages = 1000
    batch_bytes = 16 * 1024 * 1024

    def __init__(self, host: Host, topic: str) -> None:
        self._host = host
        self._topic = topic
        self._closed = False

    def publish(self, batch: Sequence[RawMessage], timeout: float) -> list[PublishOutcome]:
        """See `ProducerDriver.publish`. Answers at once; the broker keeps the messages themselves, not the batch."""
        if self._closed:
            raise ClosedError(f"the producer of {self._topic!r} is closed", driver=DRIVER, topic=self._topic)
        try:
            result = self._host.publish(self._topic, batch, [message[5] or message[0] for message in batch])
        except TopicMissing as error:
            return [self._missing(error) for _ in batch]
        except BrokerError as error:
            raise translated(error, self._topic) from error
        if not isinstance(result, int):
            return [self._outcome(message, result, index) for index, message in enumerate(batch)]
        if len(batch) == 1:
            return [_receipt((batch[0][0], str(result), False))]
        places = map(str, range(result, result + len(batch)))
        return list(map(_receipt, zip(map(itemgetter(0), batch), places, repeat(False), strict=False)))

    def _missing(self, cause: TopicMissing) -> TopicMissingError:
        error = TopicMissingError(f"{cause}; create it first", driver=DRIVER, topic=self._topic)
        error.stored = "no"
        error.__cause__ = cause
        return error

    def _outcome(self, message: RawMessage, result: Published, index: int) -> PublishOutcome:
        reason = result.refused.get(index)
        if reason is None:
            return Receipt(message.id, str(result.offsets[index]), index in result.duplicates)
        if reason == "full":
            return TopicFullError(
                f"topic {self._topic!r} is full: its slowest group has max_backlog messages unsettled; "
                "publish again when it has caught up",
                driver=DRIVER,
                topic=self._topic,
            )
        limit = self._host.limits.message_bytes
        return TooLargeError(
            f"the message is above {limit} bytes of value, key and headers", driver=DRIVER, topic=self._topic
        )

    async def close(self) -> None:
        """See `ProducerDriver.close`."""
        self._closed = True
