"""Who waits for the commit that stores settles."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping

from unistream_kafka.progress import Progress

__all__ = ["Waiter", "answer"]


class Waiter:
    """
    The settles of one call, from the moment at which they are counted until a commit that holds them is answered.

    Args:
        loop: The event loop.
        settled: Token of a loan -> the partition in which its message is settled.
        doubtful: Those of them that an earlier commit, whose answer never came, may have stored already.

    Attributes:
        decided: Resolved with what became of the commit; `None`: it stands.
        gone: Partitions that went to others before a commit was sent, or again after one was refused: what is settled
            there is not stored.
    """

    __slots__ = ("decided", "doubtful", "gone", "settled")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, settled: Mapping[int, Progress], doubtful: Collection[int] = ()
    ) -> None:
        self.decided: asyncio.Future[BaseException | None] = loop.create_future()
        self.settled = settled
        self.doubtful = doubtful
        self.gone: set[Progress] = set()

    def miss(self, gone: Iterable[Progress]) -> None:
        """Take note of partitions that are another's by now."""
        self.gone.update(gone)


def answer(waiters: Iterable[Waiter], error: BaseException | None) -> None:
    """Tell those who wait for a commit."""
    for waiter in waiters:
        if not waiter.decided.done():
            waiter.decided.set_result(error)
