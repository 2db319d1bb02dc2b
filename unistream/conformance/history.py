"""Knows the record of one run: what was asked of the broker, what it answered, and when; judges nothing.

A history is append-only. An operation begins with `invoke` and ends with exactly one of

- `ok`    it took effect, the broker said so;
- `fail`  it surely had no effect (refused before it was sent, or refused by the broker);
- `info`  nobody knows: time-out, lost connection, cancellation, death of the process.

Anything seen rather than asked for (a delivery, a death, a fault) is an `event`. Times are nanoseconds of the
monotonic clock, which on one machine is the same for all processes, so histories of several processes merge
by time alone. On disk a history is JSON lines, one event a line, empty fields left out.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, overload

Phase = Literal["invoke", "ok", "fail", "info", "event"]

NANO = 1_000_000_000


@dataclass(slots=True)
class Event:
    """
    One line of a history.

    Operations (`op`) with invoke and completion: `publish`, `create` (a group), `ack`, `nack`, `reject`, `extend`,
    `leave`, `seek`. Events:

    - `join`, `death` of a member, `deliver` of a message to it;
    - `renew` (the lease now ends at `until`), `expire` (the delivery says that it is lost), `refuse` (it says so after
      its settle was taken: the broker refused it later);
    - `idle`: the member had room and waited for work from `since` until now, and got nothing;
    - `fault`: from `since` until now, of one `member` or of all;
    - `drain`: `ok` when complete, `info` when time ran out with progress, `fail` when stuck;
    - `loss`: the library reported lost data;
    - `stray`: a message was published that is none of this run's; `digest` is its body's fingerprint;
    - `tally`: `count` things of the kind that `note` names.
    """

    at: int
    """Monotonic nanoseconds."""
    proc: str
    """The process (or the task that stands for one)."""
    life: int
    """Which incarnation of `proc`: a restarted process counts up."""
    op: str
    phase: Phase
    call: int | None = None
    """Pairs an invocation with its completion, within one process and life."""
    topic: str | None = None
    group: str | None = None
    member: str | None = None
    msg: str | None = None
    """The message's name, `producer.number`."""
    key: str | None = None
    """The key in hexadecimal; absent for no key, empty for `b""`."""
    partition: int | None = None
    position: str | None = None
    lending: str | None = None
    """Names one delivery: no two lendings of a run share it."""
    attempt: int | None = None
    until: int | None = None
    """When the lease ends, monotonic nanoseconds."""
    since: int | None = None
    """When what the event speaks of began; for a delivery, when the member began to wait for it."""
    delay: float | None = None
    """Seconds."""
    limit: int | None = None
    """The member's `max_in_flight`."""
    confirmed: bool | None = None
    """True where the broker's own answer was awaited."""
    digest: str | None = None
    """Fingerprint of key and headers, as handed over or as received; of a foreign body, the body's."""
    error: str | None = None
    """The class of the error, or `corrupt` and `foreign` for a body that does not prove itself."""
    count: int | None = None
    """How many messages an event speaks of."""
    config: dict[str, Any] | None = None
    """What a group was created with: `ordering`, `start`, `lease`, `backoff`, `max_attempts`, `dead_letter`."""
    origin: str | None = None
    """Of a dead letter: the group that it comes from, `topic/group`."""
    note: str | None = None

    def to_json(self) -> str:
        """Return the event as one line of JSON without the empty fields."""
        return json.dumps(
            {name: value for name in _FIELDS if (value := getattr(self, name)) is not None},
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, line: str) -> Event:
        """
        Return the event that `line` holds.

        Raises:
            ValueError: The line is no JSON, or holds a field that no event has.
        """
        data = json.loads(line)
        unknown = set(data) - set(_FIELDS)
        if unknown:
            raise ValueError(f"unknown fields in a history: {sorted(unknown)}")
        return cls(**data)


_FIELDS = tuple(field.name for field in fields(Event))


