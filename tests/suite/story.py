"""Hand-written histories: one call a line, times in seconds, everything else filled in."""

from __future__ import annotations

from unistream.conformance.history import NANO, Call, History, Recorder


class Story:
    """A history told line by line; `at` moves the clock, everything is recorded at the present time."""

    def __init__(self, *, ordering: str = "none", lease: float = 10.0, **config: object) -> None:
        self.now = 0.0
        self.recorder = Recorder(lambda: round(self.now * NANO))
        self.lease = lease
        self.config = {"ordering": ordering, "lease": lease, **config}
        self.group()

    def at(self, now: float) -> Story:
        """Move the clock to `now` seconds."""
        assert now >= self.now, "a story is told in order"
        self.now = now
        return self

    def group(self, group: str = "g", *, topic: str = "t") -> Story:
        """Create a group."""
        self.recorder.invoke("create", topic=topic, group=group, config=self.config).ok()
        return self

    def publish(
        self,
        msg: str,
        *,
        key: str | None = None,
        position: str | None = None,
        outcome: str = "ok",
        digest: str | None = None,
        took: float = 0.0,
    ) -> Story:
        """Publish a message; its position is its number unless given."""
        call = self.recorder.invoke("publish", topic="t", msg=msg, key=_hex(key), digest=digest)
        self.now += took
        if outcome == "ok":
            call.ok(position=position or msg.rpartition(".")[2])
        elif outcome == "fail":
            call.fail("NotPublishedError")
        else:
            call.info("PublishUnknownError")
        return self

    def join(self, member: str, *, group: str = "g", limit: int | None = None) -> Story:
        """Let a member join."""
        self.recorder.record("join", topic="t", group=group, member=member, limit=limit)
        return self

    def deliver(
        self,
        lending: str,
        msg: str | None,
        member: str,
        *,
        group: str = "g",
        topic: str = "t",
        key: str | None = None,
        attempt: int = 1,
        position: str | None = None,
        lease: float | None = None,
        error: str | None = None,
        digest: str | None = None,
        origin: str | None = None,
    ) -> Story:
        """Deliver a message to a member under the name `lending`."""
        self.recorder.record(
            "deliver",
            topic=topic,
            group=group,
            member=member,
            msg=msg,
            key=_hex(key),
            lending=lending,
            attempt=attempt,
            partition=0,
            position=position or (msg or "x.0").rpartition(".")[2],
            until=round((self.now + (self.lease if lease is None else lease)) * NANO),
            error=error,
            digest=digest,
            origin=origin,
        )
        return self

    def settle(
        self,
        op: str,
        lending: str,
        *,
        outcome: str = "ok",
        confirmed: bool = True,
        delay: float | None = None,
        error: str = "LeaseLostError",
        took: float = 0.0,
    ) -> Story:
        """Settle (or extend) a delivery."""
        call: Call = self.recorder.invoke(op, lending=lending, delay=delay)
        self.now += took
        if outcome == "ok":
            call.ok(confirmed=confirmed)
        elif outcome == "fail":
            call.fail(error)
        elif outcome == "info":
            call.info(error)
        return self

    def ack(self, lending: str, **how: object) -> Story:
        """Ack a delivery."""
        return self.settle("ack", lending, **how)  # type: ignore[arg-type]

    def nack(self, lending: str, **how: object) -> Story:
        """Nack a delivery."""
        return self.settle("nack", lending, **how)  # type: ignore[arg-type]

    def event(self, op: str, **data: object) -> Story:
        """Record any event; `since` in seconds."""
        if isinstance(since := data.get("since"), (int, float)):
            data["since"] = round(since * NANO)
        self.recorder.record(op, **data)
        return self

    def leave(self, member: str) -> Story:
        """Let a member leave properly."""
        self.recorder.invoke("leave", member=member).ok()
        return self

    def drain(self, outcome: str = "ok", *, group: str = "g", topic: str = "t") -> Story:
        """Drain the group with fresh members."""
        self.recorder.record("drain", outcome, topic=topic, group=group)  # type: ignore[arg-type]
        return self

    def history(self) -> History:
        """Return the whole story."""
        return self.recorder.history()


def _hex(key: str | None) -> str | None:
    return None if key is None else key.encode().hex()
