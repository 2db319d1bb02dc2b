"""Knows which partition a key belongs to, and whose turn it is among messages of one key.

Knows nothing of brokers, members or time. The hash is Kafka's default partitioner's, so that a topic keeps
its partitions when it moves between backends, and foreign Kafka producers agree with this library (ORD-3).
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from struct import Struct, unpack_from
from typing import Generic, TypeVar

from unistream.errors import ContractError

__all__ = ["KeyTurns", "murmur2", "partition_for"]

T = TypeVar("T")

_SEED = 0x9747B28C
_MIX = 0x5BD1E995
_LOW32 = 0xFFFFFFFF

# struct.unpack with a format made on the spot costs more than hashing a short key does.
_WORDS = tuple(Struct(f"<{count}I").unpack_from for count in range(17))

# Keys repeat: 0.1 µs for a key seen lately against 1.2 µs for one of 10 bytes (CPython 3.11). Longer keys are
# hashed every time, so that the cache stays under a megabyte whatever the keys are.
_CACHED_KEYS = 4096
_CACHED_KEY_BYTES = 64


def murmur2(data: bytes) -> int:
    """Return Kafka's 32 bit hash of `data`, as the signed number that its Java client computes.

    Source: `org.apache.kafka.common.utils.Utils.murmur2`, MurmurHash2 with the seed 0x9747b28c.
    """
    length = len(data)
    count = length >> 2
    tail = length & 3
    mixed = _SEED ^ length
    for word in _WORDS[count](data) if count < len(_WORDS) else unpack_from(f"<{count}I", data):
        word = word * _MIX & _LOW32
        mixed = (mixed * _MIX ^ (word ^ word >> 24) * _MIX) & _LOW32
    if tail:
        mixed = (mixed ^ int.from_bytes(data[length - tail :], "little")) * _MIX & _LOW32
    mixed = (mixed ^ mixed >> 13) * _MIX & _LOW32
    mixed ^= mixed >> 15
    return mixed if mixed < 0x80000000 else mixed - 0x100000000


def partition_for(key: bytes, partitions: int) -> int:
    """Return the partition of `key` in a topic of `partitions` partitions, counted from 0.

    `b""` is a key like any other; messages without a key are the caller's to spread.
    """
    if len(key) <= _CACHED_KEY_BYTES:
        return _partition_of_short(key, partitions)
    return (murmur2(key) & 0x7FFFFFFF) % partitions


@lru_cache(maxsize=_CACHED_KEYS)
def _partition_of_short(key: bytes, partitions: int) -> int:
    return (murmur2(key) & 0x7FFFFFFF) % partitions


class KeyTurns(Generic[T]):
    """Turn-taking within one partition: one item per key is out at a time, the rest wait in order (ORD-2).

    For an adapter whose broker orders whole partitions while its members work on several keys at once. Offer
    every item in the order of the partition; the one that gets the turn of its key keeps it through nacks,
    delays and lost leases, until `done` hands it on. So a nack needs no call: the item is lent again when its
    time has come, and its key waits for it.

        if turns.offer(message.key, message):
            lend(message)
        ...
        following = turns.done(message.key)     # after ack, reject, or dead-lettering
        if following is not None:
            lend(following)

    Keep one `KeyTurns` per partition: when the partition is lost, or sought in, drop the object.

    Items are never `None`. An item without a key (`None`) never waits and takes no turn. Memory: one dict
    entry per key that is out, one reference per waiting item; bounding `waiting` is the caller's part.
    """

    __slots__ = ("_behind", "_waiting")

    def __init__(self) -> None:
        # Key that is out -> the items behind it; no deque until there is one, most keys are alone.
        self._behind: dict[bytes, deque[T] | None] = {}
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Number of items that wait behind another of their key."""
        return self._waiting

    @property
    def out(self) -> int:
        """Number of keys whose turn is taken."""
        return len(self._behind)

    def offer(self, key: bytes | None, item: T) -> bool:
        """Return True if `item` may be lent now; else it waits here until `done` returns it."""
        if key is None:
            return True
        behind = self._behind
        if key not in behind:
            behind[key] = None
            return True
        queue = behind[key]
        if queue is None:
            queue = behind[key] = deque()
        queue.append(item)
        self._waiting += 1
        return False

    def done(self, key: bytes | None) -> T | None:
        """End the turn of `key` and return the item whose turn it is now, or `None` if none of the key waits.

        Raises:
            ContractError: No item of `key` is out; the caller settled something twice.
        """
        if key is None:
            return None
        try:
            queue = self._behind[key]
        except KeyError:
            raise ContractError(
                f"key turns: done() for key {key!r}, of which nothing is out; end each turn exactly once"
            ) from None
        if not queue:
            del self._behind[key]
            return None
        self._waiting -= 1
        return queue.popleft()

    def clear(self) -> list[T]:
        """Forget every turn and return the items that waited, each key's in order, to be given back."""
        left = [item for queue in self._behind.values() if queue for item in queue]
        self._behind.clear()
        self._waiting = 0
        return left
