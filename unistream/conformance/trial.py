"""Knows one run of one case: fresh names, recorded hands, the checks that the case makes itself, and cleaning up.

The suite, not the adapter, owns the life of everything: what a trial creates it deletes, whatever happens between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from unistream.capabilities import Capabilities
from unistream.conformance.checkers import Terms
from unistream.conformance.history import NANO, Recorder
from unistream.conformance.identity import new_run
from unistream.conformance.line import Line
from unistream.conformance.proxy import Proxy, via
from unistream.conformance.recorded import Lent, RecordedMember, RecordedProducer, fingerprint
from unistream.conformance.target import Pace, Target
from unistream.errors import UnistreamError, UnsupportedError

if TYPE_CHECKING:
    from unistream import Client, Group

T = TypeVar("T")


class CheckError(AssertionError):
    """
    A case saw something other than its rule demands.

    Attributes:
        rule: The rule, in the contract's numbering.
        expected: What the rule demands, in words.
        actual: What was seen.
    """

    def __init__(self, rule: str, expected: str, actual: str) -> None:
        super().__init__(f"{rule}: expected {expected}; actual: {actual}")
        self.rule = rule
        self.expected = expected
        self.actual = actual


class VacuousError(Exception):
    """The case could not do what it is about, so it shows nothing; never a pass."""


class ImpossibleError(Exception):
    """What the case needs can't exist on this target as it is set up; the message says why."""


