"""How messages, topics and groups are written down; no server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from unistream.driver.types import GroupSpec, RawMessage, Retention, TopicSpec
from unistream.errors import AccessError, BrokerUnavailableError, GroupMissingError, UnistreamError, UnsupportedError
from unistream_redis.entries import fields_of, message_of, size_of
from unistream_redis.errors import translate
from unistream_redis.keys import TopicKeys
from unistream_redis.registry import group_record, group_spec, place_of, topic_fields, topic_spec

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
NAMES = st.text(min_size=1) | st.sampled_from(["value", "Value", "unistream-dead-topic"])
HEADERS = st.lists(
    st.tuples(NAMES.filter(lambda name: not name.startswith("unistream-") or "dead" in name), st.binary())
)
MESSAGES = st.builds(
    RawMessage,
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128),
    st.binary(),
    st.none() | st.binary(),
    HEADERS.map(tuple),
    st.just(0),
    st.just(""),
)


def stored(fields: list[str | bytes]) -> list[bytes]:
    """What comes back of what was written."""
    return [field.encode() if isinstance(field, str) else field for field in fields]


@SLOW
@given(MESSAGES)
def test_a_message_comes_back_as_it_was_written(message: RawMessage) -> None:
    """Body, key, id and headers survive: order, duplicates, case, bytes, and a header that is called `value`."""
    fields = stored(fields_of(message))
    read = message_of(fields, 0)

    assert read == message or (
        sorted(read.headers) == sorted(message.headers) and read._replace(headers=message.headers) == message
    )
    if not any(name == "value" or name.startswith("unistream-") for name, _ in message.headers):
        assert read == message
    assert fields[:2] == [b"value", message.value]


@SLOW
@given(st.lists(st.tuples(st.binary(), st.binary())))
def test_any_foreign_entry_can_be_read_and_published_again(pairs: list[tuple[bytes, bytes]]) -> None:
    """Whatever fields a foreign program writes, they make a message, and its headers can be written again unchanged."""
    entry = [part for pair in pairs for part in pair]
    read = message_of(entry, 0)
    again = message_of(stored(fields_of(read._replace(id="x"))), 0)

    assert again.value == read.value
    assert sorted(again.headers) == sorted(read.headers)
    assert size_of(read) >= len(read.value)


def test_a_foreign_entry_is_read_by_its_fields() -> None:
    """`value` is the body; a lone field is the body; else all fields are headers."""
    assert message_of([b"a", b"1", b"value", b"body", b"value", b"2"], 0) == RawMessage(
        "", b"body", None, (("a", b"1"), ("value", b"2")), 0
    )
    assert message_of([b"a", b"1"], 0) == RawMessage("", b"1", None, (), 0)
    assert message_of([b"a", b"1", b"a", b"2"], 0) == RawMessage("", b"", None, (("a", b"1"), ("a", b"2")), 0)


TOPICS = st.builds(
    TopicSpec,
    st.just("t"),
    st.integers(1, 100),
    st.sampled_from(["none", "key"]),
    st.builds(
        Retention,
        st.none() | st.floats(0.001, 1e9),
        st.none() | st.integers(1, 10**15),
        st.none() | st.integers(1, 10**15),
    ),
    st.none() | st.integers(1, 10**9),
    st.sampled_from(["reject", "drop_oldest"]),
)


@SLOW
@given(TOPICS)
def test_a_topic_comes_back_as_it_was_declared(spec: TopicSpec) -> None:
    """Every setting of a topic survives its hash."""
    fields = ["format", *topic_fields(spec)]

    assert topic_spec("t", [field.encode() for field in fields]) == spec


@SLOW
@given(
    st.builds(
        GroupSpec,
        st.just("t"),
        st.just("g"),
        st.sampled_from(["none", "key"]),
        st.sampled_from(["latest", "earliest", "3/17-4"]) | st.datetimes(timezones=st.just(UTC)),
        st.floats(0.2, 1e6),
        st.floats(0.2, 1e6),
    )
)
def test_a_group_comes_back_as_it_was_declared(spec: GroupSpec) -> None:
    """Every setting of a group survives its record."""
    assert group_spec("t", "g", group_record(spec)) == spec


def test_a_newer_record_is_refused() -> None:
    """A format that this version does not know is an error that says what to do."""
    with pytest.raises(UnsupportedError, match="upgrade"):
        topic_spec("t", [b"format", b"2"])
    with pytest.raises(UnsupportedError, match="upgrade"):
        group_spec("t", "g", '{"format": 2}')


def test_a_start_becomes_the_id_before_the_first_entry_wanted() -> None:
    """Redis begins after an id, a start is inclusive."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    places = {
        "latest": "$",
        "earliest": "0",
        "5-3": "5-2",
        "5-0": "4-18446744073709551615",
        "0-0": "0-0",
        "2/5-3": "5-2",
        "1/5-3": "4-18446744073709551615",
        epoch: "0-0",
        epoch + timedelta(milliseconds=5): "4-18446744073709551615",
        epoch + timedelta(milliseconds=4, microseconds=1): "4-18446744073709551615",
    }

    assert {start: place_of(start, 2) for start in places} == places


def test_no_two_topics_share_a_key() -> None:
    """A topic's partitions never collide with a topic whose name looks like one of them."""
    topic = TopicKeys("a", 2, ordered=True)
    others = [TopicKeys("a.0"), TopicKeys("a.0", 2, ordered=True), TopicKeys("a")]
    mine = {keys.stream for keys in topic.streams}

    assert mine == {"us:{a.0}:part:stream", "us:{a.1}:part:stream"}
    for other in others:
        assert mine.isdisjoint(keys.stream for keys in other.streams)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ResponseError("NOAUTH Authentication required."), AccessError),
        (ResponseError("WRONGPASS invalid username-password pair"), AccessError),
        (ResponseError("NOPERM this user has no permissions"), AccessError),
        (ResponseError("ERR AUTH <password> called without any password configured"), AccessError),
        (ResponseError("NOGROUP No such key"), GroupMissingError),
        (ResponseError("LOADING Redis is loading the dataset in memory"), BrokerUnavailableError),
        (ResponseError("READONLY You can't write against a read only replica."), BrokerUnavailableError),
        (ResponseError("ERR something new"), UnistreamError),
        (RedisConnectionError("gone"), BrokerUnavailableError),
        (ConnectionRefusedError("refused"), BrokerUnavailableError),
        (TimeoutError(), BrokerUnavailableError),
        (ValueError("garbage"), UnistreamError),
    ],
)
def test_every_error_becomes_one_of_ours(error: Exception, kind: type[UnistreamError]) -> None:
    """Whatever the client, Redis or the network raise leaves as one of our errors, with its cause."""
    with pytest.raises(kind) as raised, translate("try"):
        raise error

    assert type(raised.value) is kind
    assert raised.value.__cause__ is error
