"""Producers outrun consumers: wait, fail or drop, and it is counted. `python examples/overload.py [URL]`.

The topic holds 100 messages that nobody has settled; the broker refuses more, and each producer answers in its own way.
"""

import asyncio
import sys

import unistream


async def main(url: str) -> None:
    async with unistream.connect(url) as client:
        await client.create_topic("readings", max_backlog=100)
        slow = client.group("slow", "readings")
        await slow.create()

        async with client.producer("readings") as producer:
            outcomes = await producer.publish_many([b"reading"] * 150)
            refused = [each for each in outcomes if isinstance(each, unistream.TopicFullError)]
            print(f"confirmed {producer.stats.confirmed}, refused by the broker {len(refused)}")
            print(f"each refusal says stored={refused[0].stored!r}: {refused[0]}")

        async with slow.consumer() as consumer:
            await consumer.ack_many(await consumer.receive_many(50, timeout=5), confirm=True)
        async with client.producer("readings", max_unconfirmed=10, when_full="drop_newest") as producer:
            outcomes = await producer.publish_many([b"reading"] * 50)
            print(f"after 50 acks: {producer.stats}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "memory://overload"))
