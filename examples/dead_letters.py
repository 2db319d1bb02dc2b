"""A poison message is tried three times, then set aside with its reason. `python examples/dead_letters.py [URL]`."""

import asyncio
import sys

import unistream
from unistream import Backoff, Retry


async def main(url: str) -> None:
    async with unistream.connect(url) as client:
        await client.create_topic("orders")
        await client.create_topic("orders.dead")
        billing = client.group(
            "billing",
            "orders",
            retry=Retry(max_attempts=3, backoff=Backoff(first=0.1)),
            dead_letter="orders.dead",
        )
        await billing.create()
        inspection = client.group("inspection", "orders.dead")
        await inspection.create()

        async def charge(delivery: unistream.Delivery) -> None:
            print(f"attempt {delivery.attempt} of {delivery.value!r}")
            if delivery.value == b"not an order":
                raise ValueError("no amount")

        async with client.producer("orders") as producer:
            for value in (b"order 1", b"not an order", b"order 2"):
                await producer.publish(value)

        running = asyncio.create_task(billing.run(charge))
        async with inspection.consumer() as consumer:
            dead = await consumer.receive(timeout=30)
            assert dead is not None
            async with dead:
                print("dead letter:", dead.value, dead.origin)
        running.cancel()
        await asyncio.wait([running])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "memory://dead-letters"))
