"""kafka-python: futures under a window, completions crossing to asyncio in batches; one commit per poll."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from urllib.parse import urlsplit

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from kafka.structs import OffsetAndMetadata

from benchmarks.measure import LATENCY_RATE, WINDOW, Result, age, body


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    address = urlsplit(url).netloc
    topic = f"bare-{secrets.token_hex(4)}"
    admin = KafkaAdminClient(bootstrap_servers=address)
    admin.create_topics([NewTopic(topic, 1, 1)])
    try:
        await WORK[workload](address, topic, result, size)
    finally:
        admin.delete_topics([topic])
        admin.close()
    return result


class Producer:
    """A producer whose confirms cross to the loop one wake-up per batch."""

    def __init__(self, address: str, topic: str) -> None:
        self.topic = topic
        self.loop = asyncio.get_running_loop()
        # Room for the whole window in one request; the client's default of 16 KiB would hold fifteen messages.
        self.client = KafkaProducer(bootstrap_servers=address, acks="all", linger_ms=0, batch_size=512 * 1024)
        self.client.partitions_for(topic)
        self.done: deque[asyncio.Future[None]] = deque()
        self.woken = False

    def publish(self, value: bytes) -> asyncio.Future[None]:
        future = self.loop.create_future()
        self.client.send(self.topic, value, partition=0).add_callback(self._confirmed, future)
        return future

    def _confirmed(self, future, metadata):
        self.done.append(future)
        if not self.woken:
            self.woken = True
            self.loop.call_soon_threadsafe(self._drain)

    def _drain(self):
        self.woken = False
        while self.done:
            self.done.popleft().set_result(None)

    async def add(self, value, messages):
        room = asyncio.Semaphore(WINDOW)
        futures = []
        for _ in range(messages):
            await room.acquire()
            future = self.publish(value)
            future.add_done_callback(lambda _: room.release())
            futures.append(future)
        await asyncio.gather(*futures)


async def publish_sequential(address, topic, result, size):
    producer = Producer(address, topic)
    value = body(size)
    await producer.publish(value)
    with result.timed():
        for _ in range(result.messages):
            await producer.publish(value)
    producer.client.close()


async def publish_window(address, topic, result, size):
    producer = Producer(address, topic)
    value = body(size)
    await producer.publish(value)
    with result.timed():
        await producer.add(value, result.messages)
    producer.client.close()


def joined(address, topic):
    """A consumer that has its partition."""
    consumer = KafkaConsumer(bootstrap_servers=address, group_id=f"{topic}.bench", enable_auto_commit=False)
    partition = TopicPartition(topic, 0)
    consumer.assign([partition])
    consumer.seek(partition, 0)
    return consumer, partition


async def consume(address, topic, result, size):
    producer = Producer(address, topic)
    await producer.add(body(size), result.messages)
    producer.client.close()
    consumer, partition = joined(address, topic)

    def drain():
        left = result.messages
        while left > 0:
            for records in consumer.poll(1000, max_records=WINDOW).values():
                left -= len(records)
                consumer.commit({partition: OffsetAndMetadata(records[-1].offset + 1, "", -1)})

    with result.timed():
        await asyncio.to_thread(drain)
    consumer.close()


async def latency(address, topic, result, size):
    producer = Producer(address, topic)
    consumer, partition = joined(address, topic)

    def receive():
        while len(result.latencies) < result.messages:
            for records in consumer.poll(100, max_records=WINDOW).values():
                result.latencies.extend(age(record.value) for record in records)
                consumer.commit({partition: OffsetAndMetadata(records[-1].offset + 1, "", -1)})

    receiving = asyncio.create_task(asyncio.to_thread(receive))
    with result.timed():
        for _ in range(result.messages):
            await producer.publish(body(size))
            await asyncio.sleep(1 / LATENCY_RATE)
        await receiving
    producer.client.close()
    consumer.close()


WORK = {
    "publish-sequential": publish_sequential,
    "publish-window": publish_window,
    "consume-batch": consume,
    "consume-iterate": consume,
    "latency": latency,
}
