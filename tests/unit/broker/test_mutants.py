"""The simulation is worth something: it notices each of a list of defects put into the broker."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

from tests.unit.broker.test_simulation import Run
from unistream.broker import dedupe, group, ordered, topic

STEPS = 1000
SEEDS = range(12)

MUTANTS: dict[str, tuple[ModuleType, str, str]] = {
    "a stale settle is taken": (
        group,
        "if lease is None or lease.token + offset != tag:\n                refused.append(tag)\n                cont",
        "if lease is None:\n                refused.append(tag)\n                cont",
    ),
    "a nack forgets its delay": (group, "self._wait(back, now + delay, now)", "self._wait(back, now, now)"),
    "a nack spends no attempt": (
        group,
        "self._attempts[offset] = self._attempts.get(offset, 0) + 1\n        self._suspects.difference_update(back)",
        "self._attempts.get(offset, 0)\n        self._suspects.difference_update(back)",
    ),
    "a lost lease makes no suspect": (group, "self._suspects.update(back)", "self._suspects.update(())"),
    "a suspect has company": (group, "elif again[0] in self._suspects:", "elif False:"),
    "a lease never ends": (
        group,
        "self._lose(lease, lease.deadline)",
        "heappush(ends, (now + 1.0, next(self._numbers), lease))",
    ),
    "an extended lease ends at its old time": (group, "if lease.deadline > now:\n", "if False:\n"),
    "max_lease is no bound": (group, "min(now + seconds, lease.granted + self.spec.max_lease)", "now + seconds"),
    "a seek leaves loans": (group, "        self.leased.clear()\n", ""),
    "a seek forgets attempts": (group, "if offset >= target}", "if offset < 0}"),
    "the floor passes what waits": (group, "floor not in leased and floor not in waiting", "floor not in leased"),
    "removed unseen messages are not counted": (
        group,
        "lost + self._drop_unseen(max(",
        "lost + 0 * self._drop_unseen(max(",
    ),
    "removed waiting messages are not counted": (
        group,
        "self._count_removed(lost + self._drop_unseen(max(",
        "self._count_removed(self._drop_unseen(max(",
    ),
    "dropped messages are not counted": (group, "lost + self._drop_unseen(min(", "lost + 0 * self._drop_unseen(min("),
    "a removed message comes again": (group, "if offset < start:", "if offset < 0:"),
    "acked messages keep their attempts": (
        group,
        "self._attempts.pop(offset, None)\n                self._suspects",
        "self._suspects",
    ),
    "a key is free while its message waits": (ordered, "lanes[key] = None", "lanes.pop(key, None)"),
    "a settled message does not free its key": (
        ordered,
        "if lane:\n",
        "if True:\n            return\n        if lane:\n",
    ),
    "parked messages come newest first": (
        ordered,
        "offset = lane.popleft()\n        ",
        "offset = lane.pop()\n        ",
    ),
    "a duplicate in another generation is stored": (dedupe, "and self._elder.keys().isdisjoint(ids)", ""),
    "a duplicate in a batch moves the first one": (dedupe, "younger.keys().isdisjoint(ids) and", "True and"),
    "an id is remembered too long": (dedupe, "offset >= self._valid_from else", "offset >= 0 else"),
    "the backlog is one too long": (
        topic,
        "return self._max_backlog - self.backlog",
        "return self._max_backlog - self.backlog + 1",
    ),
    "the history takes unsettled messages": (topic, "target = min(floor, max(", "target = max(floor, max("),
    "one message too few is kept": (topic, "log.end - spec.max_messages)", "log.end - spec.max_messages + 1)"),
}


def mutate(monkeypatch: pytest.MonkeyPatch, module: ModuleType, old: str, new: str) -> None:
    """Put the methods of a changed copy of the module's classes into the classes themselves."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    changed: dict[str, Any] = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(source.replace(old, new), module.__file__ or "", "exec"), changed)
    if module is ordered:
        # Its methods call super(), so the changed class stands in as a whole.
        monkeypatch.setattr(topic, "OrderedGroup", changed["OrderedGroup"])
        return
    for name, kind in inspect.getmembers(module, inspect.isclass):
        if kind.__module__ == module.__name__:
            for method, function in vars(changed[name]).items():
                if inspect.isfunction(function):
                    monkeypatch.setattr(kind, method, function)


@pytest.mark.parametrize("defect", MUTANTS)
def test_the_simulation_notices(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a dozen seeds finds the defect."""
    mutate(monkeypatch, *MUTANTS[defect])

    def fails(seed: int) -> bool:
        run = Run(seed)
        try:
            for _ in range(STEPS):
                run.step()
            run.drain()
        except (AssertionError, LookupError, ValueError):
            return True
        return False

    assert any(fails(seed) for seed in SEEDS), f"{len(SEEDS)} runs of {STEPS} steps did not notice"
