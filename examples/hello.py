"""The smallest program: one message there and back. `python examples/hello.py [URL]`."""

import asyncio
import sys

import unistream


async def main(url: str) -> None:
    async with unistream.connect(url) as client:
        await client.create_topic("greetings")
        readers = client.group("readers", "greetings")
        await readers.create()

        async with client.producer("greetings") as producer:
            receipt = await producer.publish(b"hello", key="world", headers={"content-type": "text/plain"})
            print("confirmed", receipt.id)

        async with readers.consumer() as consumer:
            delivery = await consumer.receive(timeout=5)
            assert delivery is not None
            async with delivery:
                print("received", delivery.value.decode(), "for", delivery.key)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "memory://hello"))
