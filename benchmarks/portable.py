"""The workloads through unistream, on any broker."""

from __future__ import annotations

import asyncio
import secrets

import unistream
from benchmarks.measure import BATCH, LATENCY_RATE, WINDOW, Result, age, body


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    topic = f"bench-{secrets.token_hex(4)}"
    async with unistream.connect(url) as client:
        await client.create_topic(topic)
        group = client.group("bench", topic)
        await group.create()
        try:
            async with client.producer(topic, max_unconfirmed=WINDOW) as producer:
                await WORK[workload](producer, group, result, size)
        finally:
            await client.delete_topic(topic)
    return result


async def publish_sequential(producer, group, result, size):
    value = body(size)
    await producer.publish(value)
    with result.timed():
        for _ in range(result.messages):
            await producer.publish(value)


async def publish_window(producer, group, result, size):
    value = body(size)
    await producer.publish(value)
    with result.timed():
        for _ in range(result.messages):
            await producer.submit(value)
        await producer.flush()


async def consume_batch(producer, group, result, size):
    await fill(producer, result.messages, size)
    async with group.consumer(max_in_flight=WINDOW) as consumer:
        left = result.messages
        with result.timed():
            while left:
                deliveries = await consumer.receive_many(min(BATCH, left))
                await consumer.ack_many(deliveries)
                left -= len(deliveries)
            await consumer.close()


async def consume_iterate(producer, group, result, size):
    await fill(producer, result.messages, size)
    async with group.consumer(max_in_flight=WINDOW) as consumer:
        left = result.messages
        with result.timed():
            async for delivery in consumer:
                await delivery.ack()
                left -= 1
                if not left:
                    break
            await consumer.close()


async def through(producer, group, result, size):
    value = body(size)
    async with group.consumer(max_in_flight=1000) as consumer:

        async def publish():
            for _ in range(result.messages):
                await producer.publish(value)

        async def consume():
            left = result.messages
            async for delivery in consumer:
                await delivery.ack()
                left -= 1
                if not left:
                    return

        with result.timed():
            await asyncio.gather(publish(), consume())


async def through_batch(producer, group, result, size):
    value = body(size)
    async with group.consumer(max_in_flight=1000) as consumer:

        async def publish():
            for _ in range(result.messages // BATCH):
                await producer.publish_many([value] * BATCH)

        async def consume():
            left = result.messages // BATCH * BATCH
            while left:
                deliveries = await consumer.receive_many(BATCH)
                await consumer.ack_many(deliveries)
                left -= len(deliveries)

        with result.timed():
            await asyncio.gather(publish(), consume())


async def latency(producer, group, result, size):
    async with group.consumer() as consumer:

        async def receive():
            while len(result.latencies) < result.messages:
                delivery = await consumer.receive()
                result.latencies.append(age(delivery.value))
                await delivery.ack()

        receiving = asyncio.create_task(receive())
        with result.timed():
            for _ in range(result.messages):
                await producer.publish(body(size))
                await asyncio.sleep(1 / LATENCY_RATE)
            await receiving


async def fill(producer, messages, size):
    value = body(size)
    for first in range(0, messages, 1000):
        for outcome in await producer.publish_many([value] * min(1000, messages - first)):
            if isinstance(outcome, Exception):
                raise outcome


WORK = {
    "publish-sequential": publish_sequential,
    "publish-window": publish_window,
    "through": through,
    "through-batch": through_batch,
    "consume-batch": consume_batch,
    "consume-iterate": consume_iterate,
    "latency": latency,
}
