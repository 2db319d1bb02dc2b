"""The one tree of errors: what failed, on what, whether trying again may help, and what to do.

Knows no client library; adapters translate theirs into these and keep the original as `__cause__`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

__all__ = [
    "AccessError",
    "AlreadySettledError",
    "AmbiguousDriverError",
    "BrokerUnavailableError",
    "ClosedError",
    "ConfigError",
    "ContractError",
    "DroppedError",
    "GroupConflictError",
    "GroupMissingError",
    "LeaseLostError",
    "MissingClientError",
    "NotPublishedError",
    "PublishError",
    "PublishUnknownError",
    "Reject",
    "SettleError",
    "Stored",
    "TimedOutError",
    "TooLargeError",
    "TopicConflictError",
    "TopicFullError",
    "TopicMissingError",
    "UnistreamError",
    "UnknownSchemeError",
    "UnsupportedError",
    "WindowFullError",
]

Stored = Literal["no", "unknown"]


class UnistreamError(Exception):
    """Anything that unistream raises.

    Attributes:
        driver: Scheme of the driver concerned, for example `"redis"`, or `None`.
        topic: Topic concerned, or `None`.
        retryable: True where the same call may succeed later without any change by the caller.
        stored: On every error that `publish` raises: `"no"` (surely not stored) or `"unknown"`; else `None`.
    """

    retryable: bool = False
    stored: Stored | None = None

    def __init__(
        self,
        message: str = "",
        *,
        driver: str | None = None,
        topic: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.driver = driver
        self.topic = topic
        if retryable is not None:
            self.retryable = retryable


class ConfigError(UnistreamError, ValueError):
    """Something in the program or its configuration is wrong; raised before any I/O."""


class UnknownSchemeError(ConfigError):
    """No installed driver serves the URL's scheme."""


class MissingClientError(ConfigError):
    """The client library of the driver is not installed."""


class AmbiguousDriverError(ConfigError):
    """Two installed distributions claim the same scheme."""


class UnsupportedError(UnistreamError):
    """The backend does not offer a capability that was asked for; raised at open, nothing was touched.

    Attributes:
        capability: Name of the missing capability, for example `"seek"`.
    """

    def __init__(
        self, message: str = "", *, capability: str = "", driver: str | None = None, topic: str | None = None
    ) -> None:
        super().__init__(message, driver=driver, topic=topic)
        self.capability = capability


class ClosedError(UnistreamError):
    """Used after close, from another event loop, or after a fork."""


class BrokerUnavailableError(UnistreamError):
    """The broker can't be reached just now: refused, lost, restarting, electing."""

    retryable = True


class TimedOutError(UnistreamError, TimeoutError):
    """The caller's own timeout passed."""

    retryable = True


class AccessError(UnistreamError):
    """The broker refused the credentials, or the right to do this."""


class TopicMissingError(UnistreamError):
    """The topic does not exist, or was deleted."""


class GroupMissingError(UnistreamError):
    """The group does not exist, or was deleted."""


class TopicConflictError(UnistreamError):
    """A topic of that name exists with other settings."""


class GroupConflictError(UnistreamError):
    """A group of that name exists with other settings."""


class PublishError(UnistreamError):
    """A message was not confirmed; `stored` says whether it may be there all the same."""

    stored: Stored | None = "unknown"


class NotPublishedError(PublishError):
    """Surely not stored: refused, or never handed to the broker."""

    stored: Stored | None = "no"


class TooLargeError(NotPublishedError):
    """The message is larger than the backend takes."""


class TopicFullError(NotPublishedError):
    """The topic's `max_backlog` is reached.

    `stored` is `"no"` where the backend decides for the whole topic, `"unknown"` where it decides per group.
    """

    retryable = True

    def __init__(
        self,
        message: str = "",
        *,
        stored: Stored = "no",
        driver: str | None = None,
        topic: str | None = None,
    ) -> None:
        super().__init__(message, driver=driver, topic=topic)
        self.stored = stored


class WindowFullError(NotPublishedError):
    """The producer's window stayed full for the whole timeout, or was full and `when_full="fail"`."""

    retryable = True


class DroppedError(NotPublishedError):
    """The producer's `when_full` policy dropped the message before it was handed to the broker."""


class PublishUnknownError(PublishError):
    """The message may be stored: the connection was lost, or no answer came in time."""

    retryable = True


class SettleError(UnistreamError):
    """A delivery could not be settled as asked; this class itself: no answer came, the broker may hold the settle."""


class LeaseLostError(SettleError):
    """The lease had ended; the message is lent again, maybe to another member."""


class AlreadySettledError(SettleError):
    """The delivery was settled before, differently; nothing changed."""


class ContractError(UnistreamError):
    """A driver, or the library itself, broke the driver contract: a defect, please report it."""


class Reject(Exception):  # noqa: N818 - an instruction raised by a handler, not an error of the library
    """Raised by a handler: reject this delivery for `reason`, never deliver it to this group again."""

    retryable: ClassVar[bool] = False

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
        self.reason = reason
