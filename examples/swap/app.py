"""One program, any broker: `python examples/swap/app.py PROFILE` with the profiles of unistream.toml beside it.

Publishes orders under keys and bills them in a group of three workers; a second group audits every order. Prints the
outcome as one line, the same on every broker.
"""

import asyncio
import os
import sys
from pathlib import Path

import unistream
from unistream import Backoff, Retry

ORDERS = 200


async def main(profile: str) -> str:
    os.environ.setdefault("UNISTREAM_CONFIG", str(Path(__file__).with_name("unistream.toml")))
    async with unistream.connect(profile=profile, require={"ordering": "key", "nack_delay": 1.0}) as client:
        await client.delete_topic("swap.orders")
        await client.create_topic("swap.orders", partitions=4, ordering="key")
        billing = client.group("billing", "swap.orders", retry=Retry(backoff=Backoff(first=0.1)))
        audit = client.group("audit", "swap.orders", ordering="key")
        await billing.create()
        await audit.create()

        billed: set[int] = set()
        failures = 0
        audited: dict[bytes, list[int]] = {}
        finished = asyncio.Event()

        def check() -> None:
            if len(billed) == ORDERS and sum(map(len, audited.values())) == ORDERS:
                finished.set()

        async def bill(delivery: unistream.Delivery) -> None:
            nonlocal failures
            number = int(delivery.value)
            if number % 50 == 0 and delivery.attempt == 1:
                failures += 1
                raise ConnectionError("the payment service did not answer")
            billed.add(number)
            check()

        async def note(delivery: unistream.Delivery) -> None:
            audited.setdefault(delivery.key or b"", []).append(int(delivery.value))
            check()

        async with client.producer("swap.orders") as producer:
            for number in range(ORDERS):
                await producer.submit(str(number).encode(), key=f"customer-{number % 7}")
            await producer.flush()
        running = [asyncio.create_task(billing.run(bill)) for _ in range(3)]
        running.append(asyncio.create_task(audit.run(note, concurrency=4)))
        await asyncio.wait_for(finished.wait(), 60)
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        await client.delete_topic("swap.orders")
        in_order = all(numbers == sorted(numbers) for numbers in audited.values())
        return f"billed {len(billed)} · failed once {failures} · audited per key in order: {in_order}"


if __name__ == "__main__":
    print(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "local")))
