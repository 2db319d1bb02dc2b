"""Knows how to act on the broker by the commands that the user gave, and to prove that they took effect.

The proof needs no knowledge of the broker: a witness holds a connection. A broker that was restarted or killed has
ended it; one that is paused keeps it and answers nothing; one that goes on answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from unistream.conformance.trial import Trial, VacuousError
from unistream.conformance.wires import over, unwired
from unistream.errors import UnistreamError

if TYPE_CHECKING:
    from unistream import Client
    from unistream.conformance.connection import Connection
    from unistream.conformance.proxy import Proxy

RESTART, KILL9, PAUSE, RESUME = HOOKS = ("restart", "kill9", "pause", "resume")
"""`restart` and `kill9` return when the broker is up again; `pause` freezes it until `resume`."""

COMMAND_SECONDS = 180.0
"""How long a hook's command may take."""


async def _command(trial: Trial, hook: str) -> None:
    process = await asyncio.create_subprocess_shell(
        trial.target.hooks[hook], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise VacuousError(f"the hook {hook} did not end within {COMMAND_SECONDS:.0f} s") from None
    if process.returncode != 0:
        raise VacuousError(f"the hook {hook} failed: {said.decode(errors='replace').strip()[-300:]}")


class Broker:
    """The broker as the hooks reach it, and the witness of what they do."""

    def __init__(self, trial: Trial, client: Client, proxy: Proxy) -> None:
        self._trial = trial
        self._client = client
        self._proxy = proxy

    async def strike(self, hook: str) -> None:
        """
        Restart or kill the broker; return when it is up again.

        Raises:
            VacuousError: The command failed, or nobody noticed it, or there was nobody to notice it.
        """
        trial = self._trial
        standing = await self._standing()
        since = trial.recorder.now()
        try:
            await _command(trial, hook)
            async with asyncio.timeout(trial.pace.patience):
                # Told to close, a client may be the one to end it. Left alone, an idle one keeps it.
                await self._proxy.moved.until(lambda: any(each.ended in ("broker", "client") for each in standing))
        except TimeoutError:
            raise VacuousError(f"the hook {hook} ended, and the broker had dropped no connection") from None
        finally:
            trial.recorder.record("fault", since=since, note=f"broker {hook}")
        trial.tally("struck")

    async def _standing(self) -> list[Connection]:
        """Return the witness's connections; an idle client may not have replaced what the strike before ended."""
        try:
            async with asyncio.timeout(self._trial.pace.patience):
                while not any(self._proxy.live):
                    health = await self._client.health()
                    if not health.ok:
                        await asyncio.sleep(self._trial.pace.slack)
        except TimeoutError:
            raise VacuousError("the witness could not connect to the broker before it was to be struck") from None
        return list(self._proxy.live)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """
        Freeze the broker as long as this lasts.

        Raises:
            VacuousError: A command failed, or the broker answered all the same.
        """
        trial = self._trial
        since = trial.recorder.now()
        await _command(trial, PAUSE)
        try:
            if await self._answers():
                raise VacuousError("the hook pause ended, and the broker still answers")
            trial.tally("paused")
            yield
        finally:
            await _command(trial, RESUME)
            trial.recorder.record("fault", since=since, note="broker paused")

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(self._trial.pace.silence):
                return (await self._client.health()).ok
        except (TimeoutError, UnistreamError):
            return False


async def broker(trial: Trial) -> Broker:
    """Return the broker's handle, with a witness connected."""
    line = await unwired(trial)
    client = await trial.keep(over(trial, line.proxy).connect())
    return Broker(trial, client, line.proxy)
