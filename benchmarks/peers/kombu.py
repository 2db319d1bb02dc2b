"""kombu, which blocks: a confirm awaited per publish where the transport has any (AMQP), an ack each, prefetch 256."""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

from kombu import Connection, Consumer, Producer, Queue

from benchmarks.measure import WINDOW, Result, body

BACKENDS = ("redis", "rabbitmq")


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    amqp = urlsplit(url).scheme == "amqp"
    queue = Queue(
        f"peer-{secrets.token_hex(4)}", durable=True, queue_arguments={"x-queue-type": "quorum"} if amqp else None
    )
    with Connection(url, transport_options={"confirm_publish": True} if amqp else None) as connection:
        bound = queue(connection.default_channel)
        bound.declare()
        try:
            work = publish if workload.startswith("publish") else consume
            work(connection, bound, result, body(size))
        finally:
            bound.delete()
    return result


def publish(connection, queue, result, value):
    """One after the other: there is no window, each call waits for its confirm."""
    producer = Producer(connection.default_channel)
    send(producer, queue, value, 1)
    with result.timed():
        send(producer, queue, value, result.messages)


def consume(connection, queue, result, value):
    send(Producer(connection.default_channel), queue, value, result.messages)
    left = result.messages

    def handle(body, message):
        nonlocal left
        message.ack()
        left -= 1

    channel = connection.channel()
    channel.basic_qos(0, WINDOW, False)
    with result.timed(), Consumer(channel, queue, callbacks=[handle]):
        while left:
            connection.drain_events(timeout=10)


def send(producer, queue, value, count):
    options = {"content_type": "application/octet-stream", "content_encoding": "binary"}
    for _ in range(count):
        producer.publish(value, routing_key=queue.name, delivery_mode=2, **options)
