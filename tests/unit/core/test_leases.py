"""Leases: when they are renewed, when they end; on numbers, no clock."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unistream.core.leases import Lease, Leases

seconds = st.floats(0.01, 10_000)
starts = st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e9))


def renew_all(leases: Leases, now: float) -> int:
    """Renew what is due at `now`, as a broker that answers at once would; return how many."""
    due = leases.due(now)
    for lease, asked in due.items():
        leases.renewed(lease, now, asked)
    return len(due)


@given(starts, seconds, st.floats(1, 50))
def test_lease_renewed_whenever_it_is_due_lasts_until_max_lease_and_no_longer(
    start: float, lease: float, factor: float
) -> None:
    """DEL-6: a member that wakes when told to keeps the loan for `max_lease`, by about three renewals per lease."""
    leases = Leases(lease, lease * factor)
    granted = leases.grant(start, 1)
    now, renewals = start, 0
    while not leases.expired(now):
        assert leases.next_at() > now, "told to wake up at once, again and again"
        now = leases.next_at()
        renewals += renew_all(leases, now)
        assert renewals <= 3 * factor + 2

    assert now == pytest.approx(start + lease * factor, rel=1e-12)
    leases.drop(granted)
    assert leases.next_at() == inf


@given(starts, seconds, st.floats(0.01, 1))
def test_lease_with_max_lease_no_longer_than_it_is_never_renewed(start: float, lease: float, part: float) -> None:
    """`max_lease=lease` turns renewal off; a shorter `max_lease` also ends the loan earlier."""
    leases = Leases(lease, lease * part)
    granted = leases.grant(start, 3)

    assert leases.due(granted.deadline - lease * part / 2) == {}
    assert leases.next_at() == granted.deadline == start + lease * part
    assert leases.expired(granted.deadline) == [granted]


def test_lease_is_due_when_a_third_has_passed_and_those_nearly_due_come_along() -> None:
    """Renewals are gathered: what would be due within a sixth of a lease is renewed with what is due now."""
    leases = Leases(30.0, 3600.0)
    first = leases.grant(100.0, 1)
    near = leases.grant(104.0, 1)
    far = leases.grant(109.0, 1)

    assert leases.next_at() == 110.0
    assert leases.due(110.0) == {first: 30.0, near: 30.0}
    assert far.deadline == 139.0


def test_lease_that_is_already_over_is_not_renewed() -> None:
    """Who wakes up too late asks for nothing: the message may be lent to another member by now."""
    leases = Leases(30.0, 3600.0)
    late = leases.grant(0.0, 1)

    assert leases.due(30.0) == {}
    assert leases.expired(30.0) == [late]
    assert leases.expired(29.999) == []


def test_renewal_counts_from_the_time_it_was_asked_for() -> None:
    """The local lease ends before the broker's: the answer's way back is not counted in."""
    leases = Leases(30.0, 3600.0)
    granted = leases.grant(0.0, 1)
    leases.renewed(granted, asked_at=10.0, seconds=30.0)

    assert granted.deadline == 40.0


def test_renewal_answered_out_of_turn_never_shortens_a_lease() -> None:
    """An answer that was long on its way does not undo a newer one."""
    leases = Leases(30.0, 3600.0)
    granted = leases.grant(0.0, 1)
    leases.renewed(granted, asked_at=20.0, seconds=30.0)
    leases.renewed(granted, asked_at=10.0, seconds=30.0)

    assert granted.deadline == 50.0


@pytest.mark.parametrize("until", [20.0, 400.0])
def test_split_lease_lives_by_its_own_times(until: float) -> None:
    """One delivery of a fetch that was extended, or let go of, leaves the others' lease as it was."""
    leases = Leases(30.0, 3600.0)
    shared = leases.grant(0.0, 2)
    own = leases.split(shared, deadline=20.0, until=until)

    assert (shared.deadline, shared.held) == (30.0, 1)
    assert (own.deadline, own.until, own.held) == (20.0, until, 1)
    assert leases.expired(20.0) == [own]
    assert (own in leases.due(10.0)) is (until > 20.0)


class LeasesMachine(RuleBasedStateMachine):
    """`Leases` against a plain list of loans, with renewals that are answered late or never."""

    @initialize(start=starts, lease=st.floats(0.5, 100), factor=st.floats(1, 20))
    def make(self, start: float, lease: float, factor: float) -> None:
        """Any lease and any longer max_lease, from any time on."""
        self.now, self.lease, self.max_lease = start, lease, lease * factor
        self.leases = Leases(lease, self.max_lease)
        self.held: dict[Lease, int] = {}
        self.granted: dict[Lease, float] = {}
        self.asked: list[tuple[Lease, float, float]] = []

    @rule(count=st.integers(1, 4))
    def grant(self, count: int) -> None:
        """A fetch comes in."""
        lease = self.leases.grant(self.now, count)
        self.held[lease] = count
        self.granted[lease] = self.now

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """One of the deliveries is settled; with its last one a lease is forgotten."""
        lease = data.draw(st.sampled_from(list(self.held)))
        self.release(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), part=st.floats(0.1, 1))
    def split(self, data: st.DataObject, part: float) -> None:
        """The application lets go of a delivery: it keeps its deadline and is renewed no more."""
        lease = data.draw(st.sampled_from(list(self.held)))
        own = self.leases.split(lease, lease.deadline, lease.deadline)
        self.held[own] = 1
        self.granted[own] = self.granted[lease]
        self.held[lease] -= 1
        if not self.held[lease]:
            del self.held[lease]

    def release(self, lease: Lease) -> None:
        """Drop one delivery of `lease` in both."""
        self.leases.drop(lease)
        self.held[lease] -= 1
        if not self.held[lease]:
            del self.held[lease]

    @rule(part=st.floats(0, 0.5))
    def wait(self, part: float) -> None:
        """Time passes, and what has ended is dropped."""
        self.now += self.lease * part
        ended = [lease for lease in self.held if lease.deadline <= self.now]
        assert set(self.leases.expired(self.now)) == set(ended)
        for lease in ended:
            for _ in range(self.held[lease]):
                self.release(lease)

    @rule()
    def ask(self) -> None:
        """What is due is asked for: only leases that can still be kept, and no longer than max_lease."""
        for lease, asked in self.leases.due(self.now).items():
            assert lease in self.held
            assert self.now < lease.deadline < lease.until
            assert lease.deadline - self.now <= self.lease * 5 / 6 * (1 + 1e-9) + 1e-6
            assert 0 < asked <= self.lease
            self.asked.append((lease, self.now, asked))

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), answered=st.booleans())
    def answer(self, data: st.DataObject, answered: bool) -> None:
        """Some renewals are answered, in any order, some never; some for leases that are gone by then."""
        lease, at, asked = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        before = lease.deadline
        if answered:
            self.leases.renewed(lease, at, asked)
        assert before <= lease.deadline

    @invariant()
    def holds(self) -> None:
        """No loan outlives max_lease, counts agree, and the next wake-up is that of the earliest lease."""
        assert {lease: lease.held for lease in self.held} == self.held
        for lease in self.held:
            assert lease.deadline <= lease.until * (1 + 1e-12)  # asked_at + (until - asked_at) may round up
            assert lease.until <= self.granted[lease] + self.max_lease
        assert (self.leases.next_at() == inf) is (not self.held)
        if self.held:
            at = self.leases.next_at()
            assert at <= min(lease.deadline for lease in self.held)
            assert self.leases.expired(at) or self.leases.due(at) or at < self.now


TestLeases = LeasesMachine.TestCase
