"""How messages, topics and groups are written down; no server."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unistream.driver.types import GroupSpec, RawMessage, Retention, TopicSpec
from unistream.errors import (
    AccessError,
    BrokerUnavailableError,
    GroupMissingError,
    TopicMissingError,
    UnistreamError,
    UnsupportedError,
)
from unistream_nats.entries import MOST_HEADERS, message_of, written
from unistream_nats.errors import ApiError, Code, NoResponder, translate
from unistream_nats.names import escape, lane_filters, stream_name, unescape
from unistream_nats.registry import consumer_config, group_spec, start_config, stream_config, topic_spec
from unistream_nats.wire import Gone, Refused

NAMES = st.text(min_size=1) | st.sampled_from(["a", "A", "Nats-Rollup", "nats-msg-id"])
HEADERS = st.lists(
    st.tuples(NAMES.filter(lambda name: not name.startswith("unistream-")), st.binary() | st.just(b"plain text"))
    | st.just(("unistream-dead-topic", b"t"))
)
IDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=128).filter(
    lambda identity: identity == identity.strip()
)
MESSAGES = st.builds(RawMessage, IDS, st.binary(), st.none() | st.binary(), HEADERS.map(tuple), st.just(0), st.just(""))
TOPICS = st.builds(
    TopicSpec,
    st.sampled_from(["t", "a.b-c_d"]),
    st.integers(1, 100),
    st.sampled_from(["none", "key"]),
    st.builds(
        Retention,
        st.none() | st.floats(0.1, 1e9),
        st.none() | st.integers(1, 10**15),
        st.none() | st.integers(1, 10**15),
    ),
    st.none() | st.integers(1, 10**9),
)
GROUPS = st.builds(
    GroupSpec,
    st.just("t"),
    st.sampled_from(["g", "a.b-c_d"]),
    st.sampled_from(["none", "key"]),
    st.sampled_from(["latest", "earliest", "17"]) | st.datetimes(timezones=st.just(UTC)),
    st.floats(0.5, 1e6),
    st.floats(0.5, 1e6),
)


@settings(deadline=None)
@given(MESSAGES)
def test_a_message_comes_back_as_it_was_written(message: RawMessage) -> None:
    """Body, key, id and headers survive: order, duplicates, case, bytes, and names that the server would act upon."""
    head, body = written(message)
    read = message_of(head, body, 0)

    assert sorted(read.headers) == sorted(message.headers)
    assert read._replace(headers=()) == message._replace(headers=())
    if not any(name.startswith("unistream-") for name, _ in message.headers):
        assert read == message
    assert body == message.value
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    assert lines[0] == b"NATS/1.0"
    assert [line for line in lines[1:] if line.lower().startswith(b"nats-")] == lines[1:2]


def test_headers_beyond_what_the_server_takes_lie_in_front_of_the_body() -> None:
    """Plain and binary headers of a hundred kilobytes come back, and the block stays below the server's limit."""
    for value in (b"x" * 1000, b"\xff" * 1000):
        headers = (*(("h", value) for _ in range(100)), ("unistream-dead-topic", b"t"))
        message = RawMessage("1", b"body", b"k", headers, 0)
        head, body = written(message)

        assert len(head) <= MOST_HEADERS
        assert body.endswith(b"body")
        assert message_of(head, body, 0) == message


@settings(deadline=None)
@given(st.binary(), st.binary())
def test_any_foreign_headers_make_a_message(head: bytes, body: bytes) -> None:
    """Whatever block of headers a foreign program sends, its message can be delivered and published again."""
    read = message_of(b"NATS/1.0\r\n" + head + b"\r\n\r\n", body, 0)
    again = message_of(*written(read._replace(id="x")), 0)

    assert again.value == read.value
    assert sorted(again.headers) == sorted(read.headers)


@settings(deadline=None)
@given(TOPICS)
def test_a_topic_comes_back_as_it_was_declared(spec: TopicSpec) -> None:
    """Every setting of a topic survives its stream's configuration."""
    assert topic_spec(stream_config(spec, 1)) == spec


@settings(deadline=None)
@given(GROUPS)
def test_a_group_comes_back_as_it_was_declared(spec: GroupSpec) -> None:
    """Every setting of a group survives its consumer's configuration."""
    assert group_spec("t", consumer_config(spec, escape(spec.name), None, spec.start)) == spec


def test_a_newer_record_is_refused() -> None:
    """A format that this version does not know is an error that says what to do."""
    newer = {"name": "us_t", "description": 'unistream {"format": 2}'}
    with pytest.raises(UnsupportedError, match="upgrade"):
        topic_spec(newer)
    with pytest.raises(UnsupportedError, match="upgrade"):
        group_spec("t", {**newer, "name": "g"})


@given(st.text("aA.-_0", min_size=1), st.text("aA.-_0", min_size=1))
def test_names_are_escaped_without_collisions(one: str, other: str) -> None:
    """Different names are different streams and consumers, and a name comes back."""
    assert (stream_name(one) == stream_name(other)) == (one == other)
    assert unescape(escape(one)) == one
    ordered = TopicSpec("t", 3, "key")
    lanes = set(lane_filters(GroupSpec("t", one, "key"), ordered))
    others = set(lane_filters(GroupSpec("t", other, "key"), ordered))
    assert len(lanes) == 4
    assert (lanes & others == set()) == (one != other)


def test_a_start_becomes_a_deliver_policy() -> None:
    """Each kind of start is the server's own; a time keeps its microseconds."""
    at = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)

    assert start_config("latest") == {"deliver_policy": "new"}
    assert start_config("earliest") == {"deliver_policy": "all"}
    assert start_config("7") == {"deliver_policy": "by_start_sequence", "opt_start_seq": 7}
    assert start_config(at)["opt_start_time"] == "2026-01-02T03:04:05.000006Z"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ApiError({"err_code": Code.STREAM_MISSING}), TopicMissingError),
        (ApiError({"err_code": Code.CONSUMER_MISSING}), GroupMissingError),
        (ApiError({"err_code": 10039}), UnsupportedError),
        (ApiError({"err_code": 10008, "code": 503}), BrokerUnavailableError),
        (ApiError({"err_code": 1}), UnistreamError),
        (NoResponder("x"), UnsupportedError),
        (Gone("x"), BrokerUnavailableError),
        (Refused("x"), AccessError),
        (OSError("x"), BrokerUnavailableError),
        (KeyError("x"), UnistreamError),
    ],
)
def test_errors_are_translated(theirs: Exception, ours: type[UnistreamError]) -> None:
    """Whatever the server or the network raises becomes ours, with the original as cause."""
    with pytest.raises(ours) as caught, translate("do it", "t"):
        raise theirs

    assert caught.value.__cause__ is theirs
    assert caught.value.driver == "nats"
