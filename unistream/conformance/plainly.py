"""Knows what an operator wants to know of a cluster, and which cases answer it; in words that need no manual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unistream.conformance.terminal import Report
from unistream.conformance.verdict import FAILURES, Verdict

BROKEN = frozenset({Verdict.VIOLATION, Verdict.UNSTABLE, Verdict.EXCLUDED})


@dataclass(frozen=True, slots=True)
class Question:
    """
    One question, and where its answer comes from.

    Attributes:
        kept: What to say when every case that answers it passed.
        broken: What to say when one failed.
        cases: Ids, or groups as `ack.`, of the cases that answer it.
        rules: What a failure must name to be this answer; empty for any. A random workload may fail for many reasons.
    """

    kept: str
    broken: str
    cases: tuple[str, ...]
    rules: tuple[str, ...] = ()


QUESTIONS = (
    Question(
        "A message whose publish was confirmed reaches every group.",
        "Confirmed messages can be lost.",
        (
            "pub.confirm-means-stored",
            "con.all-and-only",
            "grp.fan-out",
            "grp.combined",
            "sim.",
            "pub.flush-resolves-all",
        ),
        ("PUB-1", "GRP-1", "END-3"),
    ),
    Question(
        "A message reported as not published is never delivered, and a doubtful one is reported as doubtful.",
        "Publishers are told the wrong outcome.",
        (
            "pub.unknown-is-unknown",
            "pub.failed-is-absent",
            "pub.error-says-stored",
            "net.reply-lost",
            "net.cut-mid-publish",
        ),
        ("PUB-2",),
    ),
    Question(
        "What was acked does not come back.",
        "Acked messages are delivered again.",
        ("ack.not-redelivered", "ack.confirmed", "ack.coalesced", "ack.confirmed-survives-kill"),
        ("DEL-1",),
    ),
    Question(
        "What a member held when it died is delivered to another member.",
        "Work that a dead member held is lost or stuck.",
        ("ack.redeliver-unacked", "ack.not-on-receive", "reb.kill9", "red.lease-expiry", "grp.leave-hands-over"),
        ("GRP-1", "GRP-4", "DEL-6", "DEL-9", "END-3"),
    ),
    Question(
        "Two members of a group never work on the same message while a lease lasts.",
        "Two members can work on the same message at once.",
        ("grp.load-balance", "red.double-lease", "reb.zombie", "ack.stale-fenced"),
        ("GRP-2", "DEL-7"),
    ),
    Question(
        "Messages with the same key are handled in the order in which they were published, also after failures.",
        "The order of messages with the same key is NOT kept.",
        ("ord.per-key", "ord.m3-m4-crash", "ord.m3-m4-kill9", "ord.nack-holds-key", "ord.across-members"),
        ("ORD-2",),
    ),
    Question(
        "A failed message is delivered again, not before its delay.",
        "Redelivery does not work as promised.",
        ("nack.redelivers", "nack.delay", "nack.backoff-grows", "red.never-early"),
        ("DEL-2", "DEL-4", "DEL-9", "GRP-1"),
    ),
    Question(
        "A message that always fails ends in the dead letter topic, with its reason.",
        "Dead letters are lost, or messages loop.",
        ("red.max-attempts", "red.reject", "red.killer-message", "red.no-loop", "dlq.atomic"),
        ("DEL-3", "DEL-4"),
    ),
    Question(
        "A slow consumer leaves its backlog at the broker, and never holds more than its bound.",
        "A slow consumer takes more than its bound.",
        ("bpc.",),
    ),
    Question(
        "A fast publisher is held back, and its memory is bounded.",
        "A fast publisher is not held back as promised.",
        ("bpp.",),
    ),
    Question(
        "Stopping and restarting a program loses nothing.",
        "Stopping or restarting a program loses messages.",
        ("shu.",),
    ),
    Question(
        "Clients come back by themselves after broken, slow and half-open connections.",
        "Clients do not recover from broken connections as promised.",
        ("net.",),
    ),
    Question(
        "What the backend does not offer it refuses, before anything is touched.",
        "The backend accepts what it does not keep.",
        ("cap.", "cfg.", "ord.unordered-refused"),
    ),
)


def answers(report: Report) -> Iterator[tuple[str, str, list[str]]]:
    """
    Yield the answer to each question: how it stands, a sentence, and the ids of the cases that spoil it.

    It stands `kept`, `broken`, `unverified` (no case passed, or one was not verified), or `absent`.
    """
    for question in QUESTIONS:
        cases = [case for case in report["cases"] if _answers(case["id"], question.cases)]
        verdicts = [case["verdict"] for case in cases]
        bad = [case["id"] for case in cases if case["verdict"] in FAILURES]
        broken = [case["id"] for case in cases if case["verdict"] in BROKEN and _names(case, question.rules)]
        passed = sum(each in (Verdict.CONFORMS, Verdict.UNDERCLAIMED) for each in verdicts)
        if broken:
            yield "broken", question.broken, broken
        elif bad:
            yield "unverified", f"Not verified: “{question.kept}”", bad
        elif passed:
            lacking = [case["id"] for case in cases if case["verdict"] == Verdict.ABSENT]
            rest = f" Not offered: {', '.join(lacking)}." if lacking else ""
            yield "kept", f"{question.kept} ({passed} {'case' if passed == 1 else 'cases'}.){rest}", []
        elif Verdict.ABSENT in verdicts:
            yield "absent", f"Not offered, and refused when asked for: “{question.kept}”", []
        else:
            yield "unverified", f"Not looked at in this run: “{question.kept}”", []


def _names(case: Report, rules: Sequence[str]) -> bool:
    named = {case["rule"], *(violation["rule"] for violation in case["violations"])}
    return not rules or bool(named & set(rules))


def _answers(case: str, names: Sequence[str]) -> bool:
    return any(case == name or (name.endswith(".") and case.startswith(name)) for name in names)


def experience(report: Report) -> str:
    """Return in one sentence how much the run put the backend through."""
    happened: dict[str, int] = {}
    for case in report["cases"]:
        for name, count in case["happened"].items():
            happened[name] = happened.get(name, 0) + count
    parts = [
        f"{happened.get(name, 0):,} {words}".replace(",", "\u202f")
        for name, words in (
            ("confirmed", "messages confirmed"),
            ("delivered", "deliveries"),
            ("redelivered", "redeliveries"),
            ("died", "members that died"),
            ("killed", "processes killed"),
            ("faults", "faults of connections"),
        )
        if happened.get(name)
    ]
    return ", ".join(parts)
