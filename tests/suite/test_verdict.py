"""The table of verdicts: a skip is never a pass, and claims are held to both ways."""

from __future__ import annotations

import pytest

from unistream.conformance.registry import GATED, MUST, SHOULD, Case, Level, Registry, Tier, case
from unistream.conformance.verdict import Judged, Outcome, Verdict, conformant, obstacles, settle_attempts, verdict

TABLE = [
    (True, Outcome.PASSED, "CONFORMS", "CONFORMS"),
    (True, Outcome.FAILED, "VIOLATION", "VIOLATION"),
    (True, Outcome.REFUSED, "VIOLATION", "VIOLATION"),
    (True, Outcome.NOT_RUN, "UNVERIFIED", "UNVERIFIED"),
    (True, Outcome.CANNOT_EXIST, "INAPPLICABLE", "INAPPLICABLE"),
    (True, Outcome.BROKEN, "ERROR", "ERROR"),
    (False, Outcome.PASSED, "UNDERCLAIMED", "UNDERCLAIMED"),
    (False, Outcome.FAILED, "ABSENT", "VIOLATION"),
    (False, Outcome.REFUSED, "ABSENT", "ABSENT"),
    (False, Outcome.NOT_RUN, "UNVERIFIED", "UNVERIFIED"),
    (False, Outcome.CANNOT_EXIST, "INAPPLICABLE", "INAPPLICABLE"),
    (False, Outcome.BROKEN, "ERROR", "ERROR"),
]


@pytest.mark.parametrize(("claimed", "outcome", "quality", "refusable"), TABLE)
def test_the_table(claimed: bool, outcome: Outcome, quality: str, refusable: str) -> None:
    """Every claim beside every outcome has its verdict, for a quality and for what must be refused."""
    assert verdict(claimed=claimed, outcome=outcome, needs=["fencing"]) == quality
    assert verdict(claimed=claimed, outcome=outcome, needs=["seek"]) == refusable


def test_the_table_is_whole() -> None:
    """No pair of claim and outcome is left out, and only a run that passed is ever a pass."""
    assert {(claimed, outcome) for claimed, outcome, _, _ in TABLE} == {
        (claimed, outcome) for claimed in (True, False) for outcome in Outcome
    }
    assert {outcome for _, outcome, *verdicts in TABLE if {"CONFORMS", "UNDERCLAIMED"} & set(verdicts)} == {
        Outcome.PASSED
    }


async def _body(trial: object) -> None:
    """Promise nothing."""


def _judged(found: Verdict, level: Level = MUST, *, claimed: bool = True) -> Judged:
    return Judged(Case("pub.x", ("PUB-1",), level, Tier.CORE, "A promise.", _body), claimed, found)


@pytest.mark.parametrize("found", [Verdict.VIOLATION, Verdict.UNVERIFIED, Verdict.ERROR, Verdict.UNSTABLE])
def test_one_mandatory_case_short_of_a_pass_is_enough(found: Verdict) -> None:
    """A target is not conformant while a binding case failed, broke, wavered or was not verified."""
    good = _judged(Verdict.CONFORMS)

    assert conformant([good])
    assert not conformant([good, _judged(found)])
    assert not conformant([good, _judged(found, GATED("fencing"))])
    assert obstacles([good, _judged(found)]) == [_judged(found)]


def test_what_binds_nobody_stands_in_nobodys_way() -> None:
    """SHOULD cases, absent capabilities and what cannot exist leave a target conformant, and alone prove nothing."""
    rest = [
        _judged(Verdict.VIOLATION, SHOULD),
        _judged(Verdict.ABSENT, GATED("fencing"), claimed=False),
        _judged(Verdict.INAPPLICABLE),
    ]

    assert conformant([_judged(Verdict.CONFORMS), *rest])
    assert not conformant(rest)
    assert not conformant([])


def test_accepting_what_had_to_be_refused_is_no_conformance() -> None:
    """A call for an unclaimed capability that is silently accepted is a broken promise."""
    assert not conformant([_judged(Verdict.CONFORMS), _judged(Verdict.VIOLATION, GATED("seek"), claimed=False)])


def test_a_failure_among_passes_is_never_erased() -> None:
    """Attempts that disagree are UNSTABLE."""
    assert settle_attempts([Verdict.CONFORMS, Verdict.VIOLATION, Verdict.CONFORMS]) == Verdict.UNSTABLE
    assert settle_attempts([Verdict.CONFORMS, Verdict.CONFORMS]) == Verdict.CONFORMS
    assert settle_attempts([]) == Verdict.UNVERIFIED


def test_a_case_says_what_it_promises() -> None:
    """Ids are well formed and unique, rules exist, and the docstring's first line is the promise."""
    registry = Registry()
    enter = case("ack.double", rules=("DEL-5",), registry=registry)
    enter(_body)

    assert registry["ack.double"].sentence == "Promise nothing."
    with pytest.raises(ValueError, match="two cases"):
        enter(_body)
    with pytest.raises(ValueError, match="not of the form"):
        case("Ack", rules=("DEL-5",), registry=registry)(_body)
    with pytest.raises(ValueError, match="no rules"):
        case("ack.other", rules=(), registry=registry)(_body)


def test_a_name_that_matches_nothing_is_an_error() -> None:
    """Asking for a case that does not exist never means running none."""
    registry = Registry()
    case("ack.double", rules=("DEL-5",), registry=registry)(_body)

    assert [each.id for each in registry.select(only=["ack"])] == ["ack.double"]
    with pytest.raises(ValueError, match="no case"):
        registry.select(only=["nack.double"])
    with pytest.raises(ValueError, match="unknown profile"):
        registry.select("everything")
