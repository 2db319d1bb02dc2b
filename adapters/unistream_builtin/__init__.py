"""The reference broker behind the driver contract: `memory://`.

Vocabulary
    topic, partition, group, member, lease, attempt: as in unistream; the broker was made for these words.
    position: the message's number in its topic, counted from 0 over all partitions.
    partition: a label that the message bears. Order is kept by key, and nothing is bound to a partition.

URL
    `memory://name`: a broker that all loops and threads of this process share under this name, until the process ends.
    `memory://`: a broker of its own for this one client, gone when the client is closed.
    There are no options, no port, no user and no path.

Guarantees
    Everything of the contract, by the broker itself, at `durability = memory`: nothing survives the process.
    Without a declared retention, what some group has not settled stays for ever; of what all have settled, the
    newest 100 000 messages or 64 MiB of a topic stay for `start="earliest"`, a time, a position, and `seek`.
    An id is remembered for 120 s or 100 000 newer ids of its topic, whichever ends first.
    A member that is dropped without closing hands over at the latest when its leases end.

Refusals
    A message above 16 MiB of value, key and headers: TooLargeError. A publish beyond `max_backlog`: TopicFullError,
    surely not stored. A position beyond the end of its topic: ConfigError.

Native objects
    `Client.native` is the `unistream.broker.Host`; `Delivery.native` is `None`.
"""

from __future__ import annotations

from unistream_builtin.driver import MemoryDriver

__all__ = ["MemoryDriver"]
