"""The broker: topics, groups, sessions and every command on them; no clock, no chance, no input or output.

Time comes in with each command: `now` in seconds of a clock that never goes back, `wall_ms` in milliseconds since 1970.
What has come due since the last command is done first, so nothing runs in between. Not safe for threads: `host` is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import count

from .errors import GroupMissing, InvalidRequest, SessionEnded, TopicMissing
from .group import Group
from .lease import Lent, Session, Tag
from .spec import Entry, GroupSpec, Limits, Start, TopicSpec
from .topic import Published, Topic

__all__ = ["Broker"]


class Broker:
    """Every topic of one broker.

    Attributes:
        topics: By name.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.topics: dict[str, Topic] = {}
        # One count for fences, timers and members: no two things of a broker share a number.
        self._numbers = count(1)

    # Topics.

    def create_topic(self, name: str, spec: TopicSpec) -> Topic:
        """The topic of that name, created now where there was none; the caller compares its spec."""
        topic = self.topics.get(name)
        if topic is None:
            topic = self.topics[name] = Topic(name, spec, self.limits, self._numbers)
        return topic

    def topic(self, name: str) -> Topic:
        """The topic of that name; raises `TopicMissing`."""
        topic = self.topics.get(name)
        if topic is None:
            raise TopicMissing(f"there is no topic {name!r}")
        return topic

    def delete_topic(self, name: str) -> Topic | None:
        """Delete a topic with its messages and groups; returns what was deleted."""
        topic = self.topics.pop(name, None)
        if topic is not None:
            topic.delete()
        return topic

    def publish(
        self, topic: str, entries: Sequence[Entry], ids: Sequence[str], now: float, wall_ms: int
    ) -> int | Published:
        """
        Store a batch, in order.

        Args:
            topic: Its name.
            entries: At least one.
            ids: What deduplication compares, one per entry.
            now: Seconds of the broker's clock.
            wall_ms: Milliseconds since 1970: the time that the messages get.

        Returns:
            The offset of the first message, if each was stored after the other; else what became of each.

        Raises:
            TopicMissing: There is no such topic.
        """
        there = self.topics.get(topic)
        if there is None:
            raise TopicMissing(f"there is no topic {topic!r}")
        return there.publish(entries, ids, now, wall_ms)

    # Groups.

    def create_group(self, topic: str, name: str, spec: GroupSpec, now: float, wall_ms: int) -> Group:
        """The group of that name, pinned now where there was none; the caller compares its spec."""
        there = self.topic(topic)
        there.trim(now, wall_ms)
        return there.create_group(name, spec)

    def group(self, topic: str, name: str) -> Group:
        """The group of that name; raises `TopicMissing` or `GroupMissing`."""
        group = self.topic(topic).groups.get(name)
        if group is None:
            raise GroupMissing(f"topic {topic!r} has no group {name!r}")
        return group

    def delete_group(self, topic: str, name: str) -> Group | None:
        """Delete a group and its progress; returns what was deleted."""
        there = self.topics.get(topic)
        group = there.groups.get(name) if there else None
        if there and group:
            there.delete_group(name)
        return group

    def lag(self, topic: str, name: str, now: float, wall_ms: int) -> int:
        """Messages that the group has not settled, exactly."""
        self.topic(topic).trim(now, wall_ms)
        group = self.group(topic, name)
        group.expire(now)
        return group.lag

    def seek(self, topic: str, name: str, to: Start, now: float, wall_ms: int) -> dict[Session, list[Tag]]:
        """Move a group; the loans that ended by it, by session."""
        there = self.topic(topic)
        there.trim(now, wall_ms)
        group = self.group(topic, name)
        group.expire(now)
        return group.seek(*there.resolve(to))

    # Members.

    def join(self, topic: str, name: str) -> Session:
        """Make a session of an existing group."""
        group = self.group(topic, name)
        if group.spec.ephemeral and group.sessions:
            raise InvalidRequest(f"ephemeral group {name!r} has its one member already")
        session = Session(f"member-{next(self._numbers)}", self.topic(topic), group)
        group.sessions[session.name] = session
        return session

    def leave(self, session: Session, now: float) -> None:
        """The session goes properly: what it holds is given back untouched. Twice is fine."""
        if session.ended is None:
            session.group.expire(now)
            session.group.leave(session, now)
            self._part(session)

    def lose(self, session: Session, now: float) -> None:
        """The session is dead: what it holds is lent again as suspect. Twice is fine."""
        if session.ended is None:
            session.group.expire(now)
            session.group.lose(session, now)
            self._part(session)

    def _part(self, session: Session) -> None:
        session.ended = (SessionEnded, f"{session.name} has left")
        group = session.group
        del group.sessions[session.name]
        if group.spec.ephemeral:
            session.topic.delete_group(group.name)

    # Loans.

    def grant(self, session: Session, limit: int, now: float, wall_ms: int) -> Lent | None:
        """
        Lend up to `limit` messages to a session; `None` if there is nothing to lend now.

        Raises:
            TopicMissing, GroupMissing, SessionEnded: Why this session gets nothing any more.
        """
        if session.ended is not None:
            kind, text = session.ended
            raise kind(text)
        if limit < 1:
            raise InvalidRequest(f"limit is {limit}; it must be at least 1")
        if session.topic.ages:
            session.topic.trim(now, wall_ms)
        return session.group.grant(session, limit, now)

    def ack(self, session: Session, tags: Collection[Tag], now: float) -> list[Tag]:
        """Done: these are never lent to the group again. Returns the tags refused, here and below."""
        refused = session.group.ack(tags, now)
        session.topic.after_settle(len(tags), now)
        return refused

    def nack(self, session: Session, tags: Iterable[Tag], delay: float, now: float) -> list[Tag]:
        """Not done: lend these again, `delay` seconds from now at the soonest."""
        return session.group.nack(tags, delay, now)

    def release(self, session: Session, tags: Iterable[Tag], now: float) -> list[Tag]:
        """Given back untouched: lend these again, the attempt not spent."""
        return session.group.release(tags, now)

    def extend(self, session: Session, tags: Iterable[Tag], seconds: float, now: float) -> list[Tag]:
        """Let these loans last `seconds` from now, at most until `max_lease` after they were lent."""
        return session.group.extend(tags, seconds, now)
