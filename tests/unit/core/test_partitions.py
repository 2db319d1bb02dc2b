"""Keys to partitions, and turns among messages of one key."""

import warnings
from collections import deque

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unistream.core.partitions import KeyTurns, murmur2, partition_for
from unistream.errors import ContractError

with warnings.catch_warnings():
    # kafka-python 3.0.12 loads its protocol schemas by importlib.resources.read_text, deprecated in Python 3.11.
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka.partitioner.default import murmur2 as kafka_python_murmur2

# Apache Kafka, clients/src/test/java/org/apache/kafka/common/utils/UtilsTest.java, testMurmur2.
KAFKA_VECTORS = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize(("data", "expected"), KAFKA_VECTORS.items())
def test_murmur2_of_kafkas_own_vectors_is_what_kafka_publishes(data: bytes, expected: int) -> None:
    """The hash agrees with the vectors of Kafka's own unit test, sign included."""
    assert murmur2(data) == expected


@given(st.binary(max_size=200))
def test_murmur2_of_any_bytes_agrees_with_kafka_python(data: bytes) -> None:
    """For any bytes of any length the hash has the same 32 bits as the Kafka client's."""
    assert murmur2(data) & 0xFFFFFFFF == kafka_python_murmur2(data) & 0xFFFFFFFF


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 63, 64, 65, 66, 67, 68, 69, 1000, 65537])
def test_murmur2_at_each_boundary_of_its_fast_paths_agrees_with_kafka_python(length: int) -> None:
    """Tails of 0 to 3 bytes, the last precompiled length and the first beyond it hash like Kafka's."""
    data = bytes(200 + position % 56 for position in range(length))

    assert murmur2(data) & 0xFFFFFFFF == kafka_python_murmur2(data) & 0xFFFFFFFF


@given(st.binary(max_size=100), st.integers(1, 1000))
@example(b"long".ljust(65, b"-"), 7)
@example(b"longer".ljust(65, b"-"), 7)
@example(b"longest".ljust(65, b"-"), 7)
def test_partition_for_any_key_is_kafkas_and_the_same_when_asked_again(key: bytes, partitions: int) -> None:
    """A key goes to the partition that Kafka's default partitioner picks, cached or not."""
    expected = (kafka_python_murmur2(key) & 0x7FFFFFFF) % partitions

    assert partition_for(key, partitions) == expected
    assert partition_for(key, partitions) == expected


def test_partition_for_many_keys_spreads_them_over_all_partitions() -> None:
    """8000 keys over 8 partitions give each between 900 and 1100 (a fixed set of keys: no chance in it)."""
    counts = [0] * 8
    for number in range(8000):
        counts[partition_for(f"customer-{number}".encode(), 8)] += 1

    assert all(900 < count < 1100 for count in counts), counts


def test_partition_for_more_keys_than_the_cache_holds_stays_right() -> None:
    """Keys that fell out of the cache get the same partition as before."""
    keys = [b"%d" % number for number in range(10_000)]
    first = [partition_for(key, 7) for key in keys]

    assert [partition_for(key, 7) for key in keys] == first


class KeyTurnsMachine(RuleBasedStateMachine):
    """`KeyTurns` against one plain queue per key, whose head is the one that is out."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: KeyTurns[int] = KeyTurns()
        self.queues: dict[bytes, deque[int]] = {}
        self.number = 0

    keys = st.sampled_from([b"", b"a", b"b"])

    @rule(key=keys)
    def offer(self, key: bytes) -> None:
        """The first of a key goes out at once, every other one waits."""
        self.number += 1
        queue = self.queues.setdefault(key, deque())
        queue.append(self.number)

        assert self.turns.offer(key, self.number) is (len(queue) == 1)

    @rule()
    def offer_without_key(self) -> None:
        """An item without a key goes out, whatever else is out, and hands no turn on."""
        assert self.turns.offer(None, -1) is True
        assert self.turns.offer(None, -2) is True
        assert self.turns.done(None) is None

    @precondition(lambda self: self.queues)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        """The next of the key, in the order offered, gets the turn."""
        key = data.draw(st.sampled_from(sorted(self.queues)))
        queue = self.queues[key]
        queue.popleft()
        if not queue:
            del self.queues[key]

        assert self.turns.done(key) == (queue[0] if queue else None)

    @rule(key=keys)
    def done_twice(self, key: bytes) -> None:
        """Ending a turn that nobody has is refused and changes nothing."""
        if key not in self.queues:
            with pytest.raises(ContractError, match=r"nothing is out"):
                self.turns.done(key)

    @rule()
    def clear(self) -> None:
        """What waited comes back, each key's in order, and every key is free."""
        left = self.turns.clear()
        waited = [list(queue)[1:] for queue in self.queues.values()]

        assert sorted(left) == sorted(item for items in waited for item in items)
        for items in waited:
            assert [item for item in left if item in items] == items
        self.queues.clear()

    @invariant()
    def counts(self) -> None:
        """`out` and `waiting` count what the plain queues hold."""
        assert self.turns.out == len(self.queues)
        assert self.turns.waiting == sum(len(queue) - 1 for queue in self.queues.values())


TestKeyTurns = KeyTurnsMachine.TestCase


def test_key_turns_with_a_hundred_thousand_waiting_hand_them_on_in_order() -> None:
    """One hot key with 100 000 messages behind its head is handed on in order, and leaves nothing behind."""
    turns: KeyTurns[int] = KeyTurns()
    assert turns.offer(b"hot", 0)
    for item in range(1, 100_001):
        assert not turns.offer(b"hot", item)

    handed_on = [turns.done(b"hot") for _ in range(100_001)]

    assert handed_on == [*range(1, 100_001), None]
    assert (turns.out, turns.waiting) == (0, 0)
