"""Free TCP ports on 127.0.0.1 for servers that keep their port across a restart."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable

# Below the kernel's ephemeral range (32768 up): while a server is down, no client's own socket can be given its
# port, and a client that keeps reconnecting can't connect to itself.
RANGE = range(20000, 30000)


def is_free(port: int) -> bool:
    """Say whether a server could listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """Return a free port for each name."""
    names = list(names)
    found: list[int] = []
    for port in random.sample(RANGE, len(RANGE)):
        if len(found) == len(names):
            break
        if is_free(port):
            found.append(port)
    return dict(zip(names, found, strict=True))
