"""What one member of a group holds, and every way to settle it; called by deliveries.

Knows leases and the life-cycle; neither fetches nor hands out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from unistream._delivery import Delivery
from unistream._stats import ConsumerStats
from unistream.core.leases import Lease, Leases
from unistream.core.lifecycle import TRANSITIONS, Move, State, refusal
from unistream.driver.types import GroupSpec, Token, Verb
from unistream.errors import ConfigError, PublishError, Reject, SettleError

if TYPE_CHECKING:
    from unistream._dead_letters import DeadLetters
    from unistream._group import Group
    from unistream._intake import Intake
    from unistream._settler import Settler

__all__ = ["Loans", "finish"]

_LENT = State.LENT
_ACKED = TRANSITIONS[State.LENT, Move.ACK]

_log = logging.getLogger("unistream.consumer")


class Loans:
    """
    The deliveries that a member holds.

    Attributes:
        topic: Name of the topic.
        group_name: Name of the group.
        group: Whose member it is.
        stats: What the member has seen.
        loop: The event loop that it lives on.
        now: Seconds of that loop's clock.
        leases: When what is held must be renewed.
        held: Every unsettled loan with its lease.
        out: Of these, the ones in the application's hands, each with its bytes.
        bytes_out: All these bytes.
        given_back: Loans returned unsettled.
        suspect: A suspect that is held: nothing is fetched beside it.
        closed: Whether the member is leaving, or has left.
    """

    settler: Settler
    dead: DeadLetters
    _intake: Intake

    __slots__ = (
        "_all_back",
        "_exempt",
        "_hurried",
        "_intake",
        "bytes_out",
        "closed",
        "dead",
        "given_back",
        "group",
        "group_name",
        "held",
        "leases",
        "loop",
        "now",
        "out",
        "settler",
        "stats",
        "suspect",
        "topic",
    )

    def __init__(self, group: Group, spec: GroupSpec, stats: ConsumerStats, loop: asyncio.AbstractEventLoop) -> None:
        self.topic = spec.topic
        self.group_name = spec.name
        self.group = group
        self.stats = stats
        self.loop = loop
        # The clock of asyncio's own loops, without the frame around it.
        own = getattr(type(loop), "time", None) is asyncio.BaseEventLoop.time
        self.now: Callable[[], float] = time.monotonic if own else loop.time
        self.leases = Leases(spec.lease, spec.max_lease)
        self.held: dict[Token, Lease] = {}
        self.out: dict[Token, int] = {}
        self.bytes_out = 0
        self.given_back = 0
        self.suspect: Token = None
        self.closed = False
        # What draining does not wait for, the signal that all others are back, and whether it waits at all.
        self._exempt: set[Token] = set()
        self._all_back: asyncio.Future[None] | None = None
        self._hurried = False

    def begin(self, settler: Settler, dead: DeadLetters, intake: Intake) -> None:
        """The member has joined: from now on there can be loans."""
        self.settler = settler
        self.dead = dead
        self._intake = intake

    def holds(self, delivery: Delivery) -> bool:
        """Whether this very loan is held, and its lease stands."""
        lease = delivery._lease
        return self.held.get(delivery._raw.token) is lease and self.loop.time() < lease.deadline

    def any_held(self) -> bool:
        """Whether there is any unsettled loan."""
        return bool(self.held)

    def let_go(self, token: Token) -> bool:
        """A loan ended: its credit is free again. False if it had ended before."""
        lease = self.held.pop(token, None)
        if lease is None:
            return False
        self.leases.drop(lease)
        size = self.out.pop(token, None)
        if size is not None:
            self.bytes_out -= size
            self._look_if_drained()
        if token == self.suspect:
            self.suspect = None
        if self._intake.waiting:
            self._intake.serve()
        return True

    def check_loop(self) -> None:
        """Refuse a caller on another event loop, or after a fork."""
        if asyncio._get_running_loop() is not self.loop:
            self.group._client._wrong_loop()

    # Settling

    def ack(self, delivery: Delivery) -> bool:
        """Accept an ack for sending; False if the delivery is not held any more."""
        self.check_loop()
        token = delivery._raw[1]
        lease = delivery._lease
        held = self.held
        if held.get(token) is not lease or self.now() >= lease.deadline:
            return False
        settler = self.settler
        settler.acks.append(delivery)
        if not settler.scheduled:
            settler.soon()
        self.stats.acked += 1
        if self._intake.waiting or self._all_back is not None or self.suspect is not None or lease.held == 1:
            self.let_go(token)
        else:
            # What `let_go` would do, for nearly every ack.
            del held[token]
            lease.held -= 1
            self.bytes_out -= self.out.pop(token)
        return True

    async def ack_many(self, deliveries: Sequence[Delivery], confirm: bool) -> list[SettleError | None]:
        """See `Consumer.ack_many`."""
        left = deliveries if confirm else self._ack_held(deliveries)
        if not left:
            return [None] * len(deliveries)
        refused: dict[Delivery, SettleError] = {}
        begun: list[tuple[Delivery, asyncio.Future[SettleError | None]]] = []
        for delivery in left:
            try:
                if delivery._can(Move.ACK):
                    begun.append((delivery, delivery._loans._settle(delivery, Move.ACK, Verb.ACK, 0.0)))
            except SettleError as error:
                refused[delivery] = error
        for delivery, done in begun:
            late = await asyncio.shield(done)
            if late is not None:
                delivery._move(Move.LOSE)
                refused[delivery] = late
        return [refused.get(delivery) for delivery in deliveries]

    def _ack_held(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Accept the acks of what is plainly held, for sending; returns the rest."""
        self.check_loop()
        now, held, out = self.now(), self.held, self.out
        acks: list[Delivery] = []
        left: list[Delivery] = []
        for delivery in deliveries:
            token = delivery._raw[1]
            lease = delivery._lease
            if delivery._state is _LENT and held.get(token) is lease and now < lease.deadline:
                delivery._state = _ACKED
                acks.append(delivery)
                del held[token]
                self.bytes_out -= out.pop(token)
                lease.held -= 1
                if not lease.held:
                    self.leases.ended(lease)
            else:
                left.append(delivery)
        if acks:
            self.stats.acked += len(acks)
            self.settler.acks += acks
            # A batch as it is: nothing is gained by waiting for more.
            self.settler.flush()
            if self.suspect is not None and self.suspect not in held:
                self.suspect = None
            self._look_if_drained()
            if self._intake.waiting:
                self._intake.serve()
        return left

    async def settle(self, delivery: Delivery, move: Move, verb: Verb, delay: float = 0.0) -> None:
        """Settle, and wait until the broker holds it."""
        refused = await asyncio.shield(self._settle(delivery, move, verb, delay))
        if refused is not None:
            delivery._move(Move.LOSE)
            raise refused

    def _settle(self, delivery: Delivery, move: Move, verb: Verb, delay: float) -> asyncio.Future[SettleError | None]:
        self.check_loop()
        if not self.holds(delivery):
            # It ended, or was settled otherwise, while its dead letter was on its way.
            raise refusal(delivery.state, move, delivery._name)
        token = delivery._raw.token
        done = self.settler.put(token, verb, delay, wait=True)
        self.let_go(token)
        delivery._move(move)
        if verb is Verb.RELEASE:
            self.given_back += 1
        elif move is Move.ACK:
            self.stats.acked += 1
        elif move is Move.NACK:
            self.stats.nacked += 1
        else:
            self.stats.rejected += 1
        return cast("asyncio.Future[SettleError | None]", done)

    async def nack(self, delivery: Delivery, delay: float | None, reason: str | None) -> None:
        """See `Delivery.nack`."""
        group = self.group
        if group.retry.exhausted(delivery.attempt):
            await self.dead.bury(delivery, Move.NACK, reason or "nacked at the last attempt")
        else:
            await self.settle(
                delivery, Move.NACK, Verb.NACK, group._backoff(delivery.attempt) if delay is None else delay
            )

    async def reject(self, delivery: Delivery, reason: str) -> None:
        """See `Delivery.reject`."""
        await self.dead.bury(delivery, Move.REJECT, reason)

    async def extend(self, delivery: Delivery, seconds: float) -> None:
        """See `Delivery.extend`."""
        self.check_loop()
        if not seconds > 0:
            raise ConfigError(f"extend({seconds}) of {delivery._name}: give more than 0 seconds")
        await self.settler.extend(delivery, seconds)

    async def conclude(self, delivery: Delivery, error: BaseException | None) -> None:
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
                await self.settle(delivery, Move.NACK, Verb.RELEASE)
        except SettleError as refused:
            if error is None or isinstance(error, Reject):
                self.settle_refused(delivery, refused)
            else:
                _log.info("%s", refused)
        except PublishError as failed:
            # Its dead letter was not confirmed. It stays this group's and comes here again after the backoff.
            _log.error("%s could not be dead-lettered: %s", delivery._name, failed)
            try:
                await self.settle(delivery, Move.NACK, Verb.NACK, self.group._backoff(delivery.attempt))
            except SettleError as refused:
                _log.info("%s", refused)

    def settle_refused(self, delivery: Delivery, error: SettleError) -> None:
        """An ack or reject that was accepted for sending came to nothing (DEL-7)."""
        if delivery._state is not State.LOST:
            delivery._move(Move.LOSE)
        self.stats.acks_lost += 1
        if self.stats.acks_lost.bit_count() == 1:
            # Rate-limited by powers of two: a broker that refuses one refuses many.
            _log.warning("%s (%d settles lost so far by this consumer)", error, self.stats.acks_lost)

    def lost(self, tokens: Collection[Token], reason: str) -> None:
        """The driver, or the clock, says that loans ended without being asked to."""
        lost = sum([self.let_go(token) for token in tokens])
        if lost:
            self.stats.leases_lost += lost
            _log.warning("%s: %d deliveries lost: %s", self.name, lost, reason)

    def dropped_unsettled(self, delivery: Delivery) -> None:
        """The application let go of a delivery without settling it (DEL-8); called by the garbage collector."""
        if self.closed or delivery._raw.token not in self.held or self.loop.is_closed():
            return
        code = delivery._code
        where = f"{code.co_filename}:{delivery._line}" if code is not None else "?"
        _log.warning(
            "%s was dropped without being settled; received at %s; it comes again when its lease ends",
            delivery._name,
            where,
        )
        self.loop.call_soon_threadsafe(self.settler.stop_renewing, delivery._raw.token)

    # Leaving

    def give_back(self, tokens: Collection[Token]) -> None:
        """Return loans unsettled."""
        for token in tokens:
            if token in self.held:
                self.settler.put(token, Verb.RELEASE)
                self.let_go(token)
                self.given_back += 1

    async def drained(self, seconds: float) -> None:
        """Wait until the application has settled what it holds, `exempt` loans apart; `seconds` at most."""
        if not self._hurried and self.out.keys() - self._exempt:
            self._all_back = self.loop.create_future()
            timer = self.loop.call_later(seconds, finish, self._all_back)
            await self._all_back
            timer.cancel()

    def exempt(self, token: Token) -> None:
        """Let `drained` not wait for this one."""
        self._exempt.add(token)
        self._look_if_drained()

    def hurry(self) -> None:
        """Let `drained` wait no longer."""
        self._hurried = True
        if self._all_back is not None:
            finish(self._all_back)

    def _look_if_drained(self) -> None:
        if self._all_back is not None and not self.out.keys() - self._exempt:
            finish(self._all_back)

    @property
    def name(self) -> str:
        """Of topic and group, for messages."""
        return f"{self.topic}/{self.group_name}"


def finish(future: asyncio.Future[Any]) -> None:
    """Give a future its result, `None`, unless it has one."""
    if not future.done():
        future.set_result(None)
