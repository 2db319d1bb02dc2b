"""Cases `pub.*`: what a receipt is worth, and what an error says."""

from __future__ import annotations

import asyncio

from unistream.conformance.line import Line
from unistream.conformance.registry import GATED, Tier, case
from unistream.conformance.trial import Trial
from unistream.errors import ClosedError, PublishError, PublishUnknownError, TooLargeError
from unistream.message import Message, Receipt


@case("pub.confirm-means-stored", rules=("PUB-1",), tier=Tier.SMOKE, sometimes=("confirmed", "delivered"))
async def confirm_means_stored(trial: Trial) -> None:
    """`publish` returns only after the broker has confirmed the message."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, client=await trial.open())
    for _ in range(20):
        await producer.publish(key=b"k")
    await producer.producer.close()
    await trial.drain(group)


@case("pub.receipt-position", rules=("PUB-1",), sometimes=("confirmed", "delivered"))
async def receipt_position(trial: Trial) -> None:
    """A receipt names the message's id and, where the backend has one, the position that its delivery names."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    receipts = dict([await producer.publish(id=f"given-{number}") for number in range(20)])
    member = await trial.member(group)
    for lent in await trial.take(member, 20):
        receipt = receipts[lent.msg or ""]
        trial.equal(lent.delivery.id, receipt.id, "PUB-1", f"id of {lent.msg}")
        if receipt.position is not None:
            trial.equal(lent.delivery.position, receipt.position, "PUB-1", f"position of {lent.msg}")
        await lent.ack()


@case("pub.batch-per-message-result", rules=("PUB-2",), sometimes=("confirmed", "unpublished"))
async def batch_per_message_result(trial: Trial) -> None:
    """`publish_many` gives every message its own outcome: one too large fails alone."""
    limit = trial.claims.max_message_bytes.limit
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    identities = [producer.next() for _ in range(20)]
    if limit > 256 * 1024 * 1024:
        # No size is too large here, so the odd one out is a header that nobody may use.
        bodies = [
            Message(each.body(), headers={"unistream-v": b"1"} if place == 6 else None)  # type: ignore[arg-type]
            for place, each in enumerate(identities)
        ]
        kind: type[Exception] = Exception
    else:
        bodies = [Message(each.body(int(limit) + 1 if place == 6 else 0)) for place, each in enumerate(identities)]
        kind = TooLargeError
    calls = [trial.recorder.invoke("publish", topic=topic, msg=each.name, key=None) for each in identities]
    outcomes = await producer.producer.publish_many(bodies)
    for call, outcome in zip(calls, outcomes, strict=True):
        if isinstance(outcome, Receipt):
            call.ok(position=outcome.position)
        else:
            call.fail(outcome)
    failed = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, Receipt)]
    trial.equal(failed, [6], "PUB-2", "places of failed messages")
    trial.that(isinstance(outcomes[6], kind), "PUB-2", kind.__name__, outcomes[6])
    await trial.drain(group)


@case("pub.unknown-is-unknown", rules=("PUB-2",), tier=Tier.CORE, sometimes=("hit", "unknown"))
async def unknown_is_unknown(trial: Trial) -> None:
    """A message whose answer is lost is reported as perhaps stored, never as surely not stored."""
    line = Line()
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, client=await trial.open(line))
    await producer.publish()
    line.lose_reply = 1_000_000
    error = await trial.raises(PublishError, producer.publish(timeout=3.0), "PUB-2")
    line.lose_reply = 0
    trial.tally("hit", line.hits)
    trial.that(isinstance(error, PublishUnknownError), "PUB-2", "PublishUnknownError", error)
    trial.equal(getattr(error, "stored", None), "unknown", "PUB-2", "stored")
    await producer.publish()
    await trial.drain(group)


@case("pub.error-not-swallowed", rules=("PUB-2", "END-3"), sometimes=("hit",))
async def error_not_swallowed(trial: Trial) -> None:
    """A message that could never be handed over raises, and was surely not stored; then publishing works again."""
    line = Line()
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, client=await trial.open(line))
    line.refuse = 1_000_000
    error = await trial.raises(PublishError, producer.publish(timeout=2.0), "PUB-2")
    line.refuse = 0
    trial.tally("hit", line.hits)
    trial.that(getattr(error, "stored", None) in ("no", "unknown"), "PUB-2", "stored no or unknown", error)
    await trial.within(trial.pace.patience, producer.publish(timeout=trial.pace.patience), "END-3", "publishing again")
    await trial.drain(group)


@case("pub.retry-stores-once", rules=("PUB-3",), level=GATED("dedupe"), sometimes=("hit", "delivered"))
async def retry_stores_once(trial: Trial) -> None:
    """A retry by the library uses the same id, so a backend with deduplication stores the message once."""
    line = Line()
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, client=await trial.open(line))
    for _ in range(5):
        since = trial.recorder.now()
        line.lose_reply = 1
        try:
            await producer.publish(timeout=5.0)
        except PublishUnknownError:
            # Without a retry of its own the library may say so; the message must still be there once.
            trial.tally("unretried")
        trial.recorder.record("fault", member=producer.name, since=since, note="connection reply lost")
    trial.tally("hit", line.hits)
    await trial.drain(group)
    # The same by the caller's own hand: who publishes an id again gets a receipt that says so.
    again = await trial.topic()
    watch = await trial.group(again)
    async with trial.client.producer(again) as bare, watch.consumer() as consumer:
        receipts = [await bare.publish(b"once", id="the-same") for _ in range(3)]
        trial.equal([each.duplicate for each in receipts], [False, True, True], "PUB-3", "duplicates told")
        delivery = await consumer.receive(trial.pace.patience)
        trial.that(delivery is not None, "PUB-3", "one delivery", delivery)
        if delivery is not None:
            await delivery.ack()
        trial.that(await consumer.receive(trial.pace.silence) is None, "PUB-3", "one delivery", "a second one")


