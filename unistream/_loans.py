"""What one member of a group holds, and every way to settle it; called by deliveries.

Knows leases and the life-cycle; neither fetches nor hands out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from unistream._delivery import Delivery
from unistream.core.leases import Lease, Leases
from unistream.core.lifecycle import Move, State, refusal
from unistream.driver.types import Token, Verb
from unistream.errors import ConfigError, PublishError, Reject, SettleError

if TYPE_CHECKING:
    from unistream._dead_letters import DeadLetters
    from unistream._group import Group
    from unistream._settler import Settler

__all__ = ["ConsumerStats", "DrainReport", "Loans", "finish"]

_log = logging.getLogger("unistream.consumer")


class DrainReport(NamedTuple):
    """
    What became of the deliveries of a consumer, from joining to leaving.

    Attributes:
        handled: Settled by the application, or dead-lettered for it.
        returned: Given back unsettled; another member, or the same one after a restart, gets them.
        abandoned: Not given back, since the broker was out of reach; they come again when their leases end.
    """

    handled: int
    returned: int
    abandoned: int


@dataclass(slots=True)
class ConsumerStats:
    """
    What this consumer has seen.

    Attributes:
        delivered: Deliveries handed to the application.
        redelivered: Of these, with `attempt` above 1.
        acked: Acks accepted for sending.
        nacked: Nacks, those of the last attempt included.
        rejected: Rejects, and messages moved aside because no attempt was left.
        dead_lettered: Messages moved to the dead letter topic.
        dropped: Messages dropped, because there is no dead letter topic.
        acks_lost: Acks and rejects that came to nothing: refused by the broker after they had been accepted, or too
            late when a block or handler ended.
        leases_lost: Leases that ended before their delivery was settled.
    """

    delivered: int = 0
    redelivered: int = 0
    acked: int = 0
    nacked: int = 0
    rejected: int = 0
    dead_lettered: int = 0
    dropped: int = 0
    acks_lost: int = 0
    leases_lost: int = 0


class Loans:
    """
    The deliveries that a member holds. The base of `Consumer`.

    Attributes:
        topic: Name of the topic.
        group_name: Name of the group.
        stats: What it has seen.
    """

    _settler: Settler
    _dead: DeadLetters
    _leases: Leases
    _loop: asyncio.AbstractEventLoop
    _now: Callable[[], float]

    __slots__ = (
        "__weakref__",
        "_all_back",
        "_bytes_out",
        "_closed",
        "_dead",
        "_exempt",
        "_given_back",
        "_group",
        "_held",
        "_leases",
        "_loop",
        "_now",
        "_out",
        "_settler",
        "_suspect",
        "_waiting",
        "group_name",
        "stats",
        "topic",
    )

    def __init__(self, group: Group) -> None:
        self.topic = group.topic
        self.group_name = group.name or ""
        self.stats = ConsumerStats()
        self._group = group
        self._closed = False
        # Every unsettled loan with its lease; and the bytes of those that were handed out.
        self._held: dict[Token, Lease] = {}
        self._out: dict[Token, int] = {}
        self._bytes_out = 0
        self._given_back = 0
        # A suspect that is held: nothing is fetched beside it.
        self._suspect: Token = None
        self._waiting: Collection[object] = ()
        # Handed-out deliveries that closing does not wait for, and the signal that all others are back.
        self._exempt: set[Token] = set()
        self._all_back: asyncio.Future[None] | None = None

    def _serve(self) -> None:
        """Credit became free: go on fetching and handing out."""
        raise NotImplementedError

    def _holds(self, delivery: Delivery) -> bool:
        lease = delivery._lease
        return self._held.get(delivery._raw.token) is lease and self._loop.time() < lease.deadline

    def _holds_any(self) -> bool:
        return bool(self._held)

    def _let_go(self, token: Token) -> bool:
        """A loan ended: its credit is free again. False if it had ended before."""
        lease = self._held.pop(token, None)
        if lease is None:
            return False
        self._leases.drop(lease)
        size = self._out.pop(token, None)
        if size is not None:
            self._bytes_out -= size
            self._look_if_drained()
        if token == self._suspect:
            self._suspect = None
        if self._waiting:
            self._serve()
        return True

    def _look_if_drained(self) -> None:
        if self._all_back is not None and not self._out.keys() - self._exempt:
            finish(self._all_back)

    def _check_loop(self) -> None:
        """Refuse a caller on another event loop, or after a fork."""
        if asyncio._get_running_loop() is not self._loop:
            self._group._client._wrong_loop()

    # Settling

    def _ack(self, delivery: Delivery) -> bool:
        """Accept an ack for sending; False if the delivery is not held any more."""
        if asyncio._get_running_loop() is not self._loop:
            self._group._client._wrong_loop()
        token = delivery._raw[1]
        lease = delivery._lease
        held = self._held
        if held.get(token) is not lease or self._now() >= lease.deadline:
            return False
        settler = self._settler
        settler.acks.append(delivery)
        if not settler.scheduled:
            settler.soon()
        self.stats.acked += 1
        if self._waiting or self._all_back is not None or self._suspect is not None or lease.held == 1:
            self._let_go(token)
        else:
            # What `_let_go` would do, for nearly every ack.
            del held[token]
            lease.held -= 1
            self._bytes_out -= self._out.pop(token)
        return True

    async def _settle(self, delivery: Delivery, move: Move, verb: Verb, delay: float = 0.0) -> None:
        """Settle, and wait until the broker holds it."""
        self._check_loop()
        if not self._holds(delivery):
            # It ended, or was settled otherwise, while its dead letter was on its way.
            raise refusal(delivery.state, move, delivery._name)
        token = delivery._raw.token
        done = self._settler.put(token, verb, delay, wait=True)
        self._let_go(token)
        delivery._move(move)
        if verb is Verb.RELEASE:
            self._given_back += 1
        elif move is Move.ACK:
            self.stats.acked += 1
        elif move is Move.NACK:
            self.stats.nacked += 1
        else:
            self.stats.rejected += 1
        refused = await asyncio.shield(cast("asyncio.Future[SettleError | None]", done))
        if refused is not None:
            delivery._move(Move.LOSE)
            raise refused

    async def _nack(self, delivery: Delivery, delay: float | None, reason: str | None) -> None:
        group = self._group
        if group.retry.exhausted(delivery.attempt):
            await self._dead.bury(delivery, Move.NACK, reason or "nacked at the last attempt")
        else:
            await self._settle(
                delivery, Move.NACK, Verb.NACK, group._backoff(delivery.attempt) if delay is None else delay
            )

    async def _reject(self, delivery: Delivery, reason: str) -> None:
        await self._dead.bury(delivery, Move.REJECT, reason)

    async def _extend(self, delivery: Delivery, seconds: float) -> None:
        self._check_loop()
        if not seconds > 0:
            raise ConfigError(f"extend({seconds}) of {delivery._name}: give more than 0 seconds")
        await self._settler.extend(delivery, seconds)

    async def _conclude(self, delivery: Delivery, error: BaseException | None) -> None:
        """
        End a delivery as its block or handler ended (DEL-10, DEL-11).

        What is refused is logged, not raised: an ack that comes too late is counted, a nack is not, since the message
        comes again as it was to.
        """
        if delivery._state is not State.LENT:
            # Settled inside, or its loss was seen there.
            return
        try:
            if delivery.state is State.LOST:
                raise refusal(State.LOST, Move.ACK, delivery._name)
            if error is None:
                await delivery.ack()
            elif isinstance(error, Reject):
                await delivery.reject(error.reason)
            elif isinstance(error, Exception):
                await delivery.nack(reason=f"{type(error).__name__}: {error}")
            else:
                await self._settle(delivery, Move.NACK, Verb.RELEASE)
        except SettleError as refused:
            if error is None or isinstance(error, Reject):
                self._settle_refused(delivery, refused)
            else:
                _log.info("%s", refused)
        except PublishError as failed:
            # Its dead letter was not confirmed. It stays this group's and comes here again after the backoff.
            _log.error("%s could not be dead-lettered: %s", delivery._name, failed)
            try:
                await self._settle(delivery, Move.NACK, Verb.NACK, self._group._backoff(delivery.attempt))
            except SettleError as refused:
                _log.info("%s", refused)

    def _settle_refused(self, delivery: Delivery, error: SettleError) -> None:
        """An ack or reject that was accepted for sending came to nothing (DEL-7)."""
        if delivery._state is not State.LOST:
            delivery._move(Move.LOSE)
        self.stats.acks_lost += 1
        if self.stats.acks_lost.bit_count() == 1:
            # Rate-limited by powers of two: a broker that refuses one refuses many.
            _log.warning("%s (%d settles lost so far by this consumer)", error, self.stats.acks_lost)

    def _lost(self, tokens: Collection[Token], reason: str) -> None:
        """The driver, or the clock, says that loans ended without being asked to."""
        lost = sum([self._let_go(token) for token in tokens])
        if lost:
            self.stats.leases_lost += lost
            _log.warning("%s: %d deliveries lost: %s", self._name, lost, reason)

    def _dropped_unsettled(self, delivery: Delivery) -> None:
        """The application let go of a delivery without settling it (DEL-8); called by the garbage collector."""
        if self._closed or delivery._raw.token not in self._held or self._loop.is_closed():
            return
        code = delivery._code
        where = f"{code.co_filename}:{delivery._line}" if code is not None else "?"
        _log.warning(
            "%s was dropped without being settled; received at %s; it comes again when its lease ends",
            delivery._name,
            where,
        )
        self._loop.call_soon_threadsafe(self._settler.stop_renewing, delivery._raw.token)

    @property
    def _name(self) -> str:
        return f"{self.topic}/{self.group_name or 'an ephemeral group'}"

    @staticmethod
    def _wall() -> float:
        return time.time()


def finish(future: asyncio.Future[Any]) -> None:
    """Give a future its result, `None`, unless it has one."""
    if not future.done():
        future.set_result(None)
