"""The life of a delivery: what the table allows, and what it refuses with which error."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unistream.core.lifecycle import TRANSITIONS, Move, State, refusal
from unistream.errors import AlreadySettledError, LeaseLostError

SETTLED_BY = {Move.ACK: State.ACKED, Move.NACK: State.NACKED, Move.REJECT: State.REJECTED}


def walk(moves: list[Move]) -> tuple[State, list[Move]]:
    """Return the state after `moves` and those of them that the table refused."""
    state = State.LENT
    refused = []
    for move in moves:
        following = TRANSITIONS.get((state, move))
        if following is None:
            refused.append(move)
        else:
            state = following
    return state, refused


def test_table_reaches_every_state_and_leads_nowhere_else() -> None:
    """Each state can be reached from `lent`, and no transition comes back to it."""
    reached = {State.LENT}
    for _ in State:
        reached |= {following for (state, _), following in TRANSITIONS.items() if state in reached}

    assert reached == set(State)
    assert State.LENT not in TRANSITIONS.values()


def test_lent_delivery_accepts_every_move() -> None:
    """From `lent` each way of settling leads to its own state, and losing the lease to `lost`."""
    expected = {**SETTLED_BY, Move.LOSE: State.LOST}

    assert {move: TRANSITIONS[State.LENT, move] for move in Move} == expected


@given(st.lists(st.sampled_from(Move), max_size=8))
def test_delivery_after_any_moves_is_in_the_state_of_the_first_settle_or_lost(moves: list[Move]) -> None:
    """DEL-5 and DEL-7: the first settle stands, repeating it changes nothing, a lost lease overrides all."""
    before_loss = moves[: moves.index(Move.LOSE)] if Move.LOSE in moves else moves
    if Move.LOSE in moves:
        expected = State.LOST
    elif before_loss:
        expected = SETTLED_BY[before_loss[0]]
    else:
        expected = State.LENT
    different = [move for move in before_loss if move is not before_loss[0]]
    late = [move for move in moves[len(before_loss) :] if move is not Move.LOSE]

    assert walk(moves) == (expected, different + late)


@pytest.mark.parametrize(("state", "move"), [pair for pair in product(State, Move) if pair not in TRANSITIONS])
def test_refused_move_names_itself_the_delivery_and_the_remedy(state: State, move: Move) -> None:
    """A settle of a lost delivery is LeaseLostError, a second different one AlreadySettledError."""
    error = refusal(state, move, "orders/3@17 in billing")

    assert type(error) is (LeaseLostError if state is State.LOST else AlreadySettledError)
    assert f"{move.value} of orders/3@17 in billing" in str(error)
    if state is State.LOST:
        assert "raise the group's lease" in str(error)
    else:
        assert f"it is {state.value} already; settle a delivery once" in str(error)


def test_losing_a_lease_is_never_refused() -> None:
    """The broker's word that a loan ended is taken in every state."""
    assert {TRANSITIONS[state, Move.LOSE] for state in State} == {State.LOST}
