"""Why order needs asking for: m3 fails after m4 was given out. `python examples/ordering.py [URL]`.

In a shared group the group sees m4 before m3 comes again; in an ordered group m4 waits for m3 (ORD-1, ORD-2).
"""

import asyncio
import sys

import unistream
from unistream import Backoff, Retry


async def order_seen(client: unistream.Client, topic: str, ordering: str) -> list[str]:
    group = client.group(
        f"{ordering}-group",
        topic,
        ordering="key" if ordering == "ordered" else "none",
        retry=Retry(backoff=Backoff(first=0.2, jitter=0)),
    )
    await group.create()
    async with client.producer(topic) as producer:
        for number in range(1, 6):
            await producer.publish(f"m{number}".encode(), key="one-customer")
    done: list[str] = []
    all_done = asyncio.Event()

    async def handle(delivery: unistream.Delivery) -> None:
        name = delivery.value.decode()
        if name == "m3" and delivery.attempt == 1:
            raise ConnectionError("m3 fails once")
        done.append(name)
        if len(done) == 5:
            all_done.set()

    running = asyncio.create_task(group.run(handle, concurrency=4))
    await all_done.wait()
    running.cancel()
    await asyncio.wait([running])
    return done


async def main(url: str) -> None:
    async with unistream.connect(url) as client:
        await client.create_topic("steps", partitions=4, ordering="key")
        print("shared: ", await order_seen(client, "steps", "shared"))
        print("ordered:", await order_seen(client, "steps", "ordered"))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "memory://ordering"))
