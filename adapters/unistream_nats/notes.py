"""Notes on loans that were given back, so that the next member can tell them from loans whose member died.

JetStream counts lendings and says no more. A note is written before a message is given back and read when it is lent
again: it says that the loan ended with a word, and how many lendings of the message were no attempts. Without a note
the member may have died of the message.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from collections.abc import Sequence
from typing import NamedTuple

from unistream_nats.errors import ApiError, Code, NoResponder
from unistream_nats.link import Link
from unistream_nats.names import NOTES, notes_subject
from unistream_nats.registry import NANOSECONDS

__all__ = ["Note", "Notes"]

_KEPT_SECONDS = 30 * 86400
_AT_ONCE = 256


class Note(NamedTuple):
    """
    What is known of the lendings of one message to one group.

    Attributes:
        lending: The lending that ended with a word; 1 first.
        untouched: How many lendings so far were given back untouched, and are no attempts.
        suspect: Whether the message was a suspect, and has not been cleared.
        due: When its delay is over, by the clock of the member that asked for one; 0: it asked for none.
        server: The run of the server that was asked.
        sequence: Where the note is in its stream; 0: not known.
    """

    lending: int
    untouched: int
    suspect: bool
    due: float = 0.0
    server: str = ""
    sequence: int = 0


class Notes:
    """The notes on the messages of one topic."""

    def __init__(self, link: Link, stream: str, replicas: int) -> None:
        self._link = link
        self._stream = stream
        self._replicas = replicas

    async def write(self, notes: Sequence[tuple[str, int, Note]]) -> list[Note]:
        """Write notes for messages, each given by consumer and sequence; the notes with their places."""
        written: list[Note] = []
        for begin in range(0, len(notes), _AT_ONCE):
            part = notes[begin : begin + _AT_ONCE]
            try:
                written += await self._write(part)
            except NoResponder:
                await self._create()
                written += await self._write(part)
        return written

    async def _write(self, notes: Sequence[tuple[str, int, Note]]) -> list[Note]:
        answers = await asyncio.gather(
            *(
                self._link.request(
                    notes_subject(self._stream, consumer, sequence),
                    _text(note),
                )
                for consumer, sequence, note in notes
            )
        )
        written = []
        for (_, _, note), (_, answer) in zip(notes, answers, strict=True):
            told = json.loads(answer)
            if "error" in told:
                raise ApiError(told["error"])
            written.append(note._replace(sequence=told["seq"]))
        return written

    async def read(self, messages: Sequence[tuple[str, int]]) -> list[Note | None]:
        """The notes on messages, each given by consumer and sequence."""
        found: list[Note | None] = []
        for begin in range(0, len(messages), _AT_ONCE):
            part = messages[begin : begin + _AT_ONCE]
            found += await asyncio.gather(*(self._read(consumer, sequence) for consumer, sequence in part))
        return found

    async def _read(self, consumer: str, sequence: int) -> Note | None:
        subject = notes_subject(self._stream, consumer, sequence)
        try:
            told = await self._link.api(f"STREAM.MSG.GET.{NOTES}", {"last_by_subj": subject})
        except ApiError as error:
            if error.code in (Code.MESSAGE_MISSING, Code.STREAM_MISSING):
                return None
            raise
        message = told["message"]
        lending, untouched, suspect, due, server = [*json.loads(b64decode(message["data"])), 0.0, ""][:5]
        return Note(lending, untouched, bool(suspect), due, server, message["seq"])

    def drop(self, sequences: Sequence[int]) -> None:
        """Remove notes that nobody needs any more, without waiting; what stays ends by its age."""
        wire = self._link.current
        if wire is None:
            return
        for sequence in sequences:
            body = json.dumps({"seq": sequence, "no_erase": True}).encode()
            # The reply goes to a number that nobody waits for.
            reply = f"{wire.inbox}{wire.expect_none()}"
            subject = f"{self._link.place.api}STREAM.MSG.DELETE.{NOTES}"
            wire.write((f"PUB {subject} {reply} {len(body)}\r\n".encode(), body, b"\r\n"))

    async def purge(self, consumer: str) -> None:
        """Remove all notes of a consumer; `*`: of the topic."""
        try:
            await self._link.api(f"STREAM.PURGE.{NOTES}", {"filter": notes_subject(self._stream, consumer)})
        except ApiError as error:
            if error.code != Code.STREAM_MISSING:
                raise

    async def _create(self) -> None:
        config = {
            "name": NOTES,
            "subjects": [f"{NOTES}.>"],
            "description": "unistream: notes on deliveries that were given back; removed when they are settled",
            "storage": "file",
            "num_replicas": self._replicas,
            "max_msgs_per_subject": 1,
            "max_age": _KEPT_SECONDS * NANOSECONDS,
            "discard": "old",
        }
        try:
            await self._link.api(f"STREAM.CREATE.{NOTES}", config)
        except ApiError as error:
            if error.code != Code.STREAM_EXISTS:
                raise


def _text(note: Note) -> bytes:
    said: list[object] = [note.lending, note.untouched, int(note.suspect)]
    if note.due:
        said += [note.due, note.server]
    return json.dumps(said).encode()
