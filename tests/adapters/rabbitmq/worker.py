"""A member in a process of its own, to be killed or stopped: tells each delivery as a line of JSON, settles some."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from unistream.config import parse_target
from unistream.driver.types import GroupSpec, Settlement, Verb
from unistream_rabbitmq import RabbitDriver


async def work(address: str, topic: str, ordering: str, settle_every: int) -> None:
    """Join, receive one by one, ack every nth delivery (0: none), say everything."""
    driver = RabbitDriver(parse_target(address, RabbitDriver), lambda event: None)
    await driver.open()
    group = GroupSpec(topic, "g", "key" if ordering == "key" else "none")
    consumer = await driver.consumer(
        group,
        await driver.topic(topic),
        max_in_flight=100,
        lost=lambda tokens, why: print(json.dumps({"lost": len(tokens)}), flush=True),
    )
    print(json.dumps({"joined": os.getpid()}), flush=True)
    count = 0
    while True:
        answer = consumer.receive(1, 5.0)
        for delivery in answer if isinstance(answer, list) else await answer:
            count += 1
            refused = None
            if settle_every and count % settle_every == 0:
                settled = consumer.settle([Settlement(delivery.token, Verb.ACK)])
                [refused] = settled if isinstance(settled, list) else await settled
            told = {
                "id": delivery.message.id,
                "attempt": delivery.attempt,
                "acked": bool(settle_every and count % settle_every == 0 and refused is None),
            }
            print(json.dumps(told), flush=True)
            if delivery.suspect and not told["acked"]:
                await asyncio.Event().wait()  # nothing is fetched beside a suspect


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
