"""What the broker refuses, and why; the broker's own tree, which its drivers translate."""

from __future__ import annotations

__all__ = [
    "BrokerError",
    "GroupMissing",
    "InvalidRequest",
    "PositionOutOfRange",
    "SessionEnded",
    "TopicMissing",
]


class BrokerError(Exception):
    """Anything that the broker refuses. Nothing was changed."""


class InvalidRequest(BrokerError):  # noqa: N818 - these names say the reason; a suffix on each would add nothing
    """The command makes no sense: a bound that is not positive, an ordered group on an unordered topic."""


class TopicMissing(BrokerError):  # noqa: N818
    """There is no topic of that name, or it was deleted under a session."""


class GroupMissing(BrokerError):  # noqa: N818
    """The topic has no group of that name, or it was deleted under a session."""


class SessionEnded(BrokerError):  # noqa: N818
    """The session left, or was declared lost."""


class PositionOutOfRange(BrokerError):  # noqa: N818
    """An offset beyond the end of the topic was asked for."""
