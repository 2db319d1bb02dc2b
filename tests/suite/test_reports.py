"""What is made of results: the report's forms, exit codes, exclusions, rounds, comparison, cleaning up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tests.suite.bad_reports import report_of
from unistream.cli.conform import app
from unistream.conformance.compare import compare, is_worse
from unistream.conformance.exclusions import load_exclusions
from unistream.conformance.housekeeping import OURS, cleanup
from unistream.conformance.junit import COMPLETE, junit
from unistream.conformance.kill import harm
from unistream.conformance.redaction import redacted, scrub
from unistream.conformance.registry import MUST, Case, Tier, load_cases
from unistream.conformance.report import as_json
from unistream.conformance.rounds import FOUNDATIONS, run_cases
from unistream.conformance.runner import run_case
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.target import Target
from unistream.conformance.terminal import lines
from unistream.conformance.trial import Trial
from unistream.conformance.verdict import Verdict, conformant

TARGET = Target.of("memory://reports")
FAR = "expires = 2999-01-01"


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def test_the_command_judges_and_writes_every_form(tmp_path: Path) -> None:
    """`conform URL` exits with 0, prints the verdict, and the files hold the same cases."""
    paths = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "html")}

    code, said = _run("memory://x", "--profile", "smoke", *(w for n, p in paths.items() for w in (f"--{n}", str(p))))

    report = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert code == 0
    assert said.strip().endswith("CONFORMANT")
    assert {"schema", "suite", "target", "seed", "conformant", "cases"} <= report.keys()
    assert {"id", "rule", "level", "tier", "verdict"} <= report["cases"][0].keys()
    assert len(ElementTree.parse(paths["junit"]).findall("testcase")) == len(report["cases"])
    assert all(case["id"] in paths["html"].read_text(encoding="utf-8") for case in report["cases"])


def test_wrong_calls_and_unreachable_brokers_exit_with_two() -> None:
    """Nothing is judged, and nothing passes, when the call is wrong or the preflight fails."""
    assert _run("memory://x", "--profile", "everything")[0] == 2
    assert _run("memory://x", "--only", "no.such-case")[0] == 2
    assert _run("nosuch://x")[0] == 2
    assert _run("redis://127.0.0.1:1/0?connect_timeout=1", "--profile", "smoke")[0] == 2
    assert _run("memory://x", "--hook", "explode=now")[0] == 2
    assert _run("diff", "/nonexistent/a.json", "/nonexistent/b.json")[0] == 2


def test_a_dry_run_lists_and_does_nothing() -> None:
    """Every case of the profile is named, with what cannot be run."""
    code, said = _run("memory://x", "--profile", "core", "--dry-run")

    assert code == 0
    assert all(case.id in said for case in load_cases().select("core"))
    assert "INAPPLICABLE: no password" in said


def test_the_terminal_tells_failures_at_length() -> None:
    """The broken rule, what was expected, the events, the command to see it again, and the verdict are there."""
    said = "\n".join(lines(report_of("overtake")))

    assert "ORD-2" in said
    assert "← here" in said
    assert "replay: unistream conform memory://reports --only ord.m3-m4-crash --seed 5" in said
    assert "NOT CONFORMANT: " in said.splitlines()[-1]


def test_junit_never_counts_a_skip_as_a_pass() -> None:
    """What was not verified is skipped, and with `require_complete` there is a failing test case besides."""
    report = {**report_of()}
    report["cases"] = [{**case, "verdict": "UNVERIFIED"} if n == 0 else case for n, case in enumerate(report["cases"])]

    plain = ElementTree.fromstring(junit(report))
    strict = ElementTree.fromstring(junit(report, require_complete=True))

    assert plain.get("failures") == "0"
    assert plain.get("skipped") == "2"  # err.redacted cannot exist there
    assert strict.get("failures") == "1"
    assert strict.find(f"testcase[@name='{COMPLETE}']") is not None
    assert ElementTree.fromstring(junit(report_of("overtake"))).get("failures") != "0"


def test_a_comparison_never_takes_fewer_cases_for_better() -> None:
    """A case that fails now, or is not run any more, is a loss; one that is mended is not."""
    good, bad = report_of(), report_of("overtake")

    assert is_worse(compare(good, bad))
    assert not is_worse(compare(bad, good))
    assert not compare(good, good)
    assert is_worse(compare(good, {**good, "cases": good["cases"][1:]}))


def test_the_diff_command_reads_files(tmp_path: Path) -> None:
    """Exit code 1 and the cases by name when something was lost, 0 when nothing was."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(report_of()), encoding="utf-8")
    bad.write_text(json.dumps(report_of("overtake")), encoding="utf-8")

    code, said = _run("diff", str(good), str(bad))

    assert code == 1
    assert "worse  ord.m3-m4-crash: CONFORMS → VIOLATION" in said
    assert _run("diff", str(bad), str(good))[0] == 0
    assert _run("page", str(good), str(bad), "--out", str(tmp_path / "both.html"))[0] == 0


