"""Knows how to do several things at once so that what one of them found out is what the case reports."""

from __future__ import annotations

import asyncio
from types import TracebackType

from unistream.conformance.trial import CheckError, VacuousError


class Together(asyncio.TaskGroup):
    """A TaskGroup that raises the finding itself, a CheckError or a VacuousError, instead of a group around it."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for all tasks."""
        try:
            await super().__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            if (found := _first(group)) is None:
                raise
            raise found from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    for each in group.exceptions:
        found = _first(each) if isinstance(each, BaseExceptionGroup) else each
        if isinstance(found, CheckError | VacuousError):
            return found
    return None
