"""An event loop in a thread, for the blocking face: runs coroutines there and waits for them here."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from unistream.errors import ClosedError

__all__ = ["Portal", "soon"]

T = TypeVar("T")


class Portal:
    """One event loop in one daemon thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._gate = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._stopped:
            try:
                self.loop.run_forever()
            except (KeyboardInterrupt, SystemExit):
                # Raised by a handler: asyncio lets it end the loop, but it is the result of the call that it came from.
                continue

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """
        Run a coroutine on the loop and wait for its result.

        On any exception here (KeyboardInterrupt) it is cancelled *and waited for*: an abandoned call would eat the next
        message.

        Raises:
            ClosedError: The portal is closed, this is its own thread, or the process was forked.
        """
        try:
            self._check()
            # Under the lock: what is posted is started before `close` cancels everything, so nobody waits for ever.
            with self._gate:
                if self._stopped:
                    raise _closed()
                call = _Call(self.loop, coroutine)
        except ClosedError:
            coroutine.close()
            raise
        try:
            return call.done.result()
        except asyncio.CancelledError:
            raise _closed() from None
        except BaseException:
            if not call.done.done():
                self.loop.call_soon_threadsafe(call.cancel)
                concurrent.futures.wait([call.done])
            raise

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError("this process was forked from the one that connected; connect() after the fork")
        if threading.current_thread() is self._thread:
            raise ClosedError("a blocking call inside the event loop of unistream.sync would wait for itself for ever")
        if self._stopped:
            raise _closed()

    def close(self) -> None:
        """Stop the loop and its thread. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._gate:
            if self._stopped:
                return
            self._stopped = True
            rest = _Call(self.loop, _cancel_the_rest())
        rest.done.result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


def _closed() -> ClosedError:
    return ClosedError("the client is closed; connect() again")


class _Call(Generic[T]):
    """A coroutine on its way through the loop; `done` is done when it has ended, however it ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> None:
        self.done: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._coroutine = coroutine
        loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._ended)

    def cancel(self) -> None:
        self._task.cancel()

    def _ended(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.done.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(task.result())


async def _cancel_the_rest() -> None:
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest)


async def soon(call: Callable[[], T]) -> T:
    """A plain call as a coroutine, to be made on the loop."""
    return call()