def test_no_report_shows_a_password() -> None:
    """Neither the URL nor a text of a failure shows a secret, plain or percent-encoded."""
    url = "redis://me:s3cr%2Ft@h:1/0?token=abc"

    assert redacted(url) == "redis://me:***@h:1/0?***"
    assert "s3cr" not in json.dumps(scrub({"a": [f"no answer from {url}", "wrong password 's3cr/t'"]}, url))


def test_a_report_of_a_target_with_a_password_is_clean() -> None:
    """The JSON of a case that failed with the password in its words does not have it."""

    async def body(trial: Trial) -> None:
        """Fail in a careless way."""
        trial.that(False, "END-5", "silence", "the password is hunter22")

    case = Case("err.careless", ("END-5",), MUST, Tier.CORE, "A promise.", body)
    result = run_case(case, TARGET)
    target = replace(TARGET, url="redis://me:hunter22@h/0")

    assert "hunter22" not in json.dumps(as_json([result], target, seed=1))


def _flaky(results: list[bool]) -> Case:
    left = iter(results)

    async def body(trial: Trial) -> None:
        """Pass or fail, one after another."""
        trial.that(next(left), "PUB-1", "a pass", "a failure")

    return Case("pub.flaky", ("PUB-1",), MUST, Tier.CORE, "A promise.", body)


def test_a_failure_in_any_round_is_never_erased() -> None:
    """One failure of five is UNSTABLE, and keeps the target from being conformant; none is a pass."""
    [wavering] = run_cases([_flaky([True, True, False, True, True])], TARGET, rounds=5)
    [steady] = run_cases([_flaky([True] * 3)], TARGET, rounds=3)
    [broken] = run_cases([_flaky([False] * 3)], TARGET, rounds=3)

    assert wavering.verdict is Verdict.UNSTABLE
    assert "passed 4 of 5" in wavering.reason
    assert not conformant([wavering.judged, steady.judged])
    assert [steady.verdict, broken.verdict] == [Verdict.CONFORMS, Verdict.VIOLATION]


def test_nothing_runs_beside_a_case_that_strikes_the_broker() -> None:
    """With many cases at once, one that has a hook of the broker runs when all others have ended, and by itself."""
    running: set[str] = set()
    beside: dict[str, set[str]] = {}

    def made(name: str, *facilities: str) -> Case:
        async def body(trial: Trial) -> None:
            """Note who else is running."""
            running.add(name)
            beside[name] = set(running)
            await asyncio.sleep(0.01)
            beside[name] |= running
            running.remove(name)

        return Case(name, ("PUB-1",), MUST, Tier.CORE, "A promise.", body, frozenset(facilities))

    striking = [made("dur.one", "hook:restart"), made("dur.two", "hook:kill9")]
    target = replace(TARGET, virtual=False, hooks={"restart": "true", "kill9": "true"})
    list(run_cases([*striking, *(made(f"pub.{number}") for number in range(8))], target, jobs=4))

    assert len(beside) == 10
    assert {name: beside[name] for name in ("dur.one", "dur.two")} == {"dur.one": {"dur.one"}, "dur.two": {"dur.two"}}
    assert any(len(names) > 1 for names in beside.values())


