"""The blocking face: the names and signatures of `unistream`, without `await`.

Each Client has an event loop of its own in one thread, closed with it. Objects may be used from any thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from unistream._client import connect as _connect
from unistream.config import Config
from unistream.driver.contract import Driver
from unistream.sync._client import Client
from unistream.sync._consuming import Consumer, Delivery, Group, Handler
from unistream.sync._producing import Confirmation, Producer

__all__ = ["Client", "Confirmation", "Consumer", "Delivery", "Group", "Handler", "Producer", "connect"]


def connect(
    target: str | Config | None = None,
    *,
    profile: str | None = None,
    require: Mapping[str, object] | None = None,
    driver: type[Driver] | None = None,
) -> Client:
    """See `unistream.connect`."""
    return Client(_connect(target, profile=profile, require=require, driver=driver))