@case("pub.flush-resolves-all", rules=("PUB-1", "PUB-5"), sometimes=("confirmed", "drained"))
async def flush_resolves_all(trial: Trial) -> None:
    """After `flush` every outcome is known, and what was confirmed is delivered."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    confirmations = [(await producer.submit())[1] for _ in range(1000)]
    await trial.within(trial.pace.patience, producer.producer.flush(), "PUB-5", "flush")
    open_ones = sum(not confirmation.done() for confirmation in confirmations)
    trial.equal(open_ones, 0, "PUB-5", "confirmations still open after flush")
    stats = producer.producer.stats
    sums = stats.confirmed + stats.failed + stats.unknown + stats.dropped + stats.in_flight
    trial.equal(sums, stats.published, "PUB-5", "confirmed + failed + unknown + dropped + in flight")
    await trial.drain(group)


@case("pub.order-sequential", rules=("PUB-4", "ORD-5"), tier=Tier.SMOKE, sometimes=("delivered",))
async def order_sequential(trial: Trial) -> None:
    """Messages of one producer with one key are stored in the order published."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    published = [(await producer.publish(key=b"k"))[0] for _ in range(20)]
    member = await trial.member(group)
    delivered = []
    for lent in await trial.take(member, 20):
        delivered.append(lent.msg)
        await lent.ack()
    trial.equal(delivered, published, "PUB-4", "deliveries in the order")


@case("pub.order-pipelined", rules=("PUB-4",), sometimes=("delivered", "hit"))
async def order_pipelined(trial: Trial) -> None:
    """The order of one key holds for two hundred messages under way at once, also across the library's retries."""
    line = Line()
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic, client=await trial.open(line))
    for number in range(200):
        if number == 100:
            line.refuse = 2
        await producer.submit(key=b"k")
        if number % 50 == 49:
            await asyncio.sleep(0.01)
    await trial.within(2 * trial.pace.patience, producer.watched(), "PUB-5", "all outcomes")
    trial.tally("hit", line.hits)
    member = await trial.member(group)
    numbers = []
    for _ in range(200):
        lent = await trial.next(member)
        numbers.append(int((lent.msg or "x.0").rpartition(".")[2]))
        await lent.ack()
    trial.that(numbers == sorted(numbers), "PUB-4", "deliveries in the order published", numbers)


@case("pub.timeout-honoured", rules=("PUB-2", "END-2"), sometimes=("unknown",))
async def timeout_honoured(trial: Trial) -> None:
    """A publish that gets no answer ends at its own timeout, with an unknown outcome."""
    line = Line()
    topic = await trial.topic()
    client = await trial.open(line)
    producer = await trial.producer(topic, client=client)
    await producer.publish()
    line.kill()
    loop = asyncio.get_running_loop()
    began = loop.time()
    error = await trial.raises(Exception, producer.publish(timeout=1.0), "END-2", within=10.0)
    took = loop.time() - began
    trial.that(
        took + 0.05 >= 1.0 and took <= 1.0 + 0.3 + trial.pace.slack, "END-2", "an error after 1 s", f"{took:.2f} s"
    )
    trial.equal(getattr(error, "stored", None), "unknown", "PUB-2", "stored")


@case("pub.after-close", rules=("END-6", "PUB-2"), tier=Tier.SMOKE)
async def after_close(trial: Trial) -> None:
    """Publishing on a closed producer is a clear error at once."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    await producer.publish()
    await producer.producer.close()
    await trial.raises(ClosedError, producer.publish(), "END-6", within=1.0)


@case("pub.concurrent-no-mixup", rules=("PUB-1", "PUB-2"), sometimes=("confirmed", "drained"))
async def concurrent_no_mixup(trial: Trial) -> None:
    """With sixteen tasks publishing at once every receipt belongs to its own message."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)

    async def publish(task: int) -> None:
        for number in range(50):
            name = f"task{task}-{number}"
            _, receipt = await producer.publish(id=name)
            trial.equal(receipt.id, name, "PUB-1", "id in the receipt")

    async with asyncio.TaskGroup() as tasks:
        for task in range(16):
            tasks.create_task(publish(task))
    await trial.drain(group)


@case("pub.no-group", rules=("PUB-8",), tier=Tier.SMOKE)
async def no_group(trial: Trial) -> None:
    """Publishing to a topic that has no group succeeds: no group was promised it."""
    topic = await trial.topic()
    producer = await trial.works(trial.producer(topic), "PUB-8", "a producer where no group is")
    _, receipt = await trial.works(producer.publish(), "PUB-8", "a receipt where no group is")
    trial.that(bool(receipt.id), "PUB-8", "a receipt", receipt)


@case("pub.error-says-stored", rules=("PUB-2",), tier=Tier.SMOKE, sometimes=("unpublished",))
async def error_says_stored(trial: Trial) -> None:
    """Every error that `publish` raises says whether the message may be stored."""
    topic = await trial.topic()
    producer = await trial.producer(topic)
    await trial.client.delete_topic(topic)
    error = await trial.raises(Exception, producer.publish(timeout=5.0), "PUB-8")
    trial.equal(getattr(error, "stored", None), "no", "PUB-2", "stored, of a topic that is gone,")
