"""confluent-kafka, over librdkafka in C: acks from all replicas under a window, one awaited commit per 256 messages."""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks.measure import WINDOW, Result, body

BACKENDS = ("kafka",)


async def run(url: str, workload: str, messages: int, size: int) -> Result:
    result = Result(messages)
    address = {"bootstrap.servers": urlsplit(url).netloc}
    topic = f"peer-{secrets.token_hex(4)}"
    admin = AdminClient(address)
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    producer = Publisher(address, topic, 1 if workload == "publish-sequential" else WINDOW)
    value = body(size)
    try:
        if workload.startswith("publish"):
            producer.publish(value, 1)
            with result.timed():
                producer.publish(value, messages)
        else:
            producer.publish(value, messages)
            consume(address, topic, result)
    finally:
        admin.delete_topics([topic])[topic].result()
    return result


class Publisher:
    """Never more than `window` unconfirmed messages."""

    def __init__(self, address, topic, window):
        self.topic = topic
        self.window = window
        self.unconfirmed = 0
        self.client = Producer({**address, "acks": "all", "linger.ms": 0})

    def publish(self, value, count):
        for _ in range(count):
            while self.unconfirmed >= self.window:
                self.client.poll(1.0)
            self.unconfirmed += 1
            self.client.produce(self.topic, value, partition=0, on_delivery=self.confirmed)
            self.client.poll(0)
        while self.unconfirmed:
            self.client.poll(1.0)

    def confirmed(self, error, message):
        if error is not None:
            raise KafkaException(error)
        self.unconfirmed -= 1


def consume(address, topic, result):
    consumer = Consumer({**address, "group.id": f"{topic}.bench", "enable.auto.commit": False})
    left = result.messages
    with result.timed():
        consumer.assign([TopicPartition(topic, 0, 0)])
        while left:
            records = consumer.consume(min(WINDOW, left), 10.0)
            left -= len(records)
            consumer.commit(message=records[-1], asynchronous=False)
    consumer.close()
