"""
unistream on NATS JetStream.

Vocabulary: a topic is a stream, its partitions are subjects; a group is a durable pull consumer, with one more per
partition if it is ordered; a lease is the consumer's `ack_wait`; settling is an ack whose doing the server confirms.

URL: `nats://[user:password@|token@]host[:4222][,host…]`, or `tls://` for TLS.

Guarantees, refusals: `docs/backends/nats.md`.

Native objects: `Client.native` is a `nats.aio.client.Client` that is not connected yet, `Delivery.native` a
`NativeMessage` (subject, reply subject, headers and data as they came).
"""

from __future__ import annotations

from unistream_nats.driver import NatsDriver

__all__ = ["NatsDriver"]