def test_what_builds_on_a_failed_foundation_is_blocked() -> None:
    """With a backend that stores nothing, one failure is reported and the rest is BLOCKED, not failed."""
    cases = load_cases().select(only=["ack", FOUNDATIONS[0], "cfg"])
    with harm(load_saboteurs()["swallow-publish"], TARGET) as harmed:
        found = {result.case.id: result.verdict for result in run_cases(cases, harmed)}

    assert found[FOUNDATIONS[0]] is Verdict.VIOLATION
    assert found["ack.double"] is Verdict.BLOCKED
    assert found["cfg.require"] is Verdict.CONFORMS


def _list(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "exclude.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_excluded_case_still_runs_and_must_fail(tmp_path: Path) -> None:
    """One that passes although it is excluded is STALE and fails the run."""
    path = _list(tmp_path, f'[[exclude]]\ncase = "ack.double"\nreason = "bug"\nissue = "x/1"\n{FAR}\n')

    code, said = _run("memory://x", "--only", "ack.double", "--only", "cfg.require", "--exclude", str(path))

    assert code == 1
    assert "take it off the list" in said


def test_an_excluded_failure_is_told_and_never_a_pass(tmp_path: Path) -> None:
    """The verdict is EXCLUDED, `conformant` is false, and `conformant_except` names the case."""
    registry = load_cases()
    path = _list(tmp_path, f'[[exclude]]\ncase = "nack.delay"\nreason = "cannot"\nissue = "x/1"\n{FAR}\n')
    entries = load_exclusions(path, registry, date(2026, 1, 1))
    cases = registry.select(only=["nack.delay", "ack.double"])
    with harm(load_saboteurs()["ignore-delay"], TARGET) as harmed:
        report = as_json(list(run_cases(cases, harmed, exclusions=entries)), TARGET, seed=1)

    assert report["counts"]["EXCLUDED"] == 1
    assert not report["conformant"]
    assert report["conformant_except"] == ["nack.delay"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'[[exclude]]\ncase = "no.such"\nreason = "bug"\nissue = "x"\n{FAR}\n', "no such case"),
        ('[[exclude]]\ncase = "ack.double"\nreason = "bug"\nissue = "x"\nexpires = 2020-01-01\n', "expired"),
        (f'[[exclude]]\ncase = "ack.double"\nreason = "lazy"\nissue = "x"\n{FAR}\n', "must be one of"),
        (f'[[exclude]]\ncase = "ack.double"\nreason = "bug"\n{FAR}\n', "each"),
        ('[[exclude]]\ncase = "ack.double"\nreason = "bug"\nissue = "x"\nexpires = "soon"\n', "must be a date"),
        ("skip = 1\n", "only tables"),
    ],
)
def test_a_list_of_exclusions_is_held_to_its_word(tmp_path: Path, text: str, words: str) -> None:
    """Unknown, expired and incomplete entries are errors."""
    with pytest.raises(ValueError, match=words):
        load_exclusions(_list(tmp_path, text), load_cases(), date(2026, 1, 1))


def test_cleaning_up_takes_only_what_the_suite_made() -> None:
    """Topics of the suite with that prefix go, everything else stays, and a foreign prefix is refused."""

    target = replace(TARGET, url="memory://cleanup", virtual=False)

    async def prepare() -> None:
        async with target.connect() as client:
            for name in ("us-0123abcd-left-t1", "us-east-orders", "orders"):
                await client.create_topic(name)

    async def names() -> list[str]:
        async with target.connect() as client:
            return [topic.name for topic in await client.topics()]

    asyncio.run(prepare())
    assert cleanup(target, "us-", delete=False) == ["us-0123abcd-left-t1"]
    assert cleanup(target, "us-") == ["us-0123abcd-left-t1"]
    assert asyncio.run(names()) == ["orders", "us-east-orders"]
    assert not OURS.match("us-east-orders")
    with pytest.raises(ValueError, match="somebody else"):
        cleanup(target, "ord")
