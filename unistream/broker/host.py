"""The broker inside a process: one lock, two clocks, and waking those who wait; the rules are the core's.

Any thread may call a host. A member belongs to the event loop on which it joined, and is told things on that loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from .core import Broker
from .group import Group
from .lease import Lent, Session, Tag
from .spec import Entry, GroupSpec, Limits, Start, TopicSpec
from .topic import Published, Topic

__all__ = ["Host", "Member", "named", "wall_clock_ms"]


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Member:
    """One session, the loop it lives on, and what it wants to hear.

    A member that is dropped without leaving is found dead when it is collected, and what it held is lent again.

    Attributes:
        session: The broker's side.
    """

    def __init__(
        self,
        session: Session,
        loop: asyncio.AbstractEventLoop,
        voided: Callable[[Sequence[Tag]], None],
        removed: Callable[[int], None],
    ) -> None:
        self.session = session
        self._loop = loop
        self._voided = voided
        self._removed = removed
        self._waiter: asyncio.Future[None] | None = None
        self._unreported = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Host:
    """
    A broker for the threads of one process.

    Args:
        monotonic: Seconds; never goes back. Leases and delays run on it, in step with the loops' timers.
        wall_ms: Milliseconds since 1970, for the times of messages.
        limits: The broker's bounds.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = wall_clock_ms,
        limits: Limits | None = None,
    ) -> None:
        self._now = monotonic
        self._wall = wall_ms
        self._broker = Broker(limits)
        self._lock = threading.Lock()
        self._lossy = False
        # Who waits for something of a group, and until when at most.
        self._rooms: dict[Group, dict[Member, float]] = {}
        self._members: weakref.WeakValueDictionary[str, Member] = weakref.WeakValueDictionary()
        # A finalizer may run in the middle of anything, so it only leaves a note.
        self._dead: deque[Session] = deque()

    @property
    def limits(self) -> Limits:
        """The broker's bounds."""
        return self._broker.limits

    # Topics and groups.

    def create_topic(self, name: str, spec: TopicSpec) -> TopicSpec:
        """The topic's settings as they now stand: `spec`, unless it existed."""
        with self._lock:
            topic = self._broker.create_topic(name, spec)
            self._lossy = self._lossy or topic.lossy
            return topic.spec

    def delete_topic(self, name: str) -> None:
        """Delete a topic, its messages and its groups; none is fine."""
        with self._lock:
            topic = self._broker.topics.get(name)
            groups = list(topic.groups.values()) if topic else []
            self._broker.delete_topic(name)
            for group in groups:
                self._stir(group)

    def topic(self, name: str) -> TopicSpec:
        """A topic's settings."""
        with self._lock:
            return self._broker.topic(name).spec

    def topics(self) -> list[tuple[str, TopicSpec]]:
        """All topics, by name."""
        with self._lock:
            return sorted((name, topic.spec) for name, topic in self._broker.topics.items())

    def create_group(self, topic: str, name: str, spec: GroupSpec) -> GroupSpec:
        """The group's settings as they now stand: `spec`, unless it existed."""
        with self._lock:
            return self._broker.create_group(topic, name, spec, self._now(), self._wall()).spec

    def delete_group(self, topic: str, name: str) -> None:
        """Delete a group and its progress; none is fine."""
        with self._lock:
            group = self._broker.delete_group(topic, name)
            if group is not None:
                self._stir(group)

    def groups(self, topic: str) -> list[tuple[str, GroupSpec]]:
        """The groups of a topic, by name, ephemeral ones left out."""
        with self._lock:
            groups = self._broker.topic(topic).groups
            return [(name, groups[name].spec) for name in sorted(groups) if not groups[name].spec.ephemeral]

    def lag(self, topic: str, group: str) -> int:
        """Messages that the group has not settled, exactly."""
        with self._lock:
            self._bury()
            lag = self._broker.lag(topic, group, self._now(), self._wall())
            self._report(self._broker.topic(topic))
            return lag

    def members(self, topic: str, group: str) -> list[tuple[str, int]]:
        """The members of a group, by name, and how many messages each holds."""
        with self._lock:
            self._bury()
            there = self._broker.group(topic, group)
            there.expire(self._now())
            return [(session.name, session.in_flight) for session in there.sessions.values()]

    def seek(self, topic: str, group: str, to: Start) -> None:
        """Move a group; members are told which of their loans ended by it."""
        with self._lock:
            self._bury()
            ended = self._broker.seek(topic, group, to, self._now(), self._wall())
            for session, tags in ended.items():
                member = self._members.get(session.name)
                if member is not None:
                    _call(member._loop, member._voided, tags)
            self._report(self._broker.topic(topic))
            self._stir(self._broker.group(topic, group))

    # Publishing.

    def publish(self, topic: str, entries: Sequence[Entry], ids: Sequence[str]) -> int | Published:
        """Store a batch, in order, and wake who waits for it; see `Broker.publish`."""
        with self._lock:
            broker = self._broker
            result = broker.publish(topic, entries, ids, self._now(), self._wall())
            if self._rooms:
                for group in broker.topics[topic].groups.values():
                    if group in self._rooms:
                        self._stir(group)
            if self._lossy:
                self._report(broker.topics[topic])
            return result

    # Members.

    def join(
        self,
        topic: str,
        group: str,
        *,
        ephemeral: GroupSpec | None = None,
        voided: Callable[[Sequence[Tag]], None],
        removed: Callable[[int], None],
    ) -> Member:
        """
        A new member of a group, on the running loop.

        Args:
            topic: Its topic.
            group: An existing group, unless `ephemeral` is given.
            ephemeral: Settings of the group that is made for this one member.
            voided: Told which loans ended by a seek.
            removed: Told how many messages were removed before the group settled them.
        """
        with self._lock:
            self._bury()
            if ephemeral is not None:
                self._broker.create_group(topic, group, ephemeral, self._now(), self._wall())
            session = self._broker.join(topic, group)
            member = Member(session, asyncio.get_running_loop(), voided, removed)
            self._members[session.name] = member
            weakref.finalize(member, self._dead.append, session).atexit = False
            self._report(session.topic)
            return member

    def leave(self, member: Member) -> None:
        """The member goes; what it holds is given back untouched. Its waiting ends. Twice is fine."""
        with self._lock:
            self._broker.leave(member.session, self._now())
            self._stir(member.session.group)

    def grant(self, member: Member, limit: int) -> Lent | None:
        """Lend what can be lent now; see `Broker.grant`."""
        with self._lock:
            return self._grant(member, limit)

    async def wait(self, member: Member, limit: int, timeout: float) -> Lent | None:
        """
        Lend as soon as something can be lent; `None` when `timeout` seconds have passed.

        Cancellation: Nothing was lent.

        Concurrency: One call at a time per member, on the member's loop.
        """
        loop = member._loop
        until = self._now() + timeout
        while True:
            with self._lock:
                lent = self._grant(member, limit)
                now = self._now()
                if lent is not None or now >= until:
                    return lent
                member._waiter = loop.create_future()
                group = member.session.group
                due = min(until, group.next_due())
                self._rooms.setdefault(group, {})[member] = due
            timer = loop.call_later(due - now, member._wake)
            try:
                await member._waiter
            finally:
                timer.cancel()
                with self._lock:
                    self._forget(member)

    def _grant(self, member: Member, limit: int) -> Lent | None:
        if self._dead:
            self._bury()
        session = member.session
        topic = session.topic
        lent = self._broker.grant(session, limit, self._now(), self._wall() if topic.ages else 0)
        if topic.lossy:
            self._report(session.topic)
        if self._rooms:
            self._nudge(session.group)
        return lent

    # Settling. Each returns the tags refused, because the loan had ended.

    def ack(self, member: Member, tags: Collection[Tag]) -> list[Tag]:
        """Done: these are never lent to the group again."""
        with self._lock:
            refused = self._broker.ack(member.session, tags, self._now())
            if self._rooms:
                self._nudge(member.session.group)
            return refused

    def nack(self, member: Member, tags: Iterable[Tag], delay: float) -> list[Tag]:
        """Not done: lend these again, `delay` seconds from now at the soonest."""
        with self._lock:
            refused = self._broker.nack(member.session, tags, delay, self._now())
            self._after_return(member)
            return refused

    def release(self, member: Member, tags: Iterable[Tag]) -> list[Tag]:
        """Given back untouched: lend these again, the attempt not spent."""
        with self._lock:
            refused = self._broker.release(member.session, tags, self._now())
            self._after_return(member)
            return refused

    def extend(self, member: Member, tags: Iterable[Tag], seconds: float) -> list[Tag]:
        """Let these loans last `seconds` from now, at most until `max_lease` after they were lent."""
        with self._lock:
            refused = self._broker.extend(member.session, tags, seconds, self._now())
            if self._rooms:
                self._nudge(member.session.group)
            return refused

    def _after_return(self, member: Member) -> None:
        if member.session.topic.lossy:
            self._report(member.session.topic)
        if self._rooms:
            self._nudge(member.session.group)

    # Below the lock.

    def _nudge(self, group: Group) -> None:
        """Wake the waiting members of a group if there is something for them, or an earlier time to wake at."""
        room = self._rooms.get(group)
        if room is not None and (group.available(self._now()) or group.next_due() < max(room.values())):
            self._stir(group)

    def _stir(self, group: Group) -> None:
        """Wake every waiting member of a group; each looks for itself.

        All of them, since one whose loop is stuck must not keep a message from the others.
        """
        for member in self._rooms.pop(group, ()):
            if asyncio._get_running_loop() is member._loop:
                member._wake()
            else:
                _call(member._loop, member._wake)

    def _forget(self, member: Member) -> None:
        """The member waits no more."""
        member._waiter = None
        group = member.session.group
        room = self._rooms.get(group)
        if room is not None:
            room.pop(member, None)
            if not room:
                del self._rooms[group]

    def _report(self, topic: Topic) -> None:
        """Tell one member of each group what was removed under it; without members it waits for one."""
        for group in topic.groups.values():
            if group.unreported:
                for name in group.sessions:
                    member = self._members.get(name)
                    if member is not None:
                        if not member._unreported:
                            _call(member._loop, self._tell_removed, member)
                        member._unreported += group.unreported
                        group.unreported = 0
                        break

    def _tell_removed(self, member: Member) -> None:
        with self._lock:
            count, member._unreported = member._unreported, 0
        member._removed(count)

    def _bury(self) -> None:
        """Take note of members that were dropped."""
        while self._dead:
            session = self._dead.popleft()
            self._broker.lose(session, self._now())
            self._stir(session.group)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> None:
    """Call it soon on that loop, from any thread; a closed loop has nobody to tell."""
    if asyncio._get_running_loop() is loop:
        loop.call_soon(function, *args)
    elif not loop.is_closed():
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # It was closed in between.
            if not loop.is_closed():
                raise


_named: dict[str, Host] = {}
_named_lock = threading.Lock()


def named(name: str, make: Callable[[], Host] = Host) -> Host:
    """The host of that name, made now if there is none; it lives until the process ends, or `forget`."""
    with _named_lock:
        host = _named.get(name)
        if host is None:
            host = _named[name] = make()
        return host


def forget(name: str) -> None:
    """Let the name mean a new host from now on; who has the present one keeps it. None is fine."""
    with _named_lock:
        _named.pop(name, None)


def _after_fork() -> None:
    """A forked child is another process: it has no brokers yet, and no thread that could free a lock."""
    global _named_lock
    _named_lock = threading.Lock()
    _named.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
