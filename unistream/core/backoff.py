"""Knows how long to wait before the next try and how often to try; has no clock, draws no random numbers."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from unistream.errors import ConfigError

__all__ = ["RECONNECT", "Backoff", "Retry"]


# Defined first: the default of Retry.backoff is made, and so checked, while this module is read.
def _check(name: str, value: float, *, at_least: float, at_most: float = sys.float_info.max) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not at_least <= value <= at_most:  # false for nan and the infinities too
        wanted = f"of {at_least:g} or more" if at_most == sys.float_info.max else f"from {at_least:g} to {at_most:g}"
        raise ConfigError(f"{name} is {value!r}; give a number {wanted}")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waiting times that grow from `first` by `factor` per attempt up to `max`, each spread by `jitter`.

    Attributes:
        first: Seconds to wait after the first attempt, 0 or more. 0 means never to wait.
        factor: Growth per attempt, 1 or more.
        max: Seconds that no wait exceeds, jitter included; at least `first`.
        jitter: Part of the wait, 0 to 1, by which it is spread to either side, so that many members that
            failed at once do not come back at once.

    Raises:
        ConfigError: A value is out of range.
    """

    first: float = 1.0
    factor: float = 2.0
    max: float = 300.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check("Backoff.first", self.first, at_least=0.0)
        _check("Backoff.factor", self.factor, at_least=1.0)
        _check("Backoff.max", self.max, at_least=0.0)
        _check("Backoff.jitter", self.jitter, at_least=0.0, at_most=1.0)
        if self.max < self.first:
            raise ConfigError(
                f"Backoff.max, {self.max:g} s, is less than Backoff.first, {self.first:g} s; raise max or lower first"
            )

    def delay(self, attempt: int, random: float) -> float:
        """Return the seconds to wait after the failure of `attempt`.

        Args:
            attempt: The attempt that failed, 1 first; any size.
            random: A number in [0, 1) drawn by the caller: 0 gives the shortest wait, 0.5 the middle.

        Raises:
            ValueError: `attempt` is less than 1.
        """
        if attempt < 1:
            raise ValueError(f"Backoff.delay: attempt is {attempt}; attempts are counted from 1")
        # The middle stays so far below max that the spread around it does not pass max: clipping after the
        # spread would put half of all long waits on the same second.
        ceiling = self.max / (1.0 + self.jitter)
        if self.first == 0.0 or self.factor == 1.0:
            middle = min(ceiling, self.first)
        else:
            try:
                middle = min(ceiling, self.first * float(self.factor) ** (attempt - 1))
            except OverflowError:  # attempt 1025 on with factor 2: longer than any wait
                middle = ceiling
        return middle * (1.0 + self.jitter * (2.0 * random - 1.0))


@dataclass(frozen=True, slots=True)
class Retry:
    """The redelivery policy of a group's member: how often a message is lent, and how long apart.

    Attributes:
        max_attempts: Lendings of one message before it is dead-lettered, 1 or more; `None` for no end. With
            a number the group needs a `dead_letter` topic, or `unistream.DROP` where losing them is meant.
        backoff: How long a nacked delivery rests when the nack names no delay.

    Raises:
        ConfigError: A value is out of range or of another type.
    """

    max_attempts: int | None = None
    backoff: Backoff = Backoff()

    def __post_init__(self) -> None:
        """Check the ranges."""
        attempts = self.max_attempts
        if attempts is not None and (not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1):
            raise ConfigError(
                f"Retry.max_attempts is {attempts!r}; give a whole number of 1 or more, or None for no end"
            )
        if not isinstance(self.backoff, Backoff):
            raise ConfigError(f"Retry.backoff is {self.backoff!r}; give a Backoff, for example Backoff(first=0.5)")

    def exhausted(self, attempt: int) -> bool:
        """Return True if `attempt` (1 first) was the last one that the policy grants (DEL-4)."""
        return self.max_attempts is not None and attempt >= self.max_attempts


# How the library comes back to a broker that it lost (END-3): after about 0.1 s, then ever slower. Spread
# widely, because all members of all groups lose a broker in the same instant.
RECONNECT = Backoff(first=0.1, factor=2.0, max=5.0, jitter=0.5)
