"""The life of a delivery: its states, and the one table of transitions; if code and table disagree, the table wins."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from unistream.errors import AlreadySettledError, LeaseLostError, SettleError

__all__ = ["TRANSITIONS", "Move", "State", "refusal"]


class State(StrEnum):
    """Where a delivery stands."""

    LENT = "lent"
    ACKED = "acked"
    NACKED = "nacked"
    REJECTED = "rejected"
    LOST = "lost"


class Move(StrEnum):
    """What can happen to it. `LOSE`: its lease ended, or the broker refused a settle that was accepted for sending."""

    ACK = "ack"
    NACK = "nack"
    REJECT = "reject"
    LOSE = "lose"


TRANSITIONS: Final = {
    (State.LENT, Move.ACK): State.ACKED,
    (State.LENT, Move.NACK): State.NACKED,
    (State.LENT, Move.REJECT): State.REJECTED,
    (State.LENT, Move.LOSE): State.LOST,
    # Settling is idempotent (DEL-5).
    (State.ACKED, Move.ACK): State.ACKED,
    (State.NACKED, Move.NACK): State.NACKED,
    (State.REJECTED, Move.REJECT): State.REJECTED,
    # The broker's refusal arrives after the settle returned (DEL-7).
    (State.ACKED, Move.LOSE): State.LOST,
    (State.NACKED, Move.LOSE): State.LOST,
    (State.REJECTED, Move.LOSE): State.LOST,
    (State.LOST, Move.LOSE): State.LOST,
}
"""State and move to the next state; what is not in it is refused."""


def refusal(state: State, move: Move, what: str) -> SettleError:
    """The error for a move that the table does not have; `what` names the delivery."""
    if state is State.LOST:
        return LeaseLostError(
            f"{move} of {what}: its lease has ended and the message is lent again; "
            "make the handler faster, or raise the group's lease or max_lease"
        )
    return AlreadySettledError(f"{move} of {what}: it is {state} already; settle a delivery once")
