"""What kafka-python tells a member of a rebalance, on the client's own event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kafka import KafkaConsumer
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener

if TYPE_CHECKING:
    from unistream_kafka.member import Member

__all__ = ["Listener"]


class Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Takes the client's word of a rebalance to the loop."""

    def __init__(self, member: Member, client: KafkaConsumer) -> None:
        self._member = member
        self._client = client

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Tell where the group stands in partitions that came."""
        client, half = self._client, self._member._half
        stored = await client._coordinator.fetch_committed_offsets_async(assigned)
        found: dict[int, tuple[int, str] | None] = {}
        for at in assigned:
            there = stored.get(at)
            found[at.partition] = None if there is None else (there.offset, there.metadata or "")
            client.seek(at, half.place(at.partition) if there is None else there.offset)
        self._member._crossing.put(half.assigned, found)

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """
        Have the other half let partitions go.

        Returns at once, so that polls fetch from those that are kept; `keep_fetching` asks for the next share only when
        the other half is done.
        """
        member = self._member
        if revoked and not member.mute:
            member.hand_over([at.partition for at in revoked])

    async def on_partitions_lost(self, lost: Any) -> None:
        """Tell of partitions that are gone."""
        member = self._member
        member._crossing.put(member._half.lost, [at.partition for at in lost], "the membership was lost")
