"""Cases about what a member may rely on beside others: a seek while it is there, and a delivery that it forgot."""

from __future__ import annotations

import gc
import logging

from unistream.conformance.registry import GATED, case
from unistream.conformance.trial import Trial
from unistream.errors import UnsupportedError


@case("rep.seek-with-members", rules=("CAP-4", "GRP-1"), level=GATED(seek=True), sometimes=("acked",))
async def seek_with_members(trial: Trial) -> None:
    """A seek while a member is there either moves the group under it, or is refused and changes nothing."""
    topic = await trial.topic()
    group = await trial.group(topic)
    producer = await trial.producer(topic)
    names = [(await producer.publish())[0] for _ in range(3)]
    member = await trial.member(group)
    for lent in await trial.take(member, 3):
        await lent.ack(confirm=bool(trial.claims.ack_confirm))
    call = trial.recorder.invoke("seek", topic=topic, group=group.name)
    if trial.claims.seek.with_members:
        await group.seek("earliest")
        call.ok()
    else:
        error = await trial.raises(UnsupportedError, group.seek("earliest"), "CAP-4")
        call.fail(error)
        trial.equal(getattr(error, "capability", None), "seek", "CAP-4", "capability named")
        names = []
    names.append((await producer.publish())[0])
    for name in names:
        lent = await trial.next(member, "CAP-4")
        trial.equal(lent.msg, name, "CAP-4", "delivery after the seek")
        await lent.ack()


class _Heard(logging.Filter):
    """Hears what the library says about one topic, and keeps it from the log: it is expected."""

    def __init__(self, topic: str) -> None:
        super().__init__()
        self.topic = topic
        self.said: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Take a record that is about the topic."""
        text = record.getMessage()
        if self.topic not in text:
            return True
        self.said.append(text)
        return False


@case("ack.dropped-unsettled", rules=("DEL-8", "DEL-6"), sometimes=("dropped",))
async def dropped_unsettled(trial: Trial) -> None:
    """A delivery that the program forgot is logged once, with where it was received, and comes again by itself."""
    topic = await trial.topic()
    # Renewed by the library for ever, if it were still held.
    group = await trial.group(topic, max_lease=3600.0)
    producer = await trial.producer(topic)
    log, heard = logging.getLogger("unistream.consumer"), _Heard(topic)
    level = log.level
    log.setLevel(logging.WARNING)
    log.addFilter(heard)
    try:
        async with group.consumer() as consumer:
            await producer.publish()
            delivery = await consumer.receive(trial.pace.patience)
            trial.that(delivery is not None, "GRP-1", "a delivery", "none")
            del delivery
            gc.collect()
            trial.tally("dropped")
            again = await consumer.receive(2 * trial.lease + trial.recovery)
            trial.that(again is not None, "DEL-8", "the message again when its lease had ended", "nothing")
            if again is not None:
                trial.equal(again.attempt, 2, "DEL-8", "attempt")
                await again.ack()
    finally:
        log.removeFilter(heard)
        log.setLevel(level)
    told = [text for text in heard.said if "was dropped" in text]
    trial.that(len(told) == 1, "DEL-8", "one warning", told)
    trial.that(__file__ in told[0], "DEL-8", f"the place, in {__file__}", told[0])
