"""The client library's own connection, for what the contract does not cover."""

from __future__ import annotations

from typing import Any

from nats.aio.client import Client

from unistream_nats.link import Place

__all__ = ["NativeClient"]


class NativeClient(Client):
    """A `nats.aio.client.Client` that knows where to connect; not connected until `connect` is awaited."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place

    async def connect(self, *arguments: Any, **options: Any) -> None:
        """Connect, with the servers and credentials of the URL unless others are given."""
        place = self._place
        mapped = [place.dial(host, port) for host, port in place.hosts]
        known: dict[str, Any] = {"servers": [f"nats://{host}:{port}" for host, port in mapped]}
        if place.password is not None:
            known |= {"user": place.username, "password": place.password}
        elif place.username is not None:
            known["token"] = place.username
        if place.tls is not None:
            known["tls"] = place.tls
        if arguments:
            known.pop("servers")
        await super().connect(*arguments, **(known | options))
