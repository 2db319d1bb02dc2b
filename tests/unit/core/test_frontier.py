"""The frontier: settled offsets over a cumulative cursor, and their way through a commit's metadata."""

import random
import zlib
from base64 import b85decode, b85encode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unistream.core.frontier import Frontier
from unistream.errors import ContractError


class FrontierMachine(RuleBasedStateMachine):
    """`Frontier` against a log with every offset's state written out, through crashes and takeovers."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []  # offsets of real messages, in order; the rest are gaps
        self.read = 0  # how many of the log were handed over to the present owner
        self.lent: dict[int, int] = {}  # times lent, over all owners
        self.settled: set[int] = set()  # over all owners

    @initialize(start=st.integers(0, 2**40))
    def start(self, start: int) -> None:
        """Begin anywhere: offsets have no origin worth knowing."""
        self.next = self.end = start  # end: offsets below it, if not in the log, never come
        self.frontier = Frontier(start)

    def open(self) -> list[int]:
        """Return the offsets that the present owner was handed and nobody settled."""
        return [offset for offset in self.log[: self.read] if offset not in self.settled]

    @rule(gap=st.sampled_from([0, 0, 0, 1, 7, 10**6]))
    def register(self, gap: int) -> None:
        """The broker hands over the next message: one of the log seen before a crash, or a new one."""
        if self.read == len(self.log):
            self.log.append(self.end + gap)
            self.end += gap + 1
        offset = self.log[self.read]
        self.read += 1
        self.next = offset + 1

        assert self.frontier.register(offset) is (offset not in self.settled)

    @precondition(lambda self: self.open())
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        """The attempt is the number of lendings so far, those of earlier owners included."""
        offset = data.draw(st.sampled_from(self.open()))
        self.lent[offset] = self.lent.get(offset, 0) + 1

        assert self.frontier.lend(offset) == self.lent[offset]

    @precondition(lambda self: any(self.lent.get(offset) for offset in self.open()))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """A lending that is given back does not count."""
        offset = data.draw(st.sampled_from([offset for offset in self.open() if self.lent.get(offset)]))
        self.lent[offset] -= 1

        assert self.frontier.give_back(offset) == self.lent[offset]

    @precondition(lambda self: self.open())
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """Settling in any order is accepted once."""
        offset = data.draw(st.sampled_from(self.open()))
        self.settled.add(offset)

        assert self.frontier.settle(offset) is True
        assert self.frontier.settle(offset) is False

    @rule(past=st.integers(0, 5))
    def settle_unknown(self, past: int) -> None:
        """Settling what was never registered changes nothing."""
        assert self.frontier.settle(self.next + past) is False

    @rule(past=st.integers(0, 3))
    def skip_to(self, past: int) -> None:
        """What was not handed over so far never will be (markers, compaction): it counts as settled."""
        self.settled.difference_update(self.log[self.read :])
        del self.log[self.read :]
        self.next = self.end = self.end + past
        self.frontier.skip_to(self.next)

    @rule(back=st.integers(0, 5))
    def skip_back(self, back: int) -> None:
        """Skipping to where the frontier has been changes nothing."""
        self.frontier.skip_to(self.next - back)

    @rule()
    def crash(self) -> None:
        """Another owner knows everything that was committed, and is handed the log again from the frontier."""
        cursor, metadata = self.frontier.frontier, self.frontier.encode_beyond()
        self.frontier = Frontier.restore(cursor, metadata)
        self.read = sum(offset < cursor for offset in self.log)
        self.next = cursor

    @rule(max_bytes=st.integers(0, 60))
    def crash_with_little_room(self, max_bytes: int) -> None:
        """What does not fit is forgotten from the far end; everything nearer is kept."""
        cursor, metadata = self.frontier.frontier, self.frontier.encode_beyond(max_bytes)
        assert len(metadata.encode("ascii")) <= max_bytes
        true = {offset: -1 if offset in self.settled else self.lent.get(offset, 0) for offset in self.log}
        true = {offset: state for offset, state in true.items() if offset >= cursor}
        kept = self.told(cursor, metadata)
        wrong = [offset for offset in true if kept[offset] != true[offset]]
        assert all(kept[offset] == 0 for offset in true if wrong and offset >= wrong[0])

        self.settled -= {offset for offset, state in kept.items() if state >= 0}
        self.lent |= {offset: max(0, state) for offset, state in kept.items()}
        self.frontier = Frontier.restore(cursor, metadata)
        self.read = sum(offset < cursor for offset in self.log)
        self.next = cursor

    def told(self, cursor: int, metadata: str) -> dict[int, int]:
        """Return what an owner that takes over learns of each offset: times lent, -1 for settled."""
        probe = Frontier.restore(cursor, metadata)
        offsets = [offset for offset in self.log if offset >= cursor]
        return {offset: probe.lend(offset) - 1 if probe.register(offset) else -1 for offset in offsets}

    @invariant()
    def agrees(self) -> None:
        """Every number agrees with the written-out log."""
        unsettled = self.open()
        frontier = unsettled[0] if unsettled else self.next

        assert self.frontier.frontier == frontier
        assert self.frontier.oldest_unsettled == (unsettled[0] if unsettled else None)
        assert self.frontier.unsettled == len(unsettled)
        assert self.frontier.span == self.next - frontier
        stretches = self.frontier.beyond()
        inside = {offset for offset in self.log if offset >= frontier and any(offset in part for part in stretches)}
        assert inside == {offset for offset in self.settled if offset >= frontier}


TestFrontier = FrontierMachine.TestCase


def test_frontier_over_a_transaction_marker_does_not_stick() -> None:
    """Offset 2 is a marker that never comes: after 0, 1 and 3 are settled the frontier is 4."""
    frontier = Frontier(0)
    for offset in (0, 1, 3):
        frontier.register(offset)
    for offset in (3, 0, 1):
        frontier.settle(offset)

    assert frontier.frontier == 4


def test_register_of_an_older_offset_is_refused() -> None:
    """Going back needs a new frontier; a silent mix of two readings would commit past unread messages."""
    frontier = Frontier(5)
    frontier.register(7)

    with pytest.raises(ContractError, match=r"offset 7 registered after 7; register offsets in rising order"):
        frontier.register(7)
    with pytest.raises(ContractError, match=r"offset 6 registered after 7"):
        frontier.register(6)


def test_lend_of_a_settled_offset_is_refused() -> None:
    """What is settled can't be lent again, nor given back."""
    frontier = Frontier(0)
    frontier.register(0)
    frontier.settle(0)

    with pytest.raises(KeyError):
        frontier.lend(0)
    with pytest.raises(KeyError):
        frontier.give_back(0)


