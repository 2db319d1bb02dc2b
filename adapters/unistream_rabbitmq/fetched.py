"""What the broker has pushed to a member of a shared group over one channel, and counts as unsettled there.

Knows delivery tags, loans, and in which turn messages are lent; publishes nothing and waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from math import inf
from typing import Any

from pika import BasicProperties

from unistream.driver.types import RawDelivery, RawMessage, Token
from unistream_rabbitmq.link import Channel
from unistream_rabbitmq.messages import arrived, put_back
from unistream_rabbitmq.relay import Hop

__all__ = ["Arrival", "Fetched"]


class Arrival:
    """
    A message that the broker pushed and that is not settled; `spent` lendings count before this one.

    Of the times that it was lost, `most` count: who finds a lost message in the main queue does not lend it from there,
    so at most one lending is behind it, however often it was lost.
    """

    __slots__ = ("body", "message", "properties", "published_at", "spent", "suspect", "tag")

    def __init__(self, method: Any, properties: BasicProperties, body: bytes, most: float) -> None:
        said = arrived(method, properties, body)
        self.tag: int = method.delivery_tag
        self.message: RawMessage = said.message
        self.published_at = said.published_at
        self.spent = said.spent + int(min(said.lost, most))
        self.suspect = said.lost > 0
        self.properties = properties
        self.body = body

    def hop(self, queue: str, delay: float, spent: int) -> Hop:
        """The message on its way back to a queue of its group, with `spent` lendings written on it."""
        return Hop(queue, delay, self.body, put_back(self.properties, spent, self.message.partition))


class Fetched:
    """
    One channel's unsettled messages.

    Args:
        channel: The channel.
        epoch: Its number among the member's channels: half of every token, so that a token fits one channel only.
        wake: Called when there is something new to lend.

    Attributes:
        open: Every unsettled delivery tag, in order.
        held: Those that are lent.
        over: The channel has ended, and with it everything here.
        strays: What came back from a lost member, and must go to the queue of suspects before it is lent.
    """

    def __init__(self, channel: Channel, epoch: int, wake: Callable[[], None]) -> None:
        self.channel = channel
        self.open: dict[int, None] = {}
        self.held: dict[Token, Arrival] = {}
        self.over = False
        self.strays: deque[Arrival] = deque()
        self._epoch = epoch
        self._wake = wake
        self._buffer: deque[Arrival] = deque()
        self._suspects: deque[Arrival] = deque()
        self._suspect_was_last = False

    # In

    def on_message(self, _: Any, method: Any, properties: BasicProperties, body: bytes) -> None:
        """Take what the broker pushed from a queue of ordinary messages."""
        arrival = Arrival(method, properties, body, 1)
        self.open[arrival.tag] = None
        (self.strays if arrival.suspect else self._buffer).append(arrival)
        self._wake()

    def on_suspect(self, _: Any, method: Any, properties: BasicProperties, body: bytes) -> None:
        """Take what the broker pushed from the queue of suspects."""
        arrival = Arrival(method, properties, body, inf)
        arrival.suspect = True
        self.open[arrival.tag] = None
        self._suspects.append(arrival)
        self._wake()

    # Lending

    @property
    def ready(self) -> bool:
        """Whether an ordinary message can be lent at once."""
        return bool(self._buffer) and not self.strays

    @property
    def unlent(self) -> bool:
        """Whether anything here is not lent."""
        return bool(self._buffer or self._suspects or self.strays)

    def take(self, limit: int) -> list[RawDelivery]:
        """Lend up to `limit` messages; a suspect alone, in turn with the others, so that many do not stop the group."""
        if self._suspects and not (self._suspect_was_last and self._buffer):
            self._suspect_was_last = True
            return [self._lend(self._suspects.popleft())]
        self._suspect_was_last = False
        buffer = self._buffer
        return [self._lend(buffer.popleft()) for _ in range(min(limit, len(buffer)))]

    def _lend(self, arrival: Arrival) -> RawDelivery:
        token = (self._epoch, arrival.tag)
        self.held[token] = arrival
        return RawDelivery(
            arrival.message,
            token,
            None,
            arrival.published_at,
            arrival.spent + 1,
            arrival.suspect,
            arrival.properties,
        )

    def take_unlent(self) -> list[Arrival]:
        """Take out everything that is not lent: it is to be given back."""
        left = [*self._buffer, *self._suspects, *self.strays]
        for waiting in (self._buffer, self._suspects, self.strays):
            waiting.clear()
        return left

    def take_strays(self) -> list[Arrival]:
        """Take out what has to go to the queue of suspects."""
        left = list(self.strays)
        self.strays.clear()
        return left

    def put_first(self, arrivals: Iterable[Arrival]) -> None:
        """Put back what was taken out and could not be given back: suspects apart, the others in front, in order."""
        arrivals = list(arrivals)
        self.strays.extendleft(reversed([each for each in arrivals if each.suspect]))
        self._buffer.extendleft(reversed([each for each in arrivals if not each.suspect]))

    def lend_alone(self, arrivals: Iterable[Arrival]) -> None:
        """Let strays be lent from here, one at a time, where there is no queue of suspects for them."""
        self._suspects.extend(arrivals)

    # Ending

    def ack(self, tags: Iterable[int]) -> None:
        """Ack: everything up to the first unsettled tag in one frame, the rest one by one."""
        if self.over:
            return
        acked = set(tags)
        open_ = self.open
        raw = self.channel.raw
        highest = 0
        while open_:
            first = next(iter(open_))
            if first not in acked:
                break
            acked.discard(first)
            del open_[first]
            highest = first
        if highest:
            raw.basic_ack(highest, multiple=True)
        for tag in sorted(acked):
            del open_[tag]
            raw.basic_ack(tag)

    def requeue(self, tag: int) -> None:
        """Give one back to the broker, which counts that as if its member had been lost."""
        if not self.over and tag in self.open:
            del self.open[tag]
            self.channel.raw.basic_nack(tag, requeue=True)

    def end(self) -> list[Token]:
        """The channel has ended; the loans that ended with it."""
        self.over = True
        tokens = list(self.held)
        self.held.clear()
        self.open.clear()
        self.take_unlent()
        return tokens
