"""A group on a real Kafka while it forms its next generation: what goes on, and what a member's word is worth."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.adapters.kafka.support import LIMIT, end, ids, message, opened, proxied, receive, run, settle, take, url
from unistream.driver.types import Verb

pytestmark = pytest.mark.kafka


def test_a_group_that_waits_for_a_dead_member_goes_on() -> None:
    """While the broker waits for a member that will not come, others are lent messages, and their acks are stored."""

    async def test() -> None:
        async with AsyncExitStack() as stack:
            here = await stack.enter_async_context(opened(f"{url()}?session_timeout=15"))
            there, proxy = await stack.enter_async_context(proxied("?session_timeout=15"))
            await here.topic(partitions=1)
            group = await here.group()
            there.name = here.name
            one = await here.join(group)
            dead = await there.join(group)
            proxy.freeze()
            joining = asyncio.create_task(here.join(group))
            loop = asyncio.get_running_loop()
            # The first member hears of the gathering by a heartbeat, of which there are two a second.
            ends, number, slowest = loop.time() + 4.0, 0, 0.0
            while loop.time() < ends:
                began = loop.time()
                await here.publish(5, first=number)
                await end(one, await take(one, 5))
                number += 5
                slowest = max(slowest, loop.time() - began)
            assert not joining.done()
            assert slowest < 3.0
            assert await here.driver.lag(here.name, "g") == (0, True)
            assert here.ended == []
            proxy.heal()
            for member in (await joining, one, dead):
                await member.close()

    run(test)


def test_partitions_that_stay_go_on_while_others_wait_for_their_loans() -> None:
    """A loan that nobody settles holds up the partition that is to go to another member, and no other."""

    async def test() -> None:
        async with opened() as here:
            group, one, _ = await here.lent_of_each()
            joining = asyncio.create_task(here.join(group))
            came: list[int] = []
            producer, number = await here.produce(), 2
            async with asyncio.timeout(LIMIT):
                while not here.ended:
                    await producer.publish([message(number + at, partition=at) for at in range(2)], LIMIT)
                    number += 2
                    deliveries = await receive(one, 10, 0.1)
                    came += [delivery.message.partition for delivery in deliveries]
                    await end(one, deliveries)

            assert len(set(came[-5:])) == 1, came
            for part in (await joining, one, producer):
                await part.close()

    run(test)


@pytest.mark.parametrize("verb", [Verb.NACK, Verb.RELEASE])
def test_what_was_nacked_is_no_suspect_for_the_next_owner(verb: Verb) -> None:
    """A message that a member nacked, or gave back after a nack, is lent beside others once that member has left."""

    async def test() -> None:
        async with opened() as here:
            await here.topic()
            group = await here.group()
            one = await here.join(group)
            await here.publish(3)
            await end(one, await take(one, 3), Verb.NACK)
            again = await take(one, 3)
            assert await settle(one, again, verb) == [None] * 3
            await one.close()
            two = await here.join(group)
            got = await take(two, 3)

            assert sorted(ids(got)) == ["0", "1", "2"]
            assert {(each.attempt, each.suspect) for each in got} == {(3 if verb is Verb.NACK else 2, False)}
            await end(two, got)
            await two.close()

    run(test)
