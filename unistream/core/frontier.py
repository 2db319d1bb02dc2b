"""Knows which offsets of one partition are settled, where its broker keeps nothing but one cumulative cursor.

Kafka stores one number per group and partition. Deliveries are settled in any order, so the number that
may be stored is the frontier: everything below it is settled. What is settled beyond it would be delivered
again after a crash; therefore it travels with the number, as text in the offset commit's metadata. Knows
no client and no time.
"""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from collections import deque
from collections.abc import Iterator
from itertools import islice

from unistream.errors import ContractError

__all__ = ["Frontier"]

# Kafka refuses a commit whose metadata is longer than the broker's offset.metadata.max.bytes (default 4096).
_METADATA_BYTES = 4096
_TAG = "unistream-1:"  # the number is the format's version
# Anybody may have written what the broker hands back as metadata: these bound what reading it may cost.
_MOST_RUNS = 1 << 14
_SHORT = 32
"""Bytes that are not worth compressing: getting the interpreter lock back may take 5 ms where other threads compute."""
_INFLATED_BYTES = 10 + 20 * _MOST_RUNS  # a number of 64 bits takes 10 bytes; one for the cursor, two per run

_SETTLED = 0  # state of a run; 1 + n: not settled, lent n times
_Run = tuple[int, int, int]  # first offset, offset after the last, state


