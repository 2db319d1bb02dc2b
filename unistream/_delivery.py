"""One lending of a message, as applications see it: what was published, and the ways to settle it.

Knows nothing of brokers; the member that holds it does the settling.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from unistream.core.leases import Lease
from unistream.core.lifecycle import TRANSITIONS, Move, State, refusal
from unistream.driver.envelope import DEAD_PREFIX
from unistream.driver.types import RawDelivery, Verb
from unistream.message import Headers, Message, Origin

if TYPE_CHECKING:
    from types import CodeType, TracebackType

    from unistream._loans import Loans

__all__ = ["Delivery"]

_LENT = State.LENT
_ACKED = TRANSITIONS[State.LENT, Move.ACK]


class Delivery:
    """
    One lending of a message to this member. Settle it once: `ack`, `nack` or `reject`.

    As an async context manager it acks on success; on an exception it nacks, and the exception goes on (DEL-10).
    """

    __slots__ = ("_code", "_lease", "_line", "_loans", "_raw", "_state")

    def __init__(
        self, loans: Loans, raw: RawDelivery, lease: Lease, code: CodeType | None = None, line: int = 0
    ) -> None:
        self._loans = loans
        self._raw = raw
        self._lease = lease
        self._state = _LENT
        # Where the application received it, for the warning about one dropped unsettled; `None`: it never did.
        self._code = code
        self._line = line

    # What was published

    @property
    def value(self) -> bytes:
        """The body."""
        return self._raw.message.value

    @property
    def key(self) -> bytes | None:
        """The key; `None` differs from `b""`."""
        return self._raw.message.key

    @property
    def headers(self) -> Headers:
        """The application's headers."""
        pairs = self._raw.message.headers
        return Headers([pair for pair in pairs if not pair[0].startswith(DEAD_PREFIX)])

    @property
    def id(self) -> str:
        """The message's id; of a message published by a foreign client, `topic/partition/position`."""
        raw = self._raw
        return raw.message.id or f"{self.topic}/{raw.message.partition}/{raw.position}"

    @property
    def topic(self) -> str:
        """The topic."""
        return self._loans.topic

    @property
    def partition(self) -> int:
        """The partition."""
        return self._raw.message.partition

    @property
    def position(self) -> str | None:
        """The message's place, as in its receipt; opaque."""
        return self._raw.position

    @property
    def published_at(self) -> datetime | None:
        """When it was published: the broker's clock where it has one, else the publisher's; aware UTC."""
        seconds = self._raw.published_at
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

    @property
    def message(self) -> Message:
        """What was published, without the lending; for publishing it again."""
        return Message(self.value, self.key, self.headers, self.id, self.published_at)

    @property
    def origin(self) -> Origin | None:
        """Where a dead letter comes from; `None` on any other message."""
        dead = {name: value for name, value in self._raw.message.headers if name.startswith(DEAD_PREFIX)}
        if not dead:
            return None
        texts = {
            name.removeprefix(DEAD_PREFIX): unquote(value.decode("ascii", "replace")) for name, value in dead.items()
        }
        attempts = texts.get("attempts", "")
        return Origin(
            texts.get("topic", ""),
            texts.get("group", ""),
            texts.get("reason", ""),
            int(attempts) if attempts.isdigit() else 0,
        )

    # The lending

    @property
    def attempt(self) -> int:
        """Which lending of the message this is, 1 first."""
        return self._raw.attempt

    @property
    def state(self) -> State:
        """`lent`, `acked`, `nacked`, `rejected` or `lost`."""
        if self._state is State.LENT and not self._loans.holds(self):
            self._move(Move.LOSE)
        return self._state

    @property
    def lease_expires_at(self) -> datetime:
        """When the lease ends unless it is renewed; aware UTC, by the local clock."""
        left = self._lease.deadline - self._loans.loop.time()
        return datetime.fromtimestamp(time.time() + left, UTC)

    @property
    def native(self) -> Any:
        """The client library's own object; not portable."""
        return self._raw.native

    # Settling

    async def ack(self, confirm: bool = False) -> None:
        """
        Done: this group never sees the message again.

        Returns when the ack is accepted for sending; acks are coalesced.

        Args:
            confirm: Wait until the broker holds the ack.

        Raises:
            LeaseLostError: The lease had ended.
            AlreadySettledError: It was nacked or rejected before.
            UnsupportedError: `confirm`, and the backend can't.

        Cancellation: The ack is sent all the same.
        """
        loans = self._loans
        if not confirm:
            # The way of nearly every delivery: no table look-up, no future.
            if self._state is _LENT and loans.ack(self):
                self._state = _ACKED
                return
        else:
            loans.group._require("ack_confirm", "ack(confirm=True)")
        if self._can(Move.ACK):
            await loans.settle(self, Move.ACK, Verb.ACK)

    async def nack(self, delay: float | None = None, reason: str | None = None) -> None:
        """
        Not done: the message is delivered again, to any member, with `attempt` one higher.

        The nack of the last attempt that the group's `retry` grants dead-letters the message.

        Args:
            delay: Seconds before which it is not delivered again; `None`: what the backoff says for this attempt.
            reason: Kept in the dead letter, and logged.

        Raises:
            LeaseLostError: The lease had ended.
            AlreadySettledError: It was acked or rejected before.
            UnsupportedError: The delay is longer than the backend can.
            PublishError: The last attempt's dead letter was not confirmed; the delivery is still lent.

        Cancellation: The nack is sent all the same.
        """
        if delay is not None:
            self._loans.group._check_delay(delay)
        if self._can(Move.NACK):
            await self._loans.nack(self, delay, reason)

    async def reject(self, reason: str) -> None:
        """
        Never again for this group: dead-lettered with `reason` if the group has a dead letter topic, else dropped.

        Raises:
            LeaseLostError: The lease had ended.
            AlreadySettledError: It was acked or nacked before.
            PublishError: The dead letter was not confirmed; the delivery is still lent.

        Cancellation: Dead-lettered or still lent.
        """
        if self._can(Move.REJECT):
            await self._loans.reject(self, reason)

    async def extend(self, seconds: float) -> None:
        """
        Let the lease last `seconds` from now on, but not beyond `max_lease` since lending.

        Raises:
            ConfigError: `seconds` is not above 0.
            BrokerUnavailableError: The broker was not reached; the lease stands as it was.
            LeaseLostError: The lease had ended.
            AlreadySettledError: It is settled.

        Cancellation: The lease may or may not have been extended.
        """
        if self.state is not State.LENT:
            raise refusal(self._state, Move.ACK, self._name).__class__(f"extend of {self._name}: it is {self._state}")
        await self._loans.extend(self, seconds)

    async def __aenter__(self) -> Delivery:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state is State.LENT:
            await self._loans.conclude(self, error)

    def _can(self, move: Move) -> bool:
        """Whether `move` changes anything; raises where the table has no such transition."""
        state = self.state
        try:
            return TRANSITIONS[state, move] is not state
        except KeyError:
            raise refusal(state, move, self._name) from None

    def _move(self, move: Move) -> None:
        self._state = TRANSITIONS[self._state, move]

    @property
    def _name(self) -> str:
        return f"delivery {self.id} (attempt {self.attempt}) of {self._loans.topic}/{self._loans.group_name}"

    def __repr__(self) -> str:
        return f"<Delivery {self.id} of {self.topic}/{self._loans.group_name} attempt {self.attempt} {self.state}>"

    def __del__(self) -> None:
        if self._state is _LENT and self._code is not None:
            self._loans.dropped_unsettled(self)
