"""The credit of one side, in messages and in bytes; knows no time and no tasks."""

from __future__ import annotations

__all__ = ["Window"]


class Window:
    """
    Counts what is out against two limits.

    One message always fits an empty window, however large it is: refusing it for ever would help nobody.

    Attributes:
        messages: Messages out.
        bytes: Their bytes.
    """

    __slots__ = ("bytes", "limit", "limit_bytes", "messages")

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self.limit = limit
        self.limit_bytes = limit_bytes
        self.messages = 0
        self.bytes = 0

    def fits(self, size: int) -> bool:
        """Whether one more message of `size` bytes may go out."""
        messages = self.messages
        return messages == 0 or (messages < self.limit and self.bytes + size <= self.limit_bytes)

    def take(self, size: int) -> None:
        """One message of `size` bytes goes out."""
        self.messages += 1
        self.bytes += size

    def give(self, size: int) -> None:
        """One message of `size` bytes is back."""
        self.messages -= 1
        self.bytes -= size
