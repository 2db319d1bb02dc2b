"""
unistream on Redis Streams.

Vocabulary: a topic is a stream, or one stream per partition if it is ordered; a group is a consumer group; a member is
a consumer of it; a loan is an entry in the pending list; a lease is idle time; settling is done by scripts.

URL: `redis://[user:password@]host[:6379][/database]`, or `rediss://` for TLS.

Guarantees, refusals: `docs/backends/redis.md`.

Native objects: `Client.native` is a `redis.asyncio.Redis`, `Delivery.native` the entry as `[id, [field, value, …]]`.
"""

from __future__ import annotations

from unistream_redis.driver import RedisDriver

__all__ = ["RedisDriver"]
