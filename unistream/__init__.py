"""One messaging interface with the same promises on every broker; the URL is the only line that names one."""

import logging

from unistream import errors
from unistream._client import Client, connect
from unistream._confirmation import Confirmation
from unistream._consumer import Consumer
from unistream._delivery import Delivery
from unistream._group import DROP, Group
from unistream._health import Check, Health
from unistream._producer import Producer
from unistream._stats import ConsumerStats, DrainReport, ProducerStats
from unistream.capabilities import Capabilities, Capability, Level
from unistream.config import Config
from unistream.core.backoff import Backoff, Retry
from unistream.core.lifecycle import State
from unistream.driver.types import (
    Connected,
    DataLoss,
    Disconnected,
    Event,
    GroupSpec,
    HealthChanged,
    Lag,
    Member,
    Retention,
    TopicSpec,
)
from unistream.errors import *  # noqa: F403 - the one tree of errors is part of the public names
from unistream.message import Headers, Message, Origin, Receipt

__all__ = [
    "DROP",
    "Backoff",
    "Capabilities",
    "Capability",
    "Check",
    "Client",
    "Config",
    "Confirmation",
    "Connected",
    "Consumer",
    "ConsumerStats",
    "DataLoss",
    "Delivery",
    "Disconnected",
    "DrainReport",
    "Event",
    "Group",
    "GroupSpec",
    "Headers",
    "Health",
    "HealthChanged",
    "Lag",
    "Level",
    "Member",
    "Message",
    "Origin",
    "Producer",
    "ProducerStats",
    "Receipt",
    "Retention",
    "Retry",
    "State",
    "TopicSpec",
    "connect",
    *errors.__all__,
]

logging.getLogger("unistream").addHandler(logging.NullHandler())
