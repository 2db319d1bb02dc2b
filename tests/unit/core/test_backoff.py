"""Waiting times and the redelivery policy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unistream.core.backoff import RECONNECT, Backoff, Retry
from unistream.errors import ConfigError

chance = st.floats(0, 1, exclude_max=True)
backoffs = st.builds(
    lambda first, factor, extra, jitter: Backoff(first=first, factor=factor, max=first + extra, jitter=jitter),
    st.floats(0, 1e6),
    st.floats(1, 1e6),
    st.floats(0, 1e6),
    st.floats(0, 1),
)


@pytest.mark.parametrize(("attempt", "expected"), [(1, 1.0), (2, 2.0), (3, 4.0), (8, 128.0)])
def test_delay_without_jitter_grows_from_first_by_factor(attempt: int, expected: float) -> None:
    """Attempt 1 waits `first`, each later one `factor` times as long as the one before."""
    assert Backoff(first=1, factor=2, max=300, jitter=0).delay(attempt, 0.9) == expected


def test_delay_with_jitter_is_spread_to_both_sides() -> None:
    """Chance 0 gives the shortest wait, 0.5 the middle, just under 1 the longest."""
    backoff = Backoff(first=10, factor=2, max=300, jitter=0.1)

    assert backoff.delay(1, 0.0) == pytest.approx(9.0)
    assert backoff.delay(1, 0.5) == pytest.approx(10.0)
    assert backoff.delay(1, math.nextafter(1, 0)) == pytest.approx(11.0)


def test_delay_at_its_maximum_is_still_spread() -> None:
    """Long waits differ from one another too: members that failed together do not return together."""
    backoff = Backoff(first=1, factor=2, max=300, jitter=0.1)

    assert backoff.delay(50, math.nextafter(1, 0)) == pytest.approx(300.0)
    assert backoff.delay(50, 0.0) == pytest.approx(300.0 * 0.9 / 1.1)


@given(backoffs, st.integers(1, 10**30), chance)
def test_delay_of_any_attempt_is_finite_and_within_its_bounds(backoff: Backoff, attempt: int, random: float) -> None:
    """No attempt number overflows, no wait is negative or exceeds `max`."""
    delay = backoff.delay(attempt, random)

    assert 0.0 <= delay <= backoff.max * (1 + 1e-12)
    assert isinstance(delay, float)


@given(backoffs, st.integers(1, 5000), chance)
def test_delay_with_the_same_chance_never_falls(backoff: Backoff, attempt: int, random: float) -> None:
    """A later attempt waits at least as long as an earlier one."""
    assert backoff.delay(attempt + 1, random) >= backoff.delay(attempt, random)


@given(backoffs, st.integers(1, 5000), chance, chance)
def test_delay_with_more_chance_is_longer(backoff: Backoff, attempt: int, one: float, other: float) -> None:
    """The wait rises with the number drawn, so that spread-out numbers give spread-out waits."""
    low, high = sorted((one, other))

    assert backoff.delay(attempt, low) <= backoff.delay(attempt, high)


def test_delay_with_whole_numbers_and_a_huge_attempt_is_the_maximum() -> None:
    """Whole numbers, as a TOML file gives them, do not lead into arithmetic with millions of digits."""
    assert Backoff(first=1, factor=3, max=60, jitter=0).delay(10**9, 0.0) == 60


def test_delay_that_does_not_grow_is_the_same_after_any_number_of_attempts() -> None:
    """No wait stays no wait and a constant stays constant, where the growth itself would overflow."""
    assert Backoff(first=0, max=60).delay(10**6, 0.9) == 0
    assert Backoff(first=2, factor=1, jitter=0).delay(10**400, 0.9) == 2


@pytest.mark.parametrize("attempt", [0, -1])
def test_delay_of_an_attempt_below_one_is_refused(attempt: int) -> None:
    """Attempts are counted from 1; anything less is the caller's defect and says so."""
    with pytest.raises(ValueError, match=f"attempt is {attempt}; attempts are counted from 1"):
        Backoff().delay(attempt, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first": -1.0}, r"Backoff\.first is -1\.0; give a number of 0 or more"),
        ({"first": math.nan}, r"Backoff\.first is nan; give a number of 0 or more"),
        ({"first": "1s"}, r"Backoff\.first is '1s'; give a number of 0 or more"),
        ({"first": True}, r"Backoff\.first is True; give a number of 0 or more"),
        ({"factor": 0.5}, r"Backoff\.factor is 0\.5; give a number of 1 or more"),
        ({"factor": math.inf}, r"Backoff\.factor is inf; give a number of 1 or more"),
        ({"max": math.inf}, r"Backoff\.max is inf; give a number of 0 or more"),
        ({"max": 10**400}, r"Backoff\.max is 10+; give a number of 0 or more"),
        ({"jitter": 1.5}, r"Backoff\.jitter is 1\.5; give a number from 0 to 1"),
        ({"jitter": None}, r"Backoff\.jitter is None; give a number from 0 to 1"),
        (
            {"first": 10.0, "max": 5.0},
            r"Backoff\.max, 5 s, is less than Backoff\.first, 10 s; raise max or lower first",
        ),
    ],
)
def test_backoff_out_of_range_is_a_config_error_that_says_what_to_do(values: dict[str, float], message: str) -> None:
    """Each bad value is named with what would be right; the error is a ValueError too."""
    with pytest.raises(ConfigError, match=message) as raised:
        Backoff(**values)

    assert isinstance(raised.value, ValueError)


def test_retry_by_default_redelivers_for_ever_with_the_default_backoff() -> None:
    """The default policy drops nothing: no attempt is the last."""
    retry = Retry()

    assert retry.backoff == Backoff(first=1.0, factor=2.0, max=300.0, jitter=0.1)
    assert not retry.exhausted(10**9)


def test_retry_with_a_limit_is_exhausted_at_it() -> None:
    """The attempt that equals `max_attempts` is the last one."""
    retry = Retry(max_attempts=3)

    assert [retry.exhausted(attempt) for attempt in (1, 2, 3, 4)] == [False, False, True, True]


@pytest.mark.parametrize("attempts", [0, -3, 2.5, "3", True])
def test_retry_with_a_bad_limit_is_a_config_error(attempts: int) -> None:
    """`max_attempts` is a whole number of 1 or more, or None."""
    with pytest.raises(ConfigError, match=r"Retry\.max_attempts is .*; give a whole number of 1 or more, or None"):
        Retry(max_attempts=attempts)


def test_retry_with_a_number_as_backoff_is_a_config_error() -> None:
    """Seconds where a Backoff belongs are caught at once, not at the first nack."""
    with pytest.raises(ConfigError, match=r"Retry\.backoff is 5; give a Backoff"):
        Retry(backoff=5)  # type: ignore[arg-type]


def test_policies_are_values() -> None:
    """Equal policies are equal, hash equal, and can't be changed in place."""
    assert hash(Retry(3, Backoff(0.5))) == hash(Retry(3, Backoff(0.5)))
    with pytest.raises(AttributeError):
        Backoff().first = 2.0  # type: ignore[misc]


def test_reconnect_starts_fast_and_stays_under_five_seconds() -> None:
    """A restarted broker is found again within seconds, however long it was away."""
    assert 0.05 <= RECONNECT.delay(1, 0.0) <= RECONNECT.delay(1, 0.999) <= 0.15
    assert RECONNECT.delay(10**6, 0.999) <= 5.0
