"""The wire format: everything that goes in comes out, on every kind of header, and garbage stops nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unistream.driver.envelope import DEAD_PREFIX, RESERVED_PREFIX, Envelope, binary_fits, text_fits
from unistream.driver.types import RawMessage

NAMES = st.one_of(st.sampled_from(["a", "A", "b", "content-type", "é", ""]), st.text(st.characters(codec="utf-8")))
PAIRS = st.lists(st.tuples(NAMES.filter(lambda name: not name.lower().startswith(RESERVED_PREFIX)), st.binary()))
MARKS = st.sampled_from([(), ((DEAD_PREFIX + "topic", b"t"), (DEAD_PREFIX + "reason", b"why"))])
IDS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=128).filter(
    lambda text: text == text.strip()
)
RESERVED = [RESERVED_PREFIX + part for part in ("id", "v", "key", "time", "headers", "x")]
ENVELOPES = {
    "native": Envelope(key=True, time=True),
    "table": Envelope(fits=binary_fits),
    "text": Envelope(fits=text_fits, text=True),
    "all in headers": Envelope(),
}


@pytest.mark.parametrize("kind", ENVELOPES)
@given(identity=IDS, key=st.none() | st.binary(), pairs=PAIRS, marks=MARKS, time_ms=st.integers(0, 10**14 - 1))
def test_what_goes_in_comes_out(
    kind: str,
    identity: str,
    key: bytes | None,
    pairs: list[tuple[str, bytes]],
    marks: tuple[tuple[str, bytes], ...],
    time_ms: int,
) -> None:
    """Id, key, time, and headers with their order, duplicates and case; dead letter marks stay visible."""
    envelope = ENVELOPES[kind]
    message = RawMessage(identity, b"body", key, (*pairs, *marks), 0)

    wire = envelope.wrap(message, time_ms)
    back = envelope.unwrap(wire)

    assert back.id == identity
    assert back.headers == message.headers
    assert back.key == (None if kind == "native" else key)
    assert back.time_ms == (None if kind == "native" else time_ms)
    if kind == "text":
        assert text_fits(tuple(pair for pair in wire if pair[1])) or any(not value for _, value in wire)
    if kind == "table":
        assert binary_fits(tuple(wire))


@pytest.mark.parametrize("kind", ENVELOPES)
@given(
    wire=st.lists(
        st.tuples(
            st.one_of(NAMES, st.sampled_from(RESERVED)),
            st.one_of(
                st.binary(),
                st.sampled_from(
                    [
                        b"[",
                        b"[" * 100_000,
                        b"5",
                        b"{}",
                        b'{"ab": 1}',
                        b'[["a"]]',
                        b'[[1, "QQ=="]]',
                        b'[["a", 1]]',
                        b'[["a", "\xc3\xa9"]]',
                        b"9" * 5000,
                        b"%%%",
                        b"99999999999999",
                        b"\xb2",
                        b"-1",
                    ]
                ),
            ),
        )
    )
)
def test_garbage_is_as_if_it_were_absent(kind: str, wire: list[tuple[str, bytes]]) -> None:
    """No header that anybody can write raises, and what is no id, time or headers counts as none."""
    back = ENVELOPES[kind].unwrap(wire)

    assert len(back.id) <= 128
    assert back.id.isascii()
    assert back.time_ms is None or 0 <= back.time_ms < 10**14
    assert all(isinstance(name, str) and isinstance(value, bytes) for name, value in back.headers)
    foreign = [pair for pair in wire if not pair[0].startswith(RESERVED_PREFIX)]
    assert [pair for pair in back.headers if pair in foreign][-len(foreign) :] == foreign or not foreign


def test_the_wire_as_it_is_written_down() -> None:
    """Golden vectors: what other programs may rely on."""
    plain = RawMessage("id-1", b"body", b"k\xff", (("a", b"1"), ("A", b"2")), 0)
    double = RawMessage("id-1", b"body", b"k\xff", (("a", b"1"), ("a", b"\x00")), 0)

    assert ENVELOPES["all in headers"].wrap(plain, 1700000000123) == [
        ("a", b"1"),
        ("A", b"2"),
        ("unistream-id", b"id-1"),
        ("unistream-v", b"1"),
        ("unistream-key", b"k\xff"),
        ("unistream-time", b"1700000000123"),
    ]
    assert ENVELOPES["native"].wrap(plain, 1)[2:] == [("unistream-id", b"id-1"), ("unistream-v", b"1")]
    assert ENVELOPES["table"].wrap(double, 1)[0] == ("unistream-headers", b'[["a","MQ=="],["a","AA=="]]')
    assert ENVELOPES["text"].wrap(plain, 1)[0][0] == "unistream-headers"
    assert ("unistream-key", b"k%FF") in ENVELOPES["text"].wrap(plain, 1)


def test_a_foreign_message_is_all_the_applications() -> None:
    """Without one reserved header there is no id, no key, no time, and every header is the application's."""
    pairs = [("b", b"1"), ("a", b"2"), ("b", b"3")]

    assert Envelope().unwrap(pairs) == ("", None, tuple(pairs), None)
