"""
unistream on Apache Kafka, by kafka-python.

Vocabulary: a topic is a topic, a partition a partition; a group is a consumer group of the classic protocol, named
`topic.group`; a member is a KafkaConsumer; a loan is an offset that the member counts as lent; settling moves a
frontier, which is the committed offset; what is settled beyond it, attempts and delays are in the commit's metadata.

URL: `kafka://[user:password@]host[:9092][,host[:port]…]`, or `kafkas://` for TLS.

Guarantees, refusals: `docs/backends/kafka.md`.

Native objects: `Client.native` is a `kafka.admin.KafkaAdminClient`, `Delivery.native` a `ConsumerRecord`.
"""

from __future__ import annotations

from unistream_kafka.driver import KafkaDriver

__all__ = ["KafkaDriver"]
