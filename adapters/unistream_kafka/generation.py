"""What a member says in the name of a generation of its group where kafka-python would say nothing.

kafka-python 3.0.12 refuses every commit from the moment at which it asks to join the next generation, and so does
Kafka's own client. The broker does not: until all members have come it takes commits of the generation before, whose
members still own what they owned (`ClassicGroup.validateOffsetCommit` refuses from `COMPLETING_REBALANCE` on). Since
every lending waits for a commit, a group with a dead member would otherwise stand still for a whole session whenever
somebody joins or leaves.

It also sends no heartbeats until it has its share. When the leader dies before it has shared out, everybody waits for
the end of its session, and all sessions end with it: `beat` keeps them.

And it waits for its share only within a poll; one that comes between two polls it throws away, to join anew: a group
whose leader does so goes round for ever. `keep_shares` keeps it. And it gives up every poll for its membership while a
rebalance is under way: `keep_fetching` has it fetch on. Runs on the client's event loop.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from kafka import TopicPartition
from kafka.errors import (
    CommitFailedError,
    CoordinatorNotAvailableError,
    IllegalGenerationError,
    KafkaError,
    NoError,
    RebalanceInProgressError,
    for_code,
)
from kafka.protocol.consumer import HeartbeatRequest, OffsetCommitRequest
from kafka.protocol.metadata import MetadataResponse
from kafka.structs import MemberState, OffsetAndMetadata

__all__ = ["beat", "keep_fetching", "keep_shares", "store"]

_LOOK_MS = 20
"""How long a poll looks whether a rebalance is over, before it fetches from the partitions that are kept."""


async def store(coordinator: Any, offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
    """
    Store cursors and their texts.

    Args:
        coordinator: A KafkaConsumer's ConsumerCoordinator.
        offsets: What to store.

    Raises:
        RebalanceInProgressError: The broker is just giving out the next generation; nothing was stored, and the
            membership stands.
        CommitFailedError: This is no member, or another generation has begun without it.
        KafkaError: Any other; the coordinator has taken note of it.
    """
    node = _node(coordinator)
    generation = coordinator._generation
    if coordinator.state is MemberState.UNJOINED or generation.is_lost():
        raise CommitFailedError("this is no member of the group")
    request = _request(coordinator, generation, offsets)
    sent = time.monotonic()
    try:
        response = await coordinator._manager.send(request, node_id=node)
    except Exception as error:
        if node == coordinator.coordinator_id:
            coordinator._failed_request(node, request, error)
        raise
    refusals = {for_code(code) for _, partitions in response.topics for _, code in partitions}
    joining = coordinator.state is MemberState.REBALANCING or coordinator._generation is not generation
    if RebalanceInProgressError in refusals or (IllegalGenerationError in refusals and joining):
        raise RebalanceInProgressError
    coordinator._handle_offset_commit_response(offsets, sent, response)


async def beat(coordinator: Any) -> bool:
    """
    Send a heartbeat while the client waits for its share.

    Args:
        coordinator: A KafkaConsumer's ConsumerCoordinator.

    Returns:
        Whether the broker knows this member. If it does not, the client's own request will tell the client.
    """
    generation = coordinator._generation
    if coordinator.coordinator_id is None or generation.is_lost():
        return False
    request = HeartbeatRequest(
        group_id=coordinator.group_id,
        generation_id=generation.generation_id,
        member_id=generation.member_id,
        group_instance_id=coordinator.group_instance_id,
    )
    try:
        response = await coordinator._manager.send(request, node_id=_node(coordinator))
    except KafkaError:
        return False
    return for_code(response.error_code) in (NoError, RebalanceInProgressError)


def keep_shares(coordinator: Any) -> None:
    """
    Have a ConsumerCoordinator take up the share that came while it was not polled, instead of asking for another one.

    (`BaseCoordinator.join_group_async` starts a new task when the last one is done, also when nobody saw its result.)
    """
    ask, take_up = coordinator._do_join_and_sync_async, coordinator._on_join_complete_async
    kept: list[tuple[Any, bytes]] = []

    async def join() -> bytes:
        if kept and kept[0][0] is coordinator._generation and coordinator.state is MemberState.REBALANCING:
            return kept[0][1]
        kept.clear()
        share: bytes = await ask()
        kept.append((coordinator._generation, share))
        return share

    async def joined(*arguments: Any) -> None:
        kept.clear()
        await take_up(*arguments)

    coordinator._do_join_and_sync_async, coordinator._on_join_complete_async = join, joined


def keep_fetching(client: Any, handing_over: Callable[[], bool]) -> None:
    """
    Have a KafkaConsumer look after its membership within a poll without giving up the poll for it.

    (kafka-python 3.0.12 fetches nothing from the partitions that it keeps while a rebalance is under way.)

    Args:
        client: The KafkaConsumer.
        handing_over: Whether partitions that are to go to others are still being settled: meanwhile it does not ask
            for the share in which they are given away.
    """
    coordinator = client._coordinator
    poll = coordinator.poll

    def look(timeout_ms: float | None = None) -> bool:
        if handing_over():
            coordinator.poll_heartbeat()
            return True
        if not (coordinator.need_rejoin() and client.assignment()):
            return bool(poll(timeout_ms=timeout_ms))
        short = _LOOK_MS if timeout_ms is None else min(timeout_ms, _LOOK_MS)
        return poll(timeout_ms=short) or coordinator.state is MemberState.REBALANCING

    coordinator.poll = look


def _node(coordinator: Any) -> Any:
    """
    Where to send a request to: while a request to join is under way, over a connection beside the client's own.

    The broker holds that request until everybody has come, and takes no other from its connection meanwhile.
    """
    node = coordinator.coordinator()
    if node is None:
        raise CoordinatorNotAvailableError
    if coordinator.state is not MemberState.REBALANCING:
        return node
    there = coordinator._cluster.broker_metadata(node)
    beside = f"{node}-beside"
    # As the cluster itself keeps coordinators, whose connections are not those of the same broker (`add_coordinator`).
    coordinator._cluster._coordinator_brokers[beside] = MetadataResponse.MetadataResponseBroker(
        beside, there.host, there.port, None
    )
    return beside


def _request(
    coordinator: Any, generation: Any, offsets: Mapping[TopicPartition, OffsetAndMetadata]
) -> OffsetCommitRequest:
    topic_of = OffsetCommitRequest.OffsetCommitRequestTopic
    partition_of = topic_of.OffsetCommitRequestPartition
    by_topic: dict[str, list[Any]] = defaultdict(list)
    for at, offset in offsets.items():
        by_topic[at.topic].append(
            partition_of(
                partition_index=at.partition,
                committed_offset=offset.offset,
                committed_leader_epoch=offset.leader_epoch,
                committed_metadata=offset.metadata,
            )
        )
    return OffsetCommitRequest(
        max_version=8,
        group_id=coordinator.group_id,
        generation_id_or_member_epoch=generation.generation_id,
        member_id=generation.member_id,
        group_instance_id=coordinator.group_instance_id,
        topics=[topic_of(name=topic, partitions=partitions) for topic, partitions in by_topic.items()],
    )
