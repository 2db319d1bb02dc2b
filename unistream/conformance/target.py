"""Knows what is being judged: a URL, the driver behind it, and how patient the suite must be with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from secrets import token_hex

import unistream
from unistream._registry import find_driver
from unistream.broker.host import forget
from unistream.capabilities import Capabilities
from unistream.config import scheme_of
from unistream.conformance.checkers import Terms
from unistream.conformance.line import Line, on_line
from unistream.conformance.wrap import DriverLayer, stack
from unistream.driver.contract import Driver


@dataclass(frozen=True, slots=True)
class Pace:
    """
    How long things may take on a target, in seconds.

    Attributes:
        lease: The lease that cases use where they wait for its end.
        patience: The limit of every wait for something that must come; free when it comes.
        silence: How long nothing must come before the suite believes that nothing comes; always paid in full.
        slack: What a loaded machine may add.
    """

    lease: float = 2.0
    patience: float = 15.0
    silence: float = 1.0
    slack: float = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """
    A backend under judgement.

    Attributes:
        url: Where it is; the only thing most targets have.
        driver: The driver class, where the URL does not say it.
        layers: What stands between the library and the driver, such as a saboteur.
        lacks: What cannot exist for this target, and why: `socket`, `process`, `password`, …
        hooks: Commands that act on the broker: `restart`, `kill`, `pause`, `resume`.
        virtual: Runs on a virtual clock, its broker in this process.
    """

    url: str
    driver: type[Driver]
    layers: tuple[type[DriverLayer], ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    hooks: Mapping[str, str] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    virtual: bool = False

    @classmethod
    def of(cls, url: str, *, pace: Pace | None = None, hooks: Mapping[str, str] | None = None) -> Target:
        """
        Return the target that a URL names.

        A broker that lives in this process, beyond the reach of sockets and other processes, is judged on a virtual
        clock: exactly, repeatably, and in no time.

        Raises:
            ConfigError: The URL is wrong, or no driver serves it.
        """
        driver = find_driver(scheme_of(url))
        virtual = {"socket", "process"} <= driver.lacks.keys()
        return cls(url, driver, lacks=driver.lacks, hooks=hooks or {}, pace=pace or Pace(), virtual=virtual)

    def fresh(self) -> Target:
        """Return the target for one more trial: on a virtual clock every trial has a broker of its own."""
        return replace(self, url=f"{self.url.rstrip('/')}-{token_hex(4)}") if self.virtual else self

    def forget(self) -> None:
        """Let go of the broker that a virtual trial had to itself; it would live as long as the process."""
        if self.virtual:
            forget(self.url.partition("://")[2])

    def driver_class(self, line: Line | None = None) -> type[Driver]:
        """Return the driver with the target's layers over it, and the line above all."""
        driver = stack(self.driver, *self.layers)
        return driver if line is None else on_line(driver, line)

    def connect(self, line: Line | None = None, *, require: Mapping[str, object] | None = None) -> unistream.Client:
        """Return a new client, not entered yet; with a line, it can be cut off from the broker."""
        return unistream.connect(self.url, driver=self.driver_class(line), require=require)

    def terms(self, claims: Capabilities) -> Terms:
        """Return what a history of this target is judged by."""
        return Terms(
            dedupe=bool(claims.dedupe),
            fencing=bool(claims.fencing),
            attempts_exact=bool(claims.attempts) and claims.attempts.count == "exact",
            nacks_twice=claims.nack_delay.twice,
            nack_kept_for=claims.nack_delay.kept_for,
            lease_scope=claims.lease.scope,
            blocks=claims.ordering.blocks,
            rebalances=claims.lease.scope == "member" and claims.parallelism.bound == "partitions",
            durable=claims.durability.satisfies("process_crash") and claims.ack_confirm.survives == "crash",
            recover_within=claims.lease.recover_within,
            resolution=0.001 if self.virtual else 0.02,
            settle_flush=0.1 if self.virtual else 0.1 + self.pace.slack,
            grace=self.pace.slack,
        )
