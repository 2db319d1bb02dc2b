"""pika's AsyncioConnection: a quorum queue, confirms matched by tag under a window, prefetch 256 and an ack each."""

from __future__ import annotations

import asyncio
import secrets

import pika
from pika.adapters.asyncio_connection import AsyncioConnection

from benchmarks.measure import LATENCY_RATE, WINDOW, Result, age, body


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    bench = Bench(f"bare-{secrets.token_hex(4)}")
    await bench.open(url)
    try:
        await WORK[workload](bench, result, size)
    finally:
        await bench.close()
    return result


class Bench:
    """One connection, one channel in confirm mode, one quorum queue."""

    properties = pika.BasicProperties(delivery_mode=2)

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.pending: dict[int, asyncio.Future[bool]] = {}
        self.tag = 0
        self.lowest = 1

    async def open(self, url):
        await self._call(lambda done: AsyncioConnection(pika.URLParameters(url), on_open_callback=done), "connection")
        await self._call(lambda done: self.connection.channel(on_open_callback=done), "channel")
        arguments = {"x-queue-type": "quorum"}
        await self._call(
            lambda done: self.channel.queue_declare(self.queue, durable=True, arguments=arguments, callback=done)
        )
        await self._call(lambda done: self.channel.confirm_delivery(self._confirmed, callback=done))
        await self._call(lambda done: self.channel.basic_qos(prefetch_count=WINDOW, callback=done))

    async def _call(self, start, keep=None):
        done = asyncio.get_running_loop().create_future()
        start(done.set_result)
        answer = await done
        if keep:
            setattr(self, keep, answer)

    def _confirmed(self, frame):
        method = frame.method
        first = self.lowest if method.multiple else method.delivery_tag
        for tag in range(first, method.delivery_tag + 1):
            future = self.pending.pop(tag, None)
            if future is not None:
                future.set_result(isinstance(method, pika.spec.Basic.Ack))
        if method.multiple:
            self.lowest = method.delivery_tag + 1

    def publish(self, value):
        self.channel.basic_publish("", self.queue, value, self.properties, mandatory=True)
        self.tag += 1
        future = self.pending[self.tag] = asyncio.get_running_loop().create_future()
        return future

    async def add(self, value, messages):
        room = asyncio.Semaphore(WINDOW)
        futures = []
        for _ in range(messages):
            await room.acquire()
            future = self.publish(value)
            future.add_done_callback(lambda _: room.release())
            futures.append(future)
        await asyncio.gather(*futures)

    async def close(self):
        await self._call(lambda done: self.channel.queue_delete(self.queue, callback=done))
        closed = asyncio.get_running_loop().create_future()
        self.connection.add_on_close_callback(lambda *_: closed.set_result(None))
        self.connection.close()
        await closed


async def publish_sequential(bench, result, size):
    value = body(size)
    await bench.publish(value)
    with result.timed():
        for _ in range(result.messages):
            await bench.publish(value)


async def publish_window(bench, result, size):
    value = body(size)
    await bench.publish(value)
    with result.timed():
        await bench.add(value, result.messages)


async def consume(bench, result, size):
    await bench.add(body(size), result.messages)
    done = asyncio.get_running_loop().create_future()
    left = result.messages

    def on_message(channel, method, properties, value):
        nonlocal left
        channel.basic_ack(method.delivery_tag)
        left -= 1
        if not left:
            done.set_result(None)

    with result.timed():
        bench.channel.basic_consume(bench.queue, on_message)
        await done


async def latency(bench, result, size):
    done = asyncio.get_running_loop().create_future()

    def on_message(channel, method, properties, value):
        result.latencies.append(age(value))
        channel.basic_ack(method.delivery_tag)
        if len(result.latencies) == result.messages:
            done.set_result(None)

    bench.channel.basic_consume(bench.queue, on_message)
    with result.timed():
        for _ in range(result.messages):
            await bench.publish(body(size))
            await asyncio.sleep(1 / LATENCY_RATE)
        await done


WORK = {
    "publish-sequential": publish_sequential,
    "publish-window": publish_window,
    "consume-batch": consume,
    "consume-iterate": consume,
    "latency": latency,
}
