"""The thread that owns a blocking client, where nobody closes it."""

from __future__ import annotations

import asyncio
import gc

from unistream.driver.owner_thread import OwnerThread


def test_a_thread_that_nobody_closed_ends_with_its_owner() -> None:
    """A client that is forgotten, as after a death that a test plays, leaves no thread behind."""

    async def test() -> None:
        owner = OwnerThread("forgotten")
        thread = owner._thread
        assert await owner.call(lambda: 7) == 7
        del owner
        gc.collect()
        await asyncio.to_thread(thread.join, 10.0)

        assert not thread.is_alive()

    asyncio.run(test())