class Trial:
    """
    One run of one case against one target. An async context manager.

    Attributes:
        client: A client that is open while the trial lasts.
        claims: The target's capabilities, as the live server gives them.
        recorder: Takes the history.
        run: Name of this run, in every message.
    """

    client: Client
    claims: Capabilities

    def __init__(self, target: Target, name: str, *, seed: int = 0, run: str | None = None) -> None:
        self.target = target
        self.name = name
        self.seed = seed
        self.run = new_run() if run is None else run
        self.terms: Terms = Terms()
        self._loop = asyncio.get_running_loop()
        self.recorder = Recorder(lambda: round(self._loop.time() * NANO), proc=name)
        self._stack = AsyncExitStack()
        self._topics: list[str] = []
        self._counts: dict[str, int] = {}
        self._lines: list[Line] = []
        self._options: dict[tuple[str, str], dict[str, Any]] = {}

    async def __aenter__(self) -> Self:
        try:
            self.client = await self._stack.enter_async_context(self.target.connect())
        except BaseException:
            await self._stack.aclose()
            raise
        self.claims = self.client.capabilities
        self.terms = self.target.terms(self.claims)
        self._stack.push_async_callback(self._delete_topics)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines:
            if line.dead:
                line.bury()
        await self._stack.__aexit__(kind, error, trace)

    @property
    def pace(self) -> Pace:
        """How patient the case must be."""
        return self.target.pace

    @property
    def lease(self) -> float:
        """A lease that the target keeps as asked for, short enough to wait for its end."""
        return max(self.pace.lease, self.claims.lease.least)

    @property
    def recovery(self) -> float:
        """The most that may pass until a dead member's deliveries are lent again, in seconds."""
        return self.lease + self.claims.lease.recover_within + self.pace.slack

    @property
    def lull(self) -> float:
        """After so many seconds without a delivery nothing more comes: a group that shares out partitions may stand."""
        stands = self.claims.lease.recover_within if self.terms.rebalances else 0.0
        return self.pace.silence + stands

    # What a case works with

    async def open(self, line: Line | None = None, *, require: Mapping[str, object] | None = None) -> Client:
        """Return another client, open while the trial lasts."""
        if line is not None:
            self._lines.append(line)
        return await self._stack.enter_async_context(self.target.connect(line, require=require))

    async def keep(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter something that lasts as long as the trial."""
        return await self._stack.enter_async_context(context)

    def fresh(self, kind: str) -> str:
        """Return a name that nobody has used: of a topic, a group, a member or a producer."""
        self._counts[kind] = number = self._counts.get(kind, 0) + 1
        return f"{kind}{number}"

    async def topic(self, **options: Any) -> str:
        """Create a topic of a fresh name; it is deleted when the trial ends."""
        name = f"us-{self.run}-{self.name}-{self.fresh('t')}"
        self._topics.append(name)
        await self.client.create_topic(name, **options)
        return name

    async def group(
        self, topic: str, name: str | None = None, *, client: Client | None = None, **options: Any
    ) -> Group:
        """Create a group, recorded. Its lease is the trial's unless given."""
        options = {"lease": self.lease, **options}
        group = (client or self.client).group(name or self.fresh("g"), topic, **options)
        self._options[topic, group.name or ""] = options
        retry = options.get("retry")
        config = {
            "ordering": options.get("ordering", "none"),
            "start": str(options.get("start", "latest")),
            "lease": max(options["lease"], self.claims.lease.least),
            "max_attempts": None if retry is None else retry.max_attempts,
            "dead_letter": options.get("dead_letter") if isinstance(options.get("dead_letter"), str) else None,
        }
        if retry is not None:
            config["backoff"] = retry.backoff.max * (1 + retry.backoff.jitter)
        call = self.recorder.invoke("create", topic=topic, group=group.name, config=config)
        try:
            await group.create()
        except BaseException as error:
            call.info(error)
            raise
        call.ok()
        return group

    def regroup(self, client: Client, group: Group) -> Group:
        """Return the same group, of another client."""
        return client.group(group.name, group.topic, **self.options_of(group))

    def options_of(self, group: Group) -> dict[str, Any]:
        """Return what the group was created with, as arguments of `Client.group`."""
        return dict(self._options[group.topic, group.name or ""])

    async def producer(self, topic: str, *, client: Client | None = None, **options: Any) -> RecordedProducer:
        """Return an open producer of recorded messages."""
        producer = RecordedProducer(
            self.recorder, client or self.client, topic, name=self.fresh("p"), run=self.run, **options
        )
        return await self._stack.enter_async_context(producer)

    async def member(self, group: Group, *, max_in_flight: int = 100, name: str | None = None) -> RecordedMember:
        """Return a member that has joined; it leaves when the trial ends, unless it left or died before."""
        member = RecordedMember(
            self.recorder, group, name=name or self.fresh("m"), run=self.run, max_in_flight=max_in_flight
        )
        await member.__aenter__()
        self._stack.push_async_callback(self._dismiss, member)
        return member

    async def mortal(self) -> tuple[Client, Line]:
        """
        Return a client and its line, by which it can die: see `kill`.

        Where there are sockets they go through a proxy: a driver that renews its membership on its own must die too.
        """
        target = self.target
        if "socket" in target.lacks:
            line = Line()
        else:
            proxy = await self.keep(Proxy())
            line = Line(proxy)
            target = replace(target, driver=via(target.driver, proxy))
        self._lines.append(line)
        return await self.keep(target.connect(line)), line

    async def doomed(self, group: Group, *, max_in_flight: int = 100) -> tuple[RecordedMember, Line]:
        """Return a member on a client of its own, so that it can die."""
        client, line = await self.mortal()
        return await self.member(self.regroup(client, group), max_in_flight=max_in_flight), line

    def kill(self, member: RecordedMember, line: Line) -> None:
        """Let a member die: from now on nothing passes between it and the broker."""
        line.kill()
        member.died()

    # What a case checks

    def that(self, holds: bool, rule: str, expected: str, actual: object) -> None:
        """
        Check one thing.

        Raises:
            CheckError: It does not hold.
        """
        if not holds:
            raise CheckError(rule, expected, actual if isinstance(actual, str) else repr(actual))

    def equal(self, actual: object, expected: object, rule: str, what: str) -> None:
        """Check that two values are equal."""
        self.that(actual == expected, rule, f"{what} {expected!r}", actual)

    async def raises(
        self, kind: type[BaseException], doing: Awaitable[object], rule: str, *, within: float | None = None
    ) -> BaseException:
        """Check that `doing` raises an error of that kind, in time, and return it."""
        limit = self.pace.patience if within is None else within
        try:
            async with asyncio.timeout(limit):
                result = await doing
        except kind as error:
            return error
        except TimeoutError:
            raise CheckError(rule, f"{kind.__name__} within {limit} s", "nothing happened") from None
        except UnsupportedError:
            # A refusal of what the target does not offer: no other error can be asked of it then.
            raise
        except UnistreamError as error:
            raise CheckError(rule, kind.__name__, f"{type(error).__name__}: {error}") from error
        raise CheckError(rule, kind.__name__, f"it returned {result!r}")

    async def works(self, doing: Awaitable[T], rule: str, what: str) -> T:
        """Return what comes of something that the rule says must work; an error of the library breaks it."""
        try:
            return await doing
        except UnsupportedError:
            raise  # by a capability that is not claimed: the runner judges that
        except UnistreamError as error:
            raise CheckError(rule, what, f"{type(error).__name__}: {error}") from error

    async def within(self, seconds: float, doing: Awaitable[T], rule: str, what: str) -> T:
        """Wait for something that must happen, generously: the wait is free when it does."""
        try:
            async with asyncio.timeout(seconds):
                return await doing
        except TimeoutError:
            raise CheckError(rule, f"{what} within {seconds} s", "it did not happen") from None

    async def next(self, member: RecordedMember, rule: str = "GRP-1", *, timeout: float | None = None) -> Lent:
        """Receive a delivery that must come."""
        limit = self.pace.patience if timeout is None else timeout
        lent = await member.receive(limit)
        if lent is None:
            raise CheckError(rule, f"a delivery to {member.name} within {limit} s", "none")
        return lent

    async def take(self, member: RecordedMember, count: int, rule: str = "GRP-1") -> list[Lent]:
        """Receive `count` deliveries that must come."""
        return [await self.next(member, rule) for _ in range(count)]

    async def collect(
        self,
        member: RecordedMember,
        names: Collection[str],
        rule: str,
        *,
        seconds: float,
        settle: Callable[[Lent], Awaitable[object]] = Lent.ack,
    ) -> None:
        """Settle what comes until all of `names` have come."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        missing = set(names)
        while missing and loop.time() < ends:
            lent = await member.receive(min(1.0, max(0.01, ends - loop.time())))
            if lent is not None:
                missing.discard(lent.msg or "")
                await settle(lent)
        told = f"missing {len(missing)}: {', '.join(sorted(missing)[:8])}"
        self.that(not missing, rule, f"all {len(names)} messages within {seconds:.1f} s", told)

    async def silent(self, member: RecordedMember, rule: str, *, seconds: float | None = None) -> None:
        """Check that a member receives nothing; costs the whole time, so prefer a fence message."""
        limit = self.pace.silence if seconds is None else seconds
        lent = await member.receive(limit)
        if lent is not None:
            raise CheckError(rule, f"no delivery to {member.name} for {limit} s", f"{lent.msg}")

    def tally(self, what: str, count: int = 1) -> None:
        """Count something that the case is about; the case names it in `sometimes`."""
        self.recorder.record("tally", note=what, count=count)

    def stray(self, body: bytes) -> None:
        """Record that a message with this body, none of the suite's own, is published on purpose."""
        self.recorder.record("stray", digest=fingerprint(body))
        self.tally("strays")

    async def drain(self, *groups: Group, quiet: float | None = None, limit: float | None = None) -> None:
        """
        Consume and ack with fresh members until nothing more comes, and record how that ended.

        Complete (`ok`) when the lag is exactly zero, or, where no exact lag is told, after `quiet` seconds without a
        delivery. Three times that without a delivery beside a lag is `fail`: it stands still. Out of time is `info`.
        """
        quiet = 3 * self.lease + self.claims.lease.recover_within if quiet is None else quiet
        limit = 20 * quiet + self.pace.patience if limit is None else limit
        members = [await self.member(self.regroup(await self.open(), group)) for group in groups]
        # Side by side: most of it is waiting for nothing more to come.
        async with asyncio.TaskGroup() as tasks:
            for member in members:
                tasks.create_task(self._drain(member, quiet, limit))

    async def _drain(self, member: RecordedMember, quiet: float, limit: float) -> None:
        group = member.group
        ends = self._loop.time() + limit
        last = self._loop.time()
        exact = bool(self.claims.lag) and self.claims.lag.exact
        while self._loop.time() < ends and self._loop.time() - last < 3 * quiet:
            # Many at once: a backlog of thousands must not take a round trip for each.
            lents = await member.receive_many(50, min(quiet, 1.0))
            if lents:
                last = self._loop.time()
                await asyncio.gather(*(_ack(lent, confirm=bool(self.claims.ack_confirm)) for lent in lents))
                continue
            lag = (await group.lag()).messages if exact else None
            if lag == 0 or (lag is None and self._loop.time() - last >= quiet):
                self.recorder.record("drain", "ok", topic=group.topic, group=group.name)
                break
        else:
            stuck = self._loop.time() - last >= 3 * quiet
            self.recorder.record("drain", "fail" if stuck else "info", topic=group.topic, group=group.name)
        await member.leave()

    # Cleaning up

    async def _dismiss(self, member: RecordedMember) -> None:
        await member.consumer.close()
        member.hear()

    async def _delete_topics(self) -> None:
        for name in self._topics:
            await self.client.delete_topic(name)


async def _ack(lent: Lent, *, confirm: bool) -> None:
    try:
        await lent.ack(confirm=confirm)
    except UnistreamError:
        # Recorded; the message comes again if the ack was refused.
        return
