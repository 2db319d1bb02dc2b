"""The loans that one member holds, and how they end: acks, naks and extensions, many in one write.

JetStream has no fence: an ack names the message, and ends whichever loan of it stands. So a loan ends here by this
member's own clock, which is behind the server's, and nothing late is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence

from unistream.driver.types import Settlement, SettleOutcome, Token, Verb
from unistream.errors import LeaseLostError
from unistream_nats.errors import translate
from unistream_nats.lane import Arrival
from unistream_nats.link import Link
from unistream_nats.notes import Note, Notes
from unistream_nats.registry import NANOSECONDS
from unistream_nats.wire import Call, Wire

__all__ = ["Loan", "Loans"]

_ACK = b"+ACK"
_NAK = b"-NAK"
_PROGRESS = b"+WPI"
_PATIENCE = 1.0
"""Seconds to wait for the answer to a settle, before it is asked for again."""
_EARLY_MOST = 1.0
"""Seconds by which a server that was started again may end a delay too early: it has written whole ones down."""


class Loan:
    """
    One loan.

    Attributes:
        arrival: The message as it came.
        deadline: When it ends by our clock.
        served_until: Until when the server keeps it; renewed for those whose deadline is later.
        note: What was noted of the message before.
        suspect: Whether its member before may have died of it.
        doubtful: A nak was sent and its answer lost.
    """

    __slots__ = ("arrival", "deadline", "doubtful", "note", "served_until", "suspect")

    def __init__(self, arrival: Arrival, note: Note | None, suspect: bool) -> None:
        self.arrival = arrival
        self.note = note
        self.suspect = suspect
        self.deadline = 0.0
        self.served_until = 0.0
        self.doubtful = False


class Loans:
    """
    The loans of one member, by token.

    Args:
        link: The connection.
        notes: Where it is noted that a message was given back.
        topic: The topic's name, for errors.
        lease: Seconds that the server keeps a loan.
        lost: Takes tokens of loans that ended unasked, and why.
    """

    def __init__(
        self, link: Link, notes: Notes, topic: str, lease: float, lost: Callable[[Collection[Token], str], None]
    ) -> None:
        self._link = link
        self._notes = notes
        self._topic = topic
        self._lease = lease
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._loans: dict[int, Loan] = {}
        self._long: dict[int, Loan] = {}
        self._serial = 0

    def __len__(self) -> int:
        """How many there are."""
        return len(self._loans)

    def lend(self, loan: Loan, since: float) -> int:
        """Take a loan up, lent since `since`; its token."""
        self._serial += 1
        loan.deadline = loan.served_until = since + self._lease
        self._loans[self._serial] = loan
        return self._serial

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        ends: list[tuple[int, Loan, bytes]] = []
        returns: list[tuple[int, Loan, Settlement]] = []
        now = self._loop.time()
        for at, settlement in enumerate(batch):
            token, verb, _ = settlement
            loan = self._loans.get(token)
            if loan is None or (loan.deadline <= now and verb is not Verb.EXPIRE):
                self._forget(token)
                if verb is not Verb.EXPIRE:
                    outcomes[at] = self._refusal()
            elif verb is Verb.ACK:
                ends.append((at, loan, _ACK))
            elif loan.doubtful:
                # A nak that may have been done must not be repeated: it would end the next member's loan.
                self._forget(token)
            else:
                returns.append((at, loan, settlement))
        with translate(f"settle in topic {self._topic!r}", self._topic):
            if returns:
                await self._note([(loan, settlement) for _, loan, settlement in returns])
                now = self._loop.time()
                for at, loan, settlement in returns:
                    if loan.served_until > now:
                        ends.append((at, loan, _nak(settlement)))
                    else:
                        # The server has ended it by itself.
                        self._forget(settlement.token)
                        outcomes[at] = None if settlement.verb is Verb.EXPIRE else self._refusal()
            if ends:
                refused = set(await self._tell([(loan, what) for _, loan, what in ends], doubtful=bool(returns)))
                for at, loan, _ in ends:
                    if loan in refused:
                        outcomes[at] = self._refusal()
        settled = [loan.note.sequence for _, loan, what in ends if what is _ACK and loan.note is not None]
        for at, _, _ in ends:
            self._forget(batch[at].token)
        self._notes.drop(settled)
        return outcomes

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`."""
        outcomes: list[SettleOutcome] = [None] * len(tokens)
        now = self._loop.time()
        asked: list[tuple[int, Loan]] = []
        for at, token in enumerate(tokens):
            loan = self._loans.get(token)
            if loan is None or loan.deadline <= now:
                outcomes[at] = self._refusal()
            else:
                asked.append((at, loan))
        if not asked:
            return outcomes
        with translate(f"extend in topic {self._topic!r}", self._topic):
            refused = set(await self._tell([(loan, _PROGRESS) for _, loan in asked]))
        for at, loan in asked:
            if loan in refused:
                self._forget(tokens[at])
                outcomes[at] = self._refusal()
                continue
            loan.deadline = now + seconds
            loan.served_until = now + self._lease
            if seconds > self._lease:
                self._long[tokens[at]] = loan
            else:
                self._long.pop(tokens[at], None)
        return outcomes

    async def refresh(self, loans: Sequence[Loan]) -> None:
        """Let the server's leases begin anew, before the loans are handed over."""
        await self._tell([(loan, _PROGRESS) for loan in loans])

    async def give_back(self, loans: Sequence[tuple[Loan, float]]) -> None:
        """Give back, untouched, what was never handed over; each to be lent again after so many seconds."""
        returns = [(loan, Settlement(None, Verb.RELEASE, seconds)) for loan, seconds in loans]
        await self._note(returns)
        await self._tell([(loan, _nak(settlement)) for loan, settlement in returns])

    def early(self, note: Note) -> float:
        """
        Seconds that are left of a delay that a server forgot a part of when it was started again.

        Another server of a cluster looks like one started again: then what is left is none, but for clocks that differ.
        """
        wire = self._link.current
        if not note.due or wire is None or _run_of(wire) == note.server:
            return 0.0
        return min(max(0.0, note.due - time.time()), _EARLY_MOST)

    async def keep(self) -> None:
        """Renew at the server what was extended beyond its lease; those that ended there are lost."""
        now = self._loop.time()
        over = [token for token, loan in self._long.items() if loan.served_until <= now < loan.deadline]
        for token in over:
            self._forget(token)
        if over:
            self._lost(over, "they could not be renewed in time")
        due = [
            loan
            for loan in self._long.values()
            if loan.served_until < loan.deadline and loan.served_until - now < self._lease * 2 / 3
        ]
        if due:
            await self._tell([(loan, _PROGRESS) for loan in due])
            for loan in due:
                loan.served_until = now + self._lease

    def end_all(self, why: str) -> None:
        """Every loan has ended, unasked."""
        tokens = list(self._loans)
        self._loans.clear()
        self._long.clear()
        if tokens:
            self._lost(tokens, why)

    def _forget(self, token: Token) -> None:
        self._loans.pop(token, None)
        if self._long:
            self._long.pop(token, None)

    async def _note(self, returns: Sequence[tuple[Loan, Settlement]]) -> None:
        notes = []
        server = _run_of(await self._link.wire())
        now = time.time()
        for loan, (_, verb, delay) in returns:
            before = 0 if loan.note is None else loan.note.untouched
            untouched = verb is Verb.RELEASE
            note = Note(loan.arrival.lending, before + untouched, loan.suspect and untouched)
            if verb is Verb.NACK and delay > 0:
                note = note._replace(due=now + delay, server=server)
            notes.append((loan.arrival.lane.name, loan.arrival.sequence, note))
        await self._notes.write(notes)

    async def _tell(self, words: Sequence[tuple[Loan, bytes]], *, doubtful: bool = False) -> Collection[Loan]:
        """
        Send words on loans, and wait until the server has done them all.

        Of acks only the last one to each consumer asks for an answer: the server takes what comes from one connection
        for one consumer in order. If no answer comes although the server lives, each is sent again and asks for itself:
        a server that was killed may have forgotten that it lent a message, and does not answer an ack of it.

        Returns:
            The loans that the server knows nothing of.
        """
        wire = await self._link.wire()
        last = {loan.arrival.lane: at for at, (loan, _) in enumerate(words)}
        asking = [at for at, (loan, what) in enumerate(words) if what.startswith(_NAK) or last[loan.arrival.lane] == at]
        if doubtful:
            for loan, what in words:
                loan.doubtful = loan.doubtful or what.startswith(_NAK)
        silent = await self._ask(wire, words, asking)
        refused = [loan for loan, _ in words if loan.arrival.lane.gone]
        if silent:
            lanes = {words[at][0].arrival.lane for at in silent}
            again = [(loan, what) for loan, what in words if loan.arrival.lane in lanes and not what.startswith(_NAK)]
            unheard = await self._ask(wire, again, range(len(again)))
            async with asyncio.timeout(_PATIENCE):
                await wire.flush()
            refused += [again[at][0] for at in unheard]
        return refused

    async def _ask(self, wire: Wire, words: Sequence[tuple[Loan, bytes]], asking: Collection[int]) -> list[int]:
        """Send words, of which some ask for an answer; those of them that got none in time."""
        calls: dict[int, tuple[int, Call]] = {}
        data: list[bytes] = []
        wanted = set(asking)
        inbox = wire.inbox.encode()
        for at, (loan, what) in enumerate(words):
            reply = loan.arrival.native.reply
            if at not in wanted:
                data.append(b"PUB %b %d\r\n%b\r\n" % (reply, len(what), what))
                continue
            call = Call(reply.decode(), self._loop.create_future())
            number = wire.expect(call)
            calls[at] = (number, call)
            data.append(b"PUB %b %b%d %d\r\n%b\r\n" % (reply, inbox, number, len(what), what))
        try:
            wire.write(data)
            if calls:
                await asyncio.wait([call.future for _, call in calls.values()], timeout=_PATIENCE)
        finally:
            for number, _ in calls.values():
                wire.forget(number)
        silent = []
        for at, (_, call) in calls.items():
            if not call.future.done():
                silent.append(at)
            elif call.future.result()[0]:
                words[at][0].arrival.lane.gone = True
        return silent

    def _refusal(self) -> LeaseLostError:
        return LeaseLostError(
            f"the loan of a message of topic {self._topic!r} has ended", driver="nats", topic=self._topic
        )


def _nak(settlement: Settlement) -> bytes:
    if settlement.delay <= 0:
        return _NAK
    return b'-NAK {"delay": %d}' % round(settlement.delay * NANOSECONDS)


def _run_of(wire: Wire) -> str:
    """Names the server, from its start to its end."""
    return str(wire.info.get("server_id", ""))
