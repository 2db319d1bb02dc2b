"""Knows how a report is told to a build server: JUnit's XML, one test case for each case of the suite."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from unistream.conformance.terminal import Report, words
from unistream.conformance.verdict import Verdict

PASSES = frozenset({Verdict.CONFORMS, Verdict.UNDERCLAIMED})
SKIPS = frozenset({Verdict.ABSENT, Verdict.INAPPLICABLE, Verdict.UNVERIFIED, Verdict.BLOCKED, Verdict.EXCLUDED})
"""Never passes: shown as skipped, with the verdict and its reason."""
COMPLETE = "conformance.complete"


def junit(report: Report, *, require_complete: bool = False) -> str:
    """
    Return a report as JUnit's XML.

    Args:
        report: The canonical form.
        require_complete: Add a failing test case `conformance.complete` if anything was not verified. JUnit has no
            word for that, and a reader who counts failures would take it for a pass.
    """
    suite = Element("testsuite", name=f"unistream conformance of {report['target']}", timestamp=report["at"])
    properties = SubElement(suite, "properties")
    for name in ("target", "product", "driver", "suite", "profile", "seed", "conformant"):
        SubElement(properties, "property", name=name, value=str(report[name]))
    for name, claim in report["claims"].items():
        SubElement(properties, "property", name=f"claim.{name}", value=claim)
    for case in report["cases"]:
        _add(suite, case)
    open_cases = [each["id"] for each in report["cases"] if each["verdict"] in (Verdict.UNVERIFIED, Verdict.BLOCKED)]
    if require_complete and open_cases:
        complete = SubElement(suite, "testcase", classname="conformance", name=COMPLETE, time="0")
        SubElement(complete, "failure", message=f"not verified: {', '.join(open_cases)}")
    for kind in ("failure", "error", "skipped"):
        plural = {"failure": "failures", "error": "errors", "skipped": "skipped"}[kind]
        suite.set(plural, str(len(suite.findall(f"testcase/{kind}"))))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("time", str(report["seconds"]))
    indent(suite)
    text: str = tostring(suite, encoding="unicode", xml_declaration=True)
    return text + "\n"


def _add(suite: Element, case: Any) -> None:
    verdict = Verdict(case["verdict"])
    entry = SubElement(
        suite, "testcase", classname=case["id"].partition(".")[0], name=case["id"], time=str(case["seconds"])
    )
    message = _legal(f"{verdict}: {case['reason'] or case['promise']}")
    if verdict in SKIPS:
        SubElement(entry, "skipped", message=message)
    elif verdict not in PASSES:
        told = SubElement(entry, "error" if verdict is Verdict.ERROR else "failure", message=message)
        rows = [case["promise"], f"rule {case['rule']}"]
        rows += [f"{each['rule']} {each['checker']}: {each['message']}" for each in case["violations"]]
        rows += [words(event) for each in case["violations"] for event in each["events"]]
        told.text = _legal("\n".join(rows))


def _legal(text: str) -> str:
    """Return the text without the characters that XML does not have."""
    return "".join(each if each in "\t\n" or " " <= each < "\ud800" or each > "\udfff" else "�" for each in text)
