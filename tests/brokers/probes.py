"""
Round trips in the brokers' own protocols: store a message, read it or have it confirmed, remove it.

Run as a program with a URL; exit code 0 means that the broker does its work. A process of its own, because some clients
leave sockets and threads behind when a server that is starting refuses them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from urllib.parse import urlsplit
from uuid import uuid4

TIMEOUT = 10  # seconds for one answer

# Two probes of one server don't meet.
NAME = f"unistream-probe-{uuid4().hex[:8]}"


def probe_redis(url: str) -> None:
    """XADD, XRANGE and DEL of one stream; Redis refuses them while it loads its data."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis.from_url(url, socket_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0)) as client:
        added = client.xadd(NAME, {"probe": "1"})
        assert [entry for entry, _ in client.xrange(NAME)] == [added]
        client.delete(NAME)


def probe_nats(url: str) -> None:
    """Make a JetStream stream, publish into it, be confirmed, delete it."""
    import nats

    async def round_trip() -> None:
        client = await nats.connect(
            url, connect_timeout=TIMEOUT, allow_reconnect=False, max_reconnect_attempts=1, reconnect_time_wait=0.1
        )
        stream = client.jetstream(timeout=TIMEOUT)
        await stream.add_stream(name=NAME, subjects=[NAME])
        await stream.publish(NAME, b"probe")
        await stream.delete_stream(NAME)
        await client.close()

    asyncio.run(round_trip())


def probe_rabbitmq(url: str) -> None:
    """Declare a quorum queue, publish a persistent message, be confirmed, get it, delete the queue."""
    import pika

    parameters = pika.URLParameters(url)
    parameters.socket_timeout = parameters.stack_timeout = parameters.blocked_connection_timeout = TIMEOUT
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare(NAME, durable=True, arguments={"x-queue-type": "quorum"})
        channel.basic_publish("", NAME, b"probe", pika.BasicProperties(delivery_mode=2), mandatory=True)
        method, _, _ = channel.basic_get(NAME, auto_ack=True)
        channel.queue_delete(NAME)
        assert method is not None


def probe_kafka(url: str) -> None:
    """Create a topic, produce, fetch, commit (so that the group coordinator is up), delete both."""
    from kafka import KafkaConsumer, KafkaProducer, TopicPartition
    from kafka.admin import KafkaAdminClient

    address = urlsplit(url).netloc
    admin = KafkaAdminClient(bootstrap_servers=address, request_timeout_ms=TIMEOUT * 1000)
    admin.create_topics({NAME: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
    producer = KafkaProducer(bootstrap_servers=address, request_timeout_ms=TIMEOUT * 1000)
    stored = producer.send(NAME, b"probe").get(timeout=TIMEOUT)
    producer.close()
    partition = TopicPartition(NAME, 0)
    consumer = KafkaConsumer(
        bootstrap_servers=address, group_id=NAME, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    consumer.assign([partition])
    fetched = consumer.poll(timeout_ms=TIMEOUT * 1000).get(partition, [])
    assert [message.offset for message in fetched] == [stored.offset]
    consumer.commit()
    consumer.close()
    admin.delete_groups([NAME])
    admin.delete_topics([NAME])
    admin.close()


PROBES: dict[str, Callable[[str], None]] = {
    "redis": probe_redis,
    "nats": probe_nats,
    "amqp": probe_rabbitmq,
    "kafka": probe_kafka,
}

if __name__ == "__main__":
    try:
        PROBES[urlsplit(sys.argv[1]).scheme](sys.argv[1])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a client's threads don't hold it up
