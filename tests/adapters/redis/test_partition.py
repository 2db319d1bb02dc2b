"""One partition of an ordered group as its owner sees it; no server, no clock."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unistream_redis.partition import WAITING_MOST, Item, Partition


def partition() -> Partition:
    """A partition that may be read."""
    made = Partition(0, b"me:1", 100.0)
    made.loaded = True
    return made


def item(number: int, key: bytes | None, *, suspect: bool = False) -> Item:
    """An entry that was read."""
    return Item(b"%d-0" % number, key, int(suspect), suspect)


def take(one: Partition, item: Item) -> None:
    """Offer an entry, and queue it if it has its turn."""
    if one.offer(item):
        one.queue(item)


def test_a_suspect_is_taken_alone() -> None:
    """Suspects come one at a time, also between others."""
    one = partition()
    for number in range(4):
        take(one, item(number, b"%d" % number, suspect=number in (1, 2)))
    batches = []
    while one.ready:
        batches.append([each.entry for each in one.next_ready(10)])

    assert batches == [[b"0-0"], [b"1-0"], [b"2-0"], [b"3-0"]]


def test_a_delayed_entry_keeps_its_turn_and_comes_when_due() -> None:
    """An entry put back with a delay is ready at its time; the next of its key only after it is done."""
    one = partition()
    first, second = item(1, b"k"), item(2, b"k")
    take(one, first)
    take(one, second)
    assert one.next_ready(10) == [first]
    one.put_back(first, 5.0)
    assert one.next_due == 5.0
    one.wake(4.9)
    assert not one.ready
    one.wake(5.0)
    assert one.next_ready(10) == [first]
    one.done(first)

    assert one.next_ready(10) == [second]


def test_what_is_put_back_comes_before_what_came_later() -> None:
    """A released entry is lent again before the others."""
    one = partition()
    entries = [item(number, None) for number in range(3)]
    for each in entries:
        take(one, each)
    (first,) = one.next_ready(1)
    one.put_back(first)

    assert one.next_ready(10) == entries


def test_a_partition_is_read_no_further_when_too_much_waits() -> None:
    """Behind one key at most WAITING_MOST entries are kept."""
    one = partition()
    for number in range(WAITING_MOST):
        assert one.readable
        take(one, item(number, b"k"))
    take(one, item(WAITING_MOST, b"k"))

    assert not one.readable


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([b"a", b"b", b"c", None]), max_size=60), st.randoms(use_true_random=False))
def test_each_key_is_lent_in_order_one_at_a_time(keys: list[bytes | None], chance) -> None:  # type: ignore[no-untyped-def]
    """Whatever is done, put back or delayed, each key begins in order, one entry at a time, and all of it."""
    one = partition()
    for number, key in enumerate(keys):
        take(one, item(number, key))
    out: list[Item] = []
    begun: dict[bytes | None, list[int]] = {}
    done = 0
    now = 0.0
    while done < len(keys):
        now += 1.0
        one.wake(now)
        for each in one.next_ready(chance.randint(1, 5)):
            number = int(each.entry.split(b"-")[0])
            if each.key is not None:
                assert all(other.key != each.key for other in out)
            if each.count == 0:
                begun.setdefault(each.key, []).append(number)
            each.count += 1
            out.append(each)
        chance.shuffle(out)
        for _ in range(chance.randint(0, len(out))):
            each = out.pop()
            act = chance.choice(["done", "done", "back", "delay"])
            if act == "done":
                one.done(each)
                done += 1
            else:
                one.put_back(each, now + chance.randint(0, 3) if act == "delay" else 0.0)

    for key, numbers in begun.items():
        expected = [number for number, of in enumerate(keys) if of == key]
        assert (numbers if key is not None else sorted(numbers)) == expected
