"""Cases `sim.*`: seeded random workloads, judged by every checker."""

from __future__ import annotations

from unistream.conformance.plan import SHAPES, Shape, draw
from unistream.conformance.registry import GATED, MUST, Level, Tier, case
from unistream.conformance.trial import Trial
from unistream.conformance.workload import play


def _simulation(name: str, shape: Shape, *, faults: bool, level: Level, sentence: str) -> None:
    """Enter one case: a few seeds of a shape, one after another on one target."""

    async def simulate(trial: Trial) -> None:
        for turn in range(3):
            await play(trial, draw(trial.seed * 1000 + turn, shape, faults=faults, lease=trial.lease))

    simulate.__doc__ = sentence
    tier = Tier.FAULTS if faults else Tier.CORE
    enter = case(
        name,
        rules=("PUB-1", "GRP-1", "GRP-2", *(("ORD-2",) if shape == "keyed" else ())),
        level=level,
        tier=tier,
        sometimes=("delivered", "redelivered", "acked", "nacked", "drained"),
        limit=600.0,
    )
    enter(simulate)


QUIET = {
    "queue": "A random load on one group of several members breaks no rule.",
    "fan-out": "A random load on several groups breaks no rule.",
    "keyed": "A random load on ordered groups breaks no rule.",
}

for _shape in SHAPES:
    _level = GATED(ordering="key") if _shape == "keyed" else MUST
    _simulation(f"sim.{_shape}", _shape, faults=False, level=_level, sentence=QUIET[_shape])
    _simulation(
        f"sim.{_shape}-faults",
        _shape,
        faults=True,
        level=_level,
        sentence=QUIET[_shape][:-1] + ", nor while members die, leave and stall and publishes fail.",
    )
