"""
unistream on RabbitMQ.

Vocabulary: a topic is an exchange; a group is a quorum queue bound to it, or one per partition if it is ordered; a
member is a channel that consumes; a loan is a delivery tag on that channel; a lease lasts as long as the channel;
a confirm is a publisher confirm.

URL: `amqp://[user:password@]host[:5672][/virtual-host]`, or `amqps://` for TLS; the virtual host `/` is `%2F`, or none.

Guarantees, refusals: `docs/backends/rabbitmq.md`.

Native objects: `Client.native` is a `pika.adapters.asyncio_connection.AsyncioConnection`, `Delivery.native` the
message's `pika.BasicProperties`.
"""

from __future__ import annotations

from unistream_rabbitmq.driver import RabbitDriver

__all__ = ["RabbitDriver"]
