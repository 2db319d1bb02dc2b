"""How a member of an ordered group lends, ends and extends its loans, and hands on the turn of a key."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from unistream.driver.types import RawDelivery, Settlement, SettleOutcome, Token, Verb
from unistream.errors import BrokerUnavailableError, SettleError
from unistream_redis.consumer import Loan, Setting
from unistream_redis.entries import message_of
from unistream_redis.ownership import OwningConsumer
from unistream_redis.partition import Item, Partition
from unistream_redis.registry import position_of
from unistream_redis.wire import Argument

__all__ = ["TurnTakingConsumer"]


class TurnTakingConsumer(OwningConsumer):
    """The lending and settling half of a member of an ordered group; every settle is fenced by the ownership."""

    def __init__(self, setting: Setting, lost: Callable[[Collection[Token], str], None]) -> None:
        super().__init__(setting, lost)
        self._loans: dict[Loan, Item] = {}
        self._next_expiry = math.inf

    async def settle(self, batch: Sequence[Settlement]) -> list[SettleOutcome]:
        """See `ConsumerDriver.settle`."""
        outcomes: list[SettleOutcome] = [None] * len(batch)
        partitions: dict[int, list[int]] = {}
        for at, settlement in enumerate(batch):
            if settlement.token in self._loans:
                partitions.setdefault(settlement.token.stream, []).append(at)
            else:
                outcomes[at] = self._refused(settlement.token)
        items = [self._loans[batch[at].token] for places in partitions.values() for at in places]
        for item in items:
            item.until = math.inf  # the outcome decides, not the clock
        owned = [self._owned[index] for index in partitions]
        arguments: list[tuple[Partition, tuple[Argument, ...]]] = []
        for partition in owned:
            acks: list[Argument] = []
            others: list[Argument] = []
            for at in partitions[partition.index]:
                loan, verb, delay = batch[at]
                if verb is Verb.ACK:
                    acks.append(loan.entry)
                else:
                    count = self._loans[loan].count
                    keep = max(0, count - 1) if verb is Verb.RELEASE else count
                    others += (loan.entry, keep, round(delay * 1000))
            arguments.append((partition, (len(acks), *acks, *others)))
        try:
            answers = await self._act("settle", arguments) if arguments else []
        except BaseException as error:
            for item in items:
                item.until = self._loop.time() + self._group.lease
            self._next_expiry = 0.0
            self._doubt_settles([batch[at].token for places in partitions.values() for at in places])
            if not isinstance(error, RedisError):
                raise
            raise await self._missing(error, "settle") from error
        now = self._loop.time()
        for partition, answer in zip(owned, answers, strict=True):
            for at in partitions[partition.index]:
                loan, verb, delay = batch[at]
                held = self._loans.pop(loan, None)
                if answer is None:
                    outcomes[at] = self._refused(loan)
                    continue
                self._doubtful.pop(loan, None)
                if held is None:
                    continue  # done, and then the partition was lost
                partition.lent.pop(held.entry, None)
                if verb is Verb.ACK or held.entry in answer:
                    partition.done(held)
                else:
                    if verb is Verb.RELEASE:
                        held.count = max(0, held.count - 1)
                    partition.put_back(held, now + delay if verb is Verb.NACK and delay > 0 else 0.0)
        self._signal.set()
        if any(partition.surplus and not partition.lent for partition in owned):
            # If it fails they are free when their ownership ends.
            with suppress(RedisError, BrokerUnavailableError):
                await self._hand_over()
        return outcomes

    def _refused(self, loan: Loan) -> SettleError:
        """Why a loan can't be settled; one whose settle got no answer may have been settled by it."""
        return self._lost_loan(loan) if self._doubtful.pop(loan, None) is None else self._unknown_settle(loan)

    def _forget(self, loan: Loan) -> None:
        """It ends by its own time: `_end`."""

    async def extend(self, tokens: Sequence[Token], seconds: float) -> list[SettleOutcome]:
        """See `ConsumerDriver.extend`. A loan stands while its partition is owned, so that is renewed."""
        await self._renew({loan.stream for loan in tokens if loan in self._loans}, seconds)
        until = self._loop.time() + seconds
        self._next_expiry = min(self._next_expiry, until)
        outcomes: list[SettleOutcome] = []
        for loan in tokens:
            item = self._loans.get(loan)
            if item is None:
                outcomes.append(self._lost_loan(loan))
            else:
                item.until = until
                outcomes.append(None)
        return outcomes

    async def _renew(self, indices: Collection[int], seconds: float) -> None:
        """Own these partitions for so long from now on; one that went to another member is dropped."""
        self._drop_overdue()
        parts = [(self._owned[index], ()) for index in indices if index in self._owned]
        if not parts:
            return
        try:
            await self._act("renew", parts, seconds=seconds)
        except RedisError as error:
            raise await self._missing(error, "extend") from error

    def _end(self, partition: Partition, item: Item) -> None:
        """A loan's time is up; its token is worth nothing from now on."""
        del partition.lent[item.entry]
        for loan, lent in list(self._loans.items()):
            if lent is item:
                del self._loans[loan]
        self._held = deque(one for one in self._held if one.token.entry != item.entry)

    def _hold(self, partition: Partition, item: Item, entry: list[Any], count: int) -> None:
        item.count = count
        item.until = self._loop.time() + self._group.lease
        self._next_expiry = min(self._next_expiry, item.until)
        self._serial += 1
        loan = Loan(partition.index, item.entry, self._serial)
        self._loans[loan] = item
        partition.lent[item.entry] = item
        self._held.append(
            RawDelivery(
                message_of(entry[1], partition.index),
                loan,
                position_of(item.entry, partition.index),
                int(item.entry.partition(b"-")[0]) / 1000,
                count,
                item.suspect,
                entry,
            )
        )
        item.suspect = False

    def _drop(self, partition: Partition, reason: str) -> None:
        if self._owned.get(partition.index) is not partition:
            return
        del self._owned[partition.index]
        tokens = {loan for loan in self._loans if loan.stream == partition.index}
        told = tokens - {delivery.token for delivery in self._held}
        for loan in tokens:
            del self._loans[loan]
        self._held = deque(delivery for delivery in self._held if delivery.token not in tokens)
        if told:
            self._tell_lost(told, reason)
        self._signal.set()