class History:
    """The events of one run in the order of their times. Indices into it are what violations point at."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events = list(events)

    @classmethod
    def merge(cls, *parts: Iterable[Event]) -> History:
        """Return one history of several, each of which is in order by itself."""
        return cls(heapq.merge(*parts, key=lambda event: event.at))

    @classmethod
    def load(cls, *paths: Path) -> History:
        """
        Return the merged history of the files.

        A last line cut short by the death of its process is left out: what was not written whole was not
        yet done. Any other bad line is an error.
        """
        return cls.merge(*(_read(path) for path in paths))

    def save(self, path: Path) -> None:
        """Write the history as JSON lines."""
        with path.open("w", encoding="utf-8") as file:
            file.writelines(event.to_json() + "\n" for event in self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        return self._events[index]

    def __repr__(self) -> str:
        return f"History({len(self._events)} events)"


def _read(path: Path) -> list[Event]:
    lines = path.read_text(encoding="utf-8").split("\n")
    # A whole file ends with a newline, so the last piece is empty; otherwise its writer died within that line.
    return [Event.from_json(line) for line in lines[:-1] if line]


class Recorder:
    """
    Writes the part of a history that one process makes.

    With a path, every event is on disk (in the page cache: a killed process loses none) before `record` returns,
    so before anybody acts on it. Not for several threads at once.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        *,
        proc: str = "main",
        life: int = 1,
        path: Path | None = None,
    ) -> None:
        self.proc = proc
        self.life = life
        self._clock = clock
        self._events: list[Event] = []
        self._parts: list[list[Event]] = []
        self._calls = 0
        self._lendings = 0
        self._file: IO[str] | None = None if path is None else path.open("a", encoding="utf-8", buffering=1)

    @property
    def events(self) -> list[Event]:
        """What was recorded so far, in order."""
        return self._events

    def now(self) -> int:
        """Return the monotonic time in nanoseconds."""
        return self._clock()

    def part(self) -> list[Event]:
        """Return a list that takes the events of another process, in order; they belong to the history."""
        self._parts.append([])
        return self._parts[-1]

    def history(self) -> History:
        """Return what was recorded so far as a history."""
        return History.merge(self._events, *self._parts)

    def new_lending(self) -> str:
        """Return a name for the next delivery."""
        self._lendings += 1
        return f"{self.proc}.{self.life}.{self._lendings}"

    def record(self, op: str, phase: Phase = "event", **data: Any) -> Event:
        """Append one event at the present time and return it."""
        event = Event(self._clock(), self.proc, self.life, op, phase, **data)
        self._events.append(event)
        if self._file is not None:
            self._file.write(event.to_json() + "\n")
        return event

    def invoke(self, op: str, **data: Any) -> Call:
        """Record that an operation begins; the call that is returned records its completion."""
        self._calls += 1
        self.record(op, "invoke", call=self._calls, **data)
        return Call(self, op, self._calls, data)

    def close(self) -> None:
        """Close the file, if there is one. The events stay readable."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Call:
    """An operation under way; exactly one of its three completions is recorded."""

    __slots__ = ("_data", "_number", "_op", "_recorder", "done")

    def __init__(self, recorder: Recorder, op: str, number: int, data: dict[str, Any]) -> None:
        self._recorder = recorder
        self._op = op
        self._number = number
        self._data = data
        self.done = False

    def ok(self, **data: Any) -> Event:
        """Record that it took effect."""
        return self._complete("ok", data)

    def fail(self, error: BaseException | str, **data: Any) -> Event:
        """Record that it surely had no effect."""
        return self._complete("fail", {"error": _error_name(error), **data})

    def info(self, error: BaseException | str, **data: Any) -> Event:
        """Record that nobody knows whether it took effect."""
        return self._complete("info", {"error": _error_name(error), **data})

    def _complete(self, phase: Phase, data: dict[str, Any]) -> Event:
        if self.done:
            raise RuntimeError(f"{self._op} was completed before; an operation has one outcome")
        self.done = True
        return self._recorder.record(self._op, phase, call=self._number, **{**self._data, **data})


def _error_name(error: BaseException | str) -> str:
    return error if isinstance(error, str) else type(error).__name__