def test_encode_beyond_with_nothing_to_tell_is_empty() -> None:
    """A partition that settles in order, or has only fresh messages, costs no metadata."""
    frontier = Frontier(0)
    for offset in range(10):
        frontier.register(offset)
    for offset in range(4):
        frontier.settle(offset)

    assert frontier.encode_beyond() == ""


def scattered(width: int, seed: int) -> tuple[Frontier, set[int]]:
    """Return a frontier at 0 with `width` offsets lent, half of those after the first settled at random."""
    frontier = Frontier(0)
    for offset in range(width):
        frontier.register(offset)
        frontier.lend(offset)
    settled = set(random.Random(seed).sample(range(1, width), width // 2))
    for offset in settled:
        frontier.settle(offset)
    return frontier, settled


@pytest.mark.parametrize("seed", range(3))
def test_encode_beyond_of_the_default_span_fits_kafkas_default_limit_whole(seed: int) -> None:
    """10 000 offsets, half of them settled at random, survive a takeover without loss within 4096 bytes."""
    frontier, settled = scattered(10_000, seed)

    text = frontier.encode_beyond()
    restored = Frontier.restore(0, text)
    refused = {offset for offset in range(10_000) if not restored.register(offset)}

    assert len(text) <= 4096
    assert refused == settled
    assert restored.lend(0) == 2


@pytest.mark.parametrize("max_bytes", [16, 40, 100, 500, 2000])
def test_encode_beyond_with_little_room_keeps_the_nearest(max_bytes: int) -> None:
    """Up to some offset everything is kept, after it nothing; half of the room at least is used."""
    frontier, settled = scattered(10_000, seed=1)

    text = frontier.encode_beyond(max_bytes)
    restored = Frontier.restore(0, text)
    refused = {offset for offset in range(10_000) if not restored.register(offset)}

    assert len(text) <= max_bytes
    assert refused == {offset for offset in settled if offset <= max(refused, default=0)}
    assert len(text) >= max_bytes // 2 or max_bytes < 40


def test_encode_beyond_of_a_span_far_too_wide_is_bounded_and_readable() -> None:
    """A span of 200 000 offsets, every second one settled, gives text that its own reader accepts."""
    frontier = Frontier(0)
    for offset in range(200_000):
        frontier.register(offset)
    for offset in range(1, 200_000, 2):
        frontier.settle(offset)

    text = frontier.encode_beyond()
    restored = Frontier.restore(0, text)

    assert len(text) <= 4096
    assert [restored.register(offset) for offset in range(6)] == [True, False] * 3


def test_metadata_is_carried_on_by_an_owner_that_read_little_of_it() -> None:
    """An owner that commits before it has read all of the metadata's span passes the rest of it on."""
    frontier, settled = scattered(1000, seed=2)
    second = Frontier.restore(0, frontier.encode_beyond())
    second.register(0)
    second.settle(0)
    third = Frontier.restore(second.frontier, second.encode_beyond())

    refused = {offset for offset in range(second.frontier, 1000) if not third.register(offset)}

    assert refused == {offset for offset in settled if offset >= second.frontier}
    assert len(refused) > 400


KNOWN = scattered(50, seed=3)[0].encode_beyond()
SETTLED = 0


def packed(content: bytes) -> str:
    """Return metadata with our tag around any content."""
    return "unistream-1:" + b85encode(content).decode()


def test_metadata_of_version_1_is_the_documented_bytes() -> None:
    """Golden vector: the cursor, then pairs of state and length, 7 bits per byte, zlib, base85."""
    golden = bytes([0xAC, 0x02, 1 + 2, 1, SETTLED, 0x80, 0x01, 1 + 1, 1])
    frontier = Frontier(300)
    for offset in (300, 429):  # between them a gap
        frontier.register(offset)
        frontier.lend(offset)
    frontier.lend(300)
    text = frontier.encode_beyond()
    restored = Frontier.restore(300, packed(zlib.compress(golden)))

    assert zlib.decompress(b85decode(text.removeprefix("unistream-1:"))) == golden
    assert restored.beyond() == [range(301, 429)]
    assert [(restored.register(offset), restored.lend(offset)) for offset in (300, 429)] == [(True, 3), (True, 2)]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "",
        "committed by billing-7f9c at 12:30",
        "unistream-2:" + KNOWN.removeprefix("unistream-1:"),
        "unistream-1:",
        "unistream-1:é",
        packed(b"not zlib"),
        KNOWN[:-4],
        KNOWN[:20] + ("0" if KNOWN[20] != "0" else "1") + KNOWN[21:],
        packed(zlib.compress(bytes([0, SETTLED, 9])) + b"more"),
        packed(zlib.compress(b"")),
        packed(zlib.compress(bytes([0, SETTLED, 9, SETTLED]))),
        packed(zlib.compress(bytes([0, SETTLED, 9, 0x85]))),
        packed(zlib.compress(bytes([0, SETTLED, *[0xFF] * 20, 1]))),
        packed(zlib.compress(bytes([0]) + bytes([SETTLED, 1]) * 170_000)),
    ],
)
def test_restore_from_foreign_damaged_or_newer_metadata_knows_nothing(metadata: str | None) -> None:
    """Metadata that is not ours, not whole or not of our version takes no message for settled."""
    restored = Frontier.restore(0, metadata)

    assert restored.beyond() == []
    assert all(restored.register(offset) for offset in range(50))
    assert restored.lend(49) == 1


def test_restore_at_another_cursor_knows_nothing() -> None:
    """Someone moved the group's cursor and kept the metadata: what it says is of other messages."""
    assert Frontier.restore(0, KNOWN).beyond() != []
    assert Frontier.restore(1, KNOWN).beyond() == []


@given(st.text(max_size=60))
def test_restore_from_any_text_never_raises(text: str) -> None:
    """Whatever stands in the metadata, the partition can be taken over."""
    assert Frontier.restore(7, text).frontier == 7
    assert Frontier.restore(7, "unistream-1:" + text).frontier == 7


def test_metadata_survives_utf8_and_is_one_line() -> None:
    """The text is printable ASCII, so that tools which show it show one word."""
    assert KNOWN.isascii()
    assert KNOWN.isprintable()
    assert " " not in KNOWN
