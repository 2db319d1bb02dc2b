"""Cases `sim.*` on real brokers: random workloads with processes, wires and the broker itself failing."""

from __future__ import annotations

from unistream.conformance.hooks import KILL9, RESTART
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.storm import BROKER, CLIENT, NET, Storm, rage
from unistream.conformance.trial import Trial

WORLD = ("process", "socket")
SOMETIMES = ("fault", "confirmed", "delivered", "drained")
RULES = ("PUB-1", "GRP-1", "GRP-2", "DEL-1", "DEL-9")
MESSAGES = 2000


@case(
    "sim.client-faults",
    rules=RULES,
    tier=Tier.FAULTS,
    facilities=WORLD,
    sometimes=(*SOMETIMES, "killed"),
    limit=600.0,
    alone=True,
)
async def client_faults(trial: Trial) -> None:
    """While processes are killed, stopped and made to leave, nothing confirmed is lost and no loans overlap."""
    await rage(trial, Storm("queue", MESSAGES, 6, CLIENT))


@case(
    "sim.net-faults",
    rules=RULES,
    tier=Tier.FAULTS,
    facilities=WORLD,
    sometimes=(*SOMETIMES, "broken"),
    limit=600.0,
    alone=True,
)
async def net_faults(trial: Trial) -> None:
    """While wires are reset, cut, held, slowed and lose bytes, nothing confirmed is lost and no loans overlap."""
    await rage(trial, Storm("fan-out", MESSAGES, 7, NET, members=2))


@case(
    "sim.keyed-storm",
    rules=("ORD-2", *RULES),
    level=GATED(ordering="key"),
    tier=Tier.FAULTS,
    facilities=WORLD,
    sometimes=SOMETIMES,
    limit=600.0,
    alone=True,
)
async def keyed_faults(trial: Trial) -> None:
    """While processes and wires fail, no message is lent ahead of an unsettled older one of its key."""
    await rage(trial, Storm("keyed", MESSAGES, 10, (*CLIENT, *NET)))


@case(
    "sim.broker-faults",
    rules=RULES,
    level=GATED(durability="process_crash"),
    tier=Tier.BROKER,
    facilities=(*WORLD, f"hook:{RESTART}", f"hook:{KILL9}"),
    sometimes=(*SOMETIMES, "struck"),
    limit=600.0,
    alone=True,
)
async def broker_faults(trial: Trial) -> None:
    """While the broker is restarted and killed, and clients too, nothing confirmed is lost and no loans overlap."""
    await rage(trial, Storm("queue", MESSAGES, 5, (*BROKER, "kill", "reset")))