class Frontier:
    """The settled offsets of one partition for one group, as one member sees them.

    Call `register` for every message that the broker hands over, in order. Offsets that it skips (transaction
    markers, aborted or compacted messages) never come and count as settled; a frontier that waited for them
    would stand still for ever. Then `lend` and `settle` in any order, and store `frontier` together with
    `encode_beyond()`.

    Every call takes constant time, amortised, but `beyond` and `encode_beyond`: those are linear in `span`.

    For a partition taken over use `restore`; for a seek make a new one.
    """

    __slots__ = ("_lendings", "_next", "_order", "_restored")

    def __init__(self, start: int) -> None:
        """Begin with everything below `start` settled and nothing known of the rest."""
        self._next = start  # everything below is registered, or never comes
        self._lendings: dict[int, int] = {}  # unsettled offset -> times lent; in rising order, as registered
        self._order: deque[int] = deque()  # registered offsets; those settled at its head are dropped on reading
        self._restored: deque[_Run] = deque()  # what an earlier owner knew of offsets that are still to come

    @classmethod
    def restore(cls, start: int, metadata: str | None) -> Frontier:
        """Return the frontier of a partition whose stored cursor is `start`, with its stored `metadata`.

        Metadata that another program or a newer version wrote, that is damaged, or that belongs to another
        cursor (someone moved it) is ignored: messages are then delivered again, and none is taken for settled.
        What it says of an offset counts from the moment that offset is registered.
        """
        frontier = cls(start)
        frontier._restored.extend(_decode(start, metadata or ""))
        return frontier

    @property
    def frontier(self) -> int:
        """The offset to store: everything below it is settled, it itself is not."""
        order = self._order
        lendings = self._lendings
        while order:
            if order[0] in lendings:
                return order[0]
            order.popleft()
        return self._next

    @property
    def oldest_unsettled(self) -> int | None:
        """The registered offset that holds the frontier back, or `None` if all that came is settled."""
        frontier = self.frontier
        return frontier if frontier in self._lendings else None

    @property
    def unsettled(self) -> int:
        """Number of offsets that are registered and not settled."""
        return len(self._lendings)

    @property
    def span(self) -> int:
        """Offsets from the frontier to the newest one: a bound on what a crash delivers again; bound it."""
        return self._next - self.frontier

    @property
    def settled_ahead(self) -> int:
        """Number of offsets that an earlier owner settled and that are not registered here yet."""
        return sum(end - first for first, end, state in self._restored if state == _SETTLED)

    def register(self, offset: int) -> bool:
        """Take note of a message that the broker handed over; return False if an earlier owner settled it.

        Raises:
            ContractError: `offset` is not above all that were registered before.
        """
        if offset < self._next:
            raise ContractError(
                f"frontier: offset {offset} registered after {self._next - 1}; register offsets in rising order, "
                "and make a new Frontier after a seek"
            )
        self._next = offset + 1
        lent = 0
        if self._restored:
            state = self._restored_state(offset)
            if state == _SETTLED:
                return False
            lent = state - 1
        self._order.append(offset)
        self._lendings[offset] = lent
        return True

    def skip_to(self, offset: int) -> None:
        """Count as settled what is below `offset` and was not registered: the broker is past it.

        Without this, markers after the last message would show as lag until the next message comes.
        """
        self._next = max(self._next, offset)

    def lend(self, offset: int) -> int:
        """Return the attempt (1 first) that lending the registered, unsettled `offset` now is.

        Raises:
            KeyError: `offset` is settled or was never registered.
        """
        attempt = self._lendings[offset] + 1
        self._lendings[offset] = attempt
        return attempt

    def give_back(self, offset: int) -> int:
        """Undo the last `lend` of an unsettled `offset`, given back without spending an attempt; return how many stay.

        Raises:
            KeyError: `offset` is settled or was never registered.
        """
        self._lendings[offset] = left = max(0, self._lendings[offset] - 1)
        return left

    def settle(self, offset: int) -> bool:
        """Mark `offset` as settled; return False, and change nothing, if it was not unsettled."""
        try:
            del self._lendings[offset]
        except KeyError:
            return False
        return True

    def beyond(self) -> list[range]:
        """Return the stretches of settled offsets past the frontier, in order; gaps count as settled."""
        return [range(first, end) for first, end, state in self._runs() if state == _SETTLED]

    def encode_beyond(self, max_bytes: int = _METADATA_BYTES) -> str:
        """Return what is known of offsets past the frontier, as ASCII of at most `max_bytes`, for `restore`.

        It holds the settled offsets and how often unsettled ones were lent. If it does not fit, the farthest
        offsets are left out: they would be delivered again after a crash, and counted from attempt 1. Empty
        if there is nothing to tell. Store it in one commit with `frontier`, and change nothing between
        reading the two.
        """
        start = self.frontier
        runs = list(islice(self._runs(), _MOST_RUNS))
        while runs and runs[-1][2] == 1:  # registered only: the same as unknown
            runs.pop()
        while runs:
            text = _encode(start, runs)
            if len(text) <= max_bytes:
                return text
            del runs[len(runs) * max_bytes // len(text) :]
        return ""

    def _runs(self) -> Iterator[_Run]:
        """Yield what is known from the frontier on, without gaps; neighbours differ in state."""
        first = position = self.frontier
        state = _SETTLED
        for offset, lent in self._lendings.items():
            if offset > position and state != _SETTLED:
                yield first, position, state
                first, state = position, _SETTLED
            if state != 1 + lent:
                if offset > first:
                    yield first, offset, state
                first, state = offset, 1 + lent
            position = offset + 1
        for run_first, run_end, run_state in ((position, self._next, _SETTLED), *self._restored):
            if run_end <= position:
                continue
            if run_state != state:
                if position > first:
                    yield first, position, state
                first, state = max(run_first, position), run_state
            position = run_end
        if position > first:
            yield first, position, state

    def _restored_state(self, offset: int) -> int:
        restored = self._restored
        while restored and restored[0][1] <= offset:
            restored.popleft()
        return restored[0][2] if restored else 1


def _encode(start: int, runs: list[_Run]) -> str:
    # zlib brings a checksum along, and the start says which cursor this belongs to.
    numbers = [start]
    for first, end, state in runs:
        numbers += (state, end - first)
    packed = _varints(numbers)
    return _TAG + b85encode(_stored(packed) if len(packed) <= _SHORT else zlib.compress(packed, 9)).decode("ascii")


def _stored(packed: bytes) -> bytes:
    """What zlib makes of bytes at level 0, without letting go of the interpreter lock for it."""
    size = len(packed).to_bytes(2, "little")
    inverse = (len(packed) ^ 0xFFFF).to_bytes(2, "little")
    return b"x\x01\x01" + size + inverse + packed + zlib.adler32(packed).to_bytes(4, "big")


def _decode(start: int, text: str) -> list[_Run]:
    if not text.startswith(_TAG):
        return []
    try:
        inflater = zlib.decompressobj()
        packed = inflater.decompress(b85decode(text[len(_TAG) :]), _INFLATED_BYTES)
        numbers = _numbers(packed)
    except (ValueError, zlib.error):
        return []
    if not inflater.eof or inflater.unused_data or len(numbers) % 2 == 0 or numbers[0] != start:
        return []
    runs: list[_Run] = []
    first = start
    for state, length in zip(numbers[1::2], numbers[2::2], strict=True):
        runs.append((first, first + length, state))
        first += length
    return runs


def _varints(numbers: list[int]) -> bytes:
    """Pack numbers of 0 or more, 7 bits per byte, low bits first; the top bit says that more follow."""
    packed = bytearray()
    for number in numbers:
        while number > 0x7F:
            packed.append(number & 0x7F | 0x80)
            number >>= 7
        packed.append(number)
    return bytes(packed)


def _numbers(packed: bytes) -> list[int]:
    numbers: list[int] = []
    number = shift = 0
    for byte in packed:
        number |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > 63:
                raise ValueError("no number of 64 bits")
        else:
            numbers.append(number)
            number = shift = 0
    if shift:
        raise ValueError("ends inside a number")
    return numbers
