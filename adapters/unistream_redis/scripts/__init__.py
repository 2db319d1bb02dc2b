"""The Lua scripts that run inside Redis, each with the shared part in front; one script is one atomic step."""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files
from typing import NamedTuple

__all__ = [
    "ALL",
    "BALANCE",
    "CREATE_GROUP",
    "CREATE_TOPIC",
    "DELETE_GROUP",
    "DELETE_TOPIC",
    "EXTEND",
    "GIVE_BACK",
    "JOIN",
    "LAG",
    "ORDERED",
    "PUBLISH",
    "RETAIN",
    "SEEK",
    "SETTLE",
    "TICK",
    "Script",
]


class Script(NamedTuple):
    """A script and the name by which Redis knows it."""

    text: str
    sha: str


def _load(name: str) -> Script:
    folder = files(__package__)
    text = folder.joinpath("common.lua").read_text() + folder.joinpath(name + ".lua").read_text()
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


BALANCE = _load("balance")
CREATE_GROUP = _load("create_group")
CREATE_TOPIC = _load("create_topic")
DELETE_GROUP = _load("delete_group")
DELETE_TOPIC = _load("delete_topic")
EXTEND = _load("extend")
GIVE_BACK = _load("give_back")
JOIN = _load("join")
LAG = _load("lag")
ORDERED = _load("ordered")
PUBLISH = _load("publish")
RETAIN = _load("retain")
SEEK = _load("seek")
SETTLE = _load("settle")
TICK = _load("tick")

ALL = (
    BALANCE,
    CREATE_GROUP,
    CREATE_TOPIC,
    DELETE_GROUP,
    DELETE_TOPIC,
    EXTEND,
    GIVE_BACK,
    JOIN,
    LAG,
    ORDERED,
    PUBLISH,
    RETAIN,
    SEEK,
    SETTLE,
    TICK,
)
