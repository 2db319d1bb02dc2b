"""The window: credit in messages and in bytes."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unistream.core.window import Window

sizes = st.integers(0, 50)


class WindowMachine(RuleBasedStateMachine):
    """`Window` against the list of what is out, for a caller that asks before it takes."""

    @initialize(limit=st.integers(1, 5), limit_bytes=st.integers(1, 100))
    def make(self, limit: int, limit_bytes: int) -> None:
        """Any limits of 1 or more."""
        self.limit, self.limit_bytes = limit, limit_bytes
        self.window = Window(limit, limit_bytes)
        self.out: list[int] = []

    @rule(size=sizes)
    def offer(self, size: int) -> None:
        """What fits goes out; it fits if both limits hold with it, or if nothing is out."""
        both = len(self.out) + 1 <= self.limit and sum(self.out) + size <= self.limit_bytes

        assert self.window.fits(size) is (both or not self.out)
        if self.window.fits(size):
            self.window.take(size)
            self.out.append(size)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """Anything that is out may come back, in any order."""
        self.window.give(self.out.pop(data.draw(st.integers(0, len(self.out) - 1))))

    @invariant()
    def counts(self) -> None:
        """The counts are those of the list; the limits hold, but for one message that is alone."""
        assert self.window.messages == len(self.out)
        assert self.window.bytes == sum(self.out)
        assert len(self.out) <= self.limit
        assert sum(self.out) <= self.limit_bytes or len(self.out) == 1


TestWindow = WindowMachine.TestCase


@given(st.integers(1, 5), st.integers(1, 100), st.lists(sizes, max_size=20))
def test_window_that_was_filled_and_emptied_is_as_new(limit: int, limit_bytes: int, taken: list[int]) -> None:
    """No credit is lost or made by use, also where more was taken than fits (a fetch larger than asked for)."""
    window = Window(limit, limit_bytes)
    for size in taken:
        window.take(size)
    full = bool(taken) and not window.fits(0)
    for size in taken:
        window.give(size)

    assert full is (len(taken) >= limit or sum(taken) > limit_bytes)
    assert (window.messages, window.bytes) == (0, 0)
    assert window.fits(10**9)
