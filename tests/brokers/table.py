"""The table of brokers, one row each: name, version, configuration."""

from __future__ import annotations

from tests.brokers.broker import Broker, BrokerError
from tests.brokers.kafka_server import Kafka
from tests.brokers.nats_server import Nats
from tests.brokers.rabbitmq_server import RabbitMQ
from tests.brokers.redis_server import EVICTING, VOLATILE, Redis

_ROWS: list[Broker] = [
    Redis("redis"),
    Redis("redis8", version="8.2"),
    Redis("redis-volatile", VOLATILE),
    Redis("redis-evicting", EVICTING),
    Kafka("kafka"),
    RabbitMQ("rabbitmq"),
    Nats("nats"),
    Nats("nats-old", version="2.9"),
    Nats("nats-sync", settings=["sync_interval: always"]),
]
BROKERS: dict[str, Broker] = {broker.name: broker for broker in _ROWS}


def broker(name: str) -> Broker:
    """Return the row of this name."""
    if name not in BROKERS:
        raise BrokerError(f"there is no broker {name!r}; there are: {', '.join(BROKERS)}")
    return BROKERS[name]
