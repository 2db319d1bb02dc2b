"""FastStream: durable and confirmed publishes gathered in windows, an ack per message, prefetch 256."""

from __future__ import annotations

import asyncio
import secrets
from urllib.parse import urlsplit

from faststream import AckPolicy

from benchmarks.measure import WINDOW, Result, body

BACKENDS = ("redis", "kafka", "rabbitmq", "nats")


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    peer = PEERS[urlsplit(url).scheme](url, f"peer-{secrets.token_hex(4)}")
    await peer.prepare()
    value = body(size)
    if workload == "publish-sequential":
        async with peer.broker:
            await peer.publish(value)
            with result.timed():
                for _ in range(messages):
                    await peer.publish(value)
    elif workload == "publish-window":
        async with peer.broker:
            await peer.publish(value)
            with result.timed():
                await window(peer, value, messages)
    else:
        async with peer.broker:
            await window(peer, value, messages)
        await consume(PEERS[urlsplit(url).scheme](url, peer.name), result)
    return result


async def window(peer, value, messages):
    for first in range(0, messages, WINDOW):
        await asyncio.gather(*(peer.publish(value) for _ in range(min(WINDOW, messages - first))))


async def consume(peer, result):
    left = result.messages
    done = asyncio.Event()

    @peer.subscriber()
    async def handle(value: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async with peer.broker:
        with result.timed():
            await peer.broker.start()
            await done.wait()


class Redis:
    """A stream, with a group."""

    def __init__(self, url, name):
        from faststream.redis import RedisBroker

        self.name = name
        # Each publish under way takes a connection of the pool.
        self.broker = RedisBroker(url, logger=None, max_connections=WINDOW + 10)

    async def prepare(self):
        from redis.asyncio import Redis as Client

        client = Client.from_url(self.broker.specification.url[0])
        await client.xgroup_create(self.name, "bench", "$", mkstream=True)
        await client.aclose()

    async def publish(self, value):
        await self.broker.publish(value, stream=self.name)

    def subscriber(self):
        from faststream.redis import StreamSub

        stream = StreamSub(self.name, group="bench", consumer="me", max_records=WINDOW)
        return self.broker.subscriber(stream=stream, ack_policy=AckPolicy.NACK_ON_ERROR)


class Rabbit:
    """A durable queue, persistent messages, publisher confirms."""

    def __init__(self, url, name):
        from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

        self.name = name
        self.queue = RabbitQueue(name, durable=True, queue_type=QueueType.QUORUM)
        self.broker = RabbitBroker(url, logger=None, default_channel=Channel(prefetch_count=WINDOW))

    async def prepare(self):
        await self.broker.connect()
        await self.broker.declare_queue(self.queue)

    async def publish(self, value):
        await self.broker.publish(value, queue=self.queue, persist=True)

    def subscriber(self):
        return self.broker.subscriber(self.queue, ack_policy=AckPolicy.NACK_ON_ERROR)


class Nats:
    """A file stream, a durable pull consumer."""

    def __init__(self, url, name):
        from faststream.nats import NatsBroker

        self.url = url
        self.name = name
        self.broker = NatsBroker(url, logger=None)

    async def prepare(self):
        import nats

        connection = await nats.connect(self.url)
        await connection.jetstream().add_stream(name=self.name, subjects=[self.name])
        await connection.close()

    async def publish(self, value):
        await self.broker.publish(value, subject=self.name, stream=self.name)

    def subscriber(self):
        from faststream.nats import JStream, PullSub

        return self.broker.subscriber(
            self.name,
            stream=JStream(self.name, subjects=[self.name], declare=False),
            durable="bench",
            pull_sub=PullSub(batch_size=WINDOW),
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )


class Kafka:
    """One partition, acks from all replicas, a commit per message."""

    def __init__(self, url, name):
        from faststream.kafka import KafkaBroker

        self.address = urlsplit(url).netloc
        self.name = name
        self.broker = KafkaBroker(self.address, logger=None, acks="all")

    async def prepare(self):
        from aiokafka.admin import AIOKafkaAdminClient, NewTopic

        admin = AIOKafkaAdminClient(bootstrap_servers=self.address)
        await admin.start()
        await admin.create_topics([NewTopic(self.name, 1, 1)])
        await admin.close()

    async def publish(self, value):
        await self.broker.publish(value, topic=self.name, partition=0)

    def subscriber(self):
        return self.broker.subscriber(
            self.name, group_id=f"{self.name}.bench", auto_offset_reset="earliest", ack_policy=AckPolicy.ACK
        )


PEERS = {"redis": Redis, "amqp": Rabbit, "nats": Nats, "kafka": Kafka}
