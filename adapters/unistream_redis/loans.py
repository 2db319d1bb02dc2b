"""How a member of a shared group ends and extends its loans: scripts check inside Redis that it still holds them."""

from __future__ import annotations

from collections.abc import Sequence

from redis.exceptions import RedisError

from unistream.driver.types import Settlement, SettleOutcome, Token, Verb
from unistream.errors import UnistreamError
from unistream_redis.consumer import Loan, RedisConsumer, Setting
from unistream_redis.probe import POLL
from unistream_redis.scripts import EXTEND, JOIN, SETTLE
from unistream_redis.wire import Argument

__all__ = ["LendingConsumer"]


class LendingConsumer(RedisConsumer):
    """
    The settling half of a member of a shared group.

    A loan is fenced by the member's name and the entry's delivery count, which Redis keeps in the pending list.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._loans: dict[Loan, int] = {}
        # What became of settles whose batch was not answered to the end.
        self._answered: dict[Loan, SettleOutcome] = {}

    async def _enter(self) -> None:
        await self._reader.wire()
        keys = [
            self._keys.members(self._group.name),
            *(key for keys in self._streams for key in (keys.stream, keys.lost)),
        ]
        await self._commands.run(JOIN, keys, [self._group.name, self._name])

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        loans = self._loans
        acks: dict[int, list[int]] = {}
        others: dict[int, list[int]] = {}
        for at, (loan, verb, _) in enumerate(batch):
            if loan not in loans:
                outcomes[at] = self._answered.pop(loan) if loan in self._answered else self._lost_loan(loan)
            elif verb is Verb.ACK:
                acks.setdefault(loan.stream, []).append(at)
            else:
                others.setdefault(loan.stream, []).append(at)
        answered: list[int] = []
        try:
            for stream in {**acks, **others}:
                await self._settle(stream, batch, acks.get(stream, []), others.get(stream, []), outcomes)
                answered += acks.get(stream, []) + others.get(stream, [])
        except UnistreamError:
            # The whole batch is asked for again, also what was answered.
            self._answered.update((batch[at].token, outcomes[at]) for at in answered)
            self._doubt_settles([batch[at].token for at in answered])
            raise
        return outcomes

    async def _settle(
        self,
        stream: int,
        batch: Sequence[Settlement],
        acks: list[int],
        others: list[int],
        outcomes: list[SettleOutcome],
    ) -> None:
        loans = self._loans
        size = len(acks) + len(others)
        look = "range" if size > 4 and 4 * size >= len(loans) else "each"
        arguments: list[Argument] = [self._group.name, self._name, look, len(acks)]
        for at in acks:
            loan = batch[at].token
            arguments.append(loan.entry)
            # A loan may have ended while an earlier stream was waited for; 0 is no count, and is refused.
            arguments.append(loans.get(loan, 0))
        soonest = POLL
        for at in others:
            loan, verb, delay = batch[at]
            count = loans.get(loan, 0)
            keep = max(0, count - 1) if verb is Verb.RELEASE else -1
            wait = delay if verb is Verb.NACK else 0.0
            soonest = min(soonest, wait)
            arguments += (loan.entry, count, keep, round(wait * 1000))
        keys = self._streams[stream]
        name = self._group.name
        order = acks + others
        try:
            refused = await self._commands.run(
                SETTLE, [keys.stream, keys.due(name), keys.held(name), keys.lost], arguments
            )
        except BaseException as error:
            self._doubt_settles([batch[at].token for at in order])
            if not isinstance(error, RedisError):
                raise
            raise await self._missing(error, "settle") from error
        for index, why in zip(refused[::2], refused[1::2], strict=True):
            at = order[index]
            loan, verb, _ = batch[at]
            # An earlier settle of the same loan, whose answer was lost, may have done it already.
            done = loan in self._doubtful and why == (0 if verb is Verb.ACK else 1)
            if not done:
                outcomes[at] = self._lost_loan(loan)
        for at in order:
            loans.pop(batch[at].token, None)
        if self._doubtful:
            for at in order:
                self._doubtful.pop(batch[at].token, None)
        if others and soonest < POLL:
            self._loop.call_later(soonest, self._wake)

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`."""
        outcomes: list[SettleOutcome] = [None] * len(tokens)
        streams: dict[int, list[int]] = {}
        for at, loan in enumerate(tokens):
            if loan in self._loans:
                streams.setdefault(loan.stream, []).append(at)
            else:
                outcomes[at] = self._lost_loan(loan)
        wanted = round(seconds * 1000)
        idle, beyond = max(0, self._lease_ms - wanted), max(0, wanted - self._lease_ms)
        for stream, places in streams.items():
            keys = self._streams[stream]
            arguments: list[Argument] = [self._group.name, self._name, idle, beyond, self._lease_ms]
            # A loan may have ended while an earlier stream was waited for; 0 is no count, and is refused.
            for at in places:
                arguments += (tokens[at].entry, self._loans.get(tokens[at], 0))
            try:
                refused = await self._commands.run(
                    EXTEND, [keys.stream, keys.held(self._group.name), keys.lost], arguments
                )
            except RedisError as error:
                raise await self._missing(error, "extend") from error
            for index in refused:
                outcomes[places[index]] = self._lost_loan(tokens[places[index]])
                self._loans.pop(tokens[places[index]], None)
        return outcomes

    def _forget(self, loan: Loan) -> None:
        self._loans.pop(loan, None)
        self._answered.pop(loan, None)

    def _lend(self, stream: int, entry: bytes, count: int) -> Loan:
        self._serial += 1
        loan = Loan(stream, entry, self._serial)
        self._loans[loan] = count
        return loan
