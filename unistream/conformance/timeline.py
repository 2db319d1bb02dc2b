"""Knows how to draw what happened in a failed case: a row for each member, bars for leases, bands for faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import floor, log10
from typing import Any

Event = Mapping[str, Any]

LEFT, WIDTH, ROW, TOP, BOTTOM = 130, 1040, 36, 12, 26
DRAWN = WIDTH - LEFT - 24
GAP, MOST_SHIFTED = 11, 66
"""Events at one moment stand beside one another, in their order, but no further than this from their time."""
LANES = 4
"""So many deliveries of one member are drawn one above the other."""

MARKS = {
    "publish": ("publish", "M-4,4 L4,4 L0,-4 Z"),
    "deliver": ("deliver", "M-4,-4 L4,-4 L0,4 Z"),
    "ack": ("ack", "M-4,0 L-1,4 L5,-4 L-1,1 Z"),
    "nack": ("nack", "M-4,-1.5 L4,-1.5 L4,1.5 L-4,1.5 Z"),
    "reject": ("reject", "M-4,-4 L4,4 M-4,4 L4,-4"),
    "death": ("death", "M-5,-5 L5,5 M-5,5 L5,-5"),
    "expire": ("expire", "M0,-5 L5,0 L0,5 L-5,0 Z"),
}
OTHER = ("other", "M-2.5,0 A2.5,2.5 0 1,0 2.5,0 A2.5,2.5 0 1,0 -2.5,0 Z")


def timeline(events: Sequence[Event], lasted: float) -> str:
    """Return the events of one case, which lasted so many seconds, as an inline SVG; nothing where there are none."""
    if not events:
        return ""
    drawing = _Drawing(events, lasted)
    height = TOP + ROW * len(drawing.rows) + BOTTOM
    body = "".join((*drawing.grid(), *drawing.faults(), *drawing.loans(), *drawing.marks()))
    return (
        f'<svg class="timeline" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{len(events)} events of {len(drawing.rows)} participants">{body}</svg>'
    )


class _Drawing:
    def __init__(self, events: Sequence[Event], lasted: float) -> None:
        self._events = events
        names = dict.fromkeys(event["who"] for event in events if event["op"] not in ("fault", "tally"))
        self.rows = {name: number for number, name in enumerate(names)}
        times = [event[name] for event in events for name in ("at", "since") if name in event]
        self._start: float = min(times)
        last: float = max(times)
        self._end = max(last, min(lasted, last + (last - self._start) / 3))
        if self._end - self._start < 0.01:
            self._end = self._start + 0.01
        self._places = self._placed()

    def _placed(self) -> list[float]:
        """Return where each event stands: at its time, and those of one row that fell together beside one another."""
        last: dict[str, float] = {}
        places = []
        for event in self._events:
            x = self._x(event["at"])
            before = last.get(event["who"], -GAP)
            if x < before + GAP and before - x < MOST_SHIFTED:
                x = before + GAP
            last[event["who"]] = x
            places.append(x)
        return places

    def _x(self, at: float) -> float:
        inside: float = min(max(at, self._start), self._end)
        across: float = DRAWN * (inside - self._start) / (self._end - self._start)
        return LEFT + 12 + across

    def _y(self, who: str) -> float:
        return TOP + ROW * (self.rows[who] + 0.5)

    @property
    def _bottom(self) -> float:
        return TOP + ROW * len(self.rows)

    def grid(self) -> Iterator[str]:
        """Yield the rows with their names, and the ticks of time."""
        for name, number in self.rows.items():
            y = TOP + ROW * number
            if number % 2 == 0:
                yield f'<rect class="stripe" x="0" y="{y}" width="{WIDTH}" height="{ROW}"/>'
            yield f'<text class="who" x="{LEFT - 6}" y="{y + ROW / 2 + 4}">{escape(name[-20:])}</text>'
        step = _step(self._end - self._start)
        tick = floor(self._start / step + 1) * step
        while tick <= self._end:
            x = self._x(tick)
            yield f'<line class="tick" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{self._bottom}"/>'
            yield f'<text class="time" x="{x:.1f}" y="{self._bottom + 16}">+{tick:g} s</text>'
            tick = round(tick + step, 9)

    def faults(self) -> Iterator[str]:
        """Yield a band for each fault: over the one whom it struck, or over all."""
        for event in self._events:
            if event["op"] != "fault":
                continue
            one = event["who"] in self.rows
            y, height = (self._y(event["who"]) - ROW / 2, ROW) if one else (TOP, self._bottom - TOP)
            x = self._x(event.get("since", event["at"]))
            width = max(2.0, self._x(event["at"]) - x)
            title = escape(f"fault: {event.get('note', '')} {event['who']}")
            yield (
                f'<rect class="fault" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}">'
                f"<title>{title}</title></rect>"
            )

    def loans(self) -> Iterator[str]:
        """Yield a bar for each delivery, from when it was lent until it was settled, lost, or its holder died."""
        free: dict[tuple[str, int], float] = {}
        for place, event in enumerate(self._events):
            if event["op"] != "deliver":
                continue
            x, ends = self._places[place], self._x(event.get("until", self._end))
            for number in range(place + 1, len(self._events)):
                later = self._events[number]
                same = later.get("msg") == event.get("msg") and later["op"] in ("ack", "nack", "reject", "expire")
                if later["who"] == event["who"] and (same or later["op"] in ("death", "leave")):
                    ends = min(ends, self._places[number]) if later["op"] == "expire" else self._places[number]
                    break
            who = event["who"]
            lane = next((each for each in range(LANES) if free.get((who, each), 0.0) <= x), 0)
            free[who, lane] = ends
            y = self._y(who) + ROW / 2 - 5 - 5 * lane
            yield (
                f'<rect class="loan" x="{x:.1f}" y="{y}" width="{max(1.5, ends - x):.1f}" height="4">'
                f"<title>{escape(str(event.get('msg')))} lent to {escape(who)}</title></rect>"
            )

    def marks(self) -> Iterator[str]:
        """Yield a sign for each event, with its words; what a checker points at has a ring and a label."""
        labelled: dict[str, float] = {}
        for x, event in zip(self._places, self._events, strict=True):
            if event["op"] in ("fault", "tally"):
                continue
            kind, path = MARKS.get(event["op"], OTHER)
            y = self._y(event["who"])
            pale = " pale" if event["phase"] in ("fail", "info") else ""
            ring = '<circle class="ring" r="8"/>' if event.get("marked") else ""
            yield (
                f'<g class="mark {kind}{pale}" transform="translate({x:.1f},{y})">{ring}<path d="{path}"/>'
                f"<title>{escape(_title(event))}</title></g>"
            )
            if event.get("marked") and x - labelled.get(event["who"], -1e9) > 90:
                labelled[event["who"]] = x
                words = escape(f"{event['op']} {event.get('msg', '')}".strip())
                anchor, shift = ("end", -11) if x > WIDTH - 120 else ("start", 11)
                yield f'<text class="label" x="{x + shift:.1f}" y="{y - 7}" text-anchor="{anchor}">{words}</text>'


def _title(event: Event) -> str:
    shown = ("op", "msg", "group", "phase", "attempt", "delay", "until", "error", "note")
    return f"+{event['at']:.3f} s {event['who']}: " + ", ".join(f"{n} {event[n]}" for n in shown if n in event)


def _step(span: float) -> float:
    """Return a round distance between ticks, so that there are five to twelve."""
    rough = span / 8
    unit: float = 10.0 ** floor(log10(rough))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
