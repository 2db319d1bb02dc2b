"""The same as hello.py without asyncio. `python examples/hello_sync.py [URL]`."""

import sys

from unistream import sync


def main(url: str) -> None:
    with sync.connect(url) as client:
        client.create_topic("greetings")
        readers = client.group("readers", "greetings")
        readers.create()

        with client.producer("greetings") as producer:
            receipt = producer.publish(b"hello", key="world", headers={"content-type": "text/plain"})
            print("confirmed", receipt.id)

        with readers.consumer() as consumer:
            delivery = consumer.receive(timeout=5)
            assert delivery is not None
            with delivery:
                print("received", delivery.value.decode(), "for", delivery.key)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "memory://hello")
