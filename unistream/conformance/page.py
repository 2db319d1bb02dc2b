"""Knows how reports are told on one page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from unistream.conformance.plainly import answers, experience
from unistream.conformance.terminal import Report, duration, level, words
from unistream.conformance.timeline import timeline
from unistream.conformance.verdict import Verdict

SIGNS = {
    Verdict.CONFORMS: "✔",
    Verdict.VIOLATION: "✘",
    Verdict.UNVERIFIED: "?",
    Verdict.UNDERCLAIMED: "+",
    Verdict.ABSENT: "–",
    Verdict.INAPPLICABLE: "/",
    Verdict.ERROR: "!",
    Verdict.UNSTABLE: "~",
    Verdict.BLOCKED: "▪",
    Verdict.EXCLUDED: "×",
    Verdict.STALE: "≠",
}
MEANINGS = {
    Verdict.CONFORMS: "the promise is kept",
    Verdict.VIOLATION: "a promise is broken",
    Verdict.UNVERIFIED: "nobody knows: not run, or nothing happened in it",
    Verdict.UNDERCLAIMED: "it works and is not claimed",
    Verdict.ABSENT: "not offered, and refused as it must be",
    Verdict.INAPPLICABLE: "cannot exist for this target",
    Verdict.ERROR: "the suite or its environment failed",
    Verdict.UNSTABLE: "passed and failed; counts as broken",
    Verdict.BLOCKED: "not run, because what it builds on failed",
    Verdict.EXCLUDED: "failed, as a list of exclusions says",
    Verdict.STALE: "excluded, and yet it passes",
}
TOLD = frozenset({Verdict.VIOLATION, Verdict.UNSTABLE, Verdict.ERROR, Verdict.UNVERIFIED, Verdict.EXCLUDED})


def page(reports: Sequence[Report]) -> str:
    """
    Return a page about one or more reports: a summary of each, all cases × all targets, and every failure.

    Raises:
        ValueError: There is no report.
    """
    if not reports:
        raise ValueError("a page needs at least one report")
    style = files("unistream.conformance").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join((*_summaries(reports), *_matrix(reports), *_claims(reports), *_failures(reports)))
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Conformance: {escape(', '.join(_name(report) for report in reports))}</title>\n"
        f"<style>\n{style}</style>\n<main>\n<h1>Conformance</h1>\n{body}\n</main>\n</html>\n"
    )


def _name(report: Report) -> str:
    return str(report["product"] or report["target"])


def _summaries(reports: Sequence[Report]) -> Iterator[str]:
    for number, report in enumerate(reports):
        if report["conformant"]:
            state, word = "kept", "Conformant"
        elif report["conformant_except"]:
            state, word = "broken", f"Conformant except {', '.join(report['conformant_except'])}"
        else:
            state, word = "broken", f"Not conformant: {len(report['obstacles'])} of its promises"
        tiers = " · ".join(f"{name} {tier['kept']}/{tier['asked']}" for name, tier in report["tiers"].items())
        yield f'<section class="summary" id="target-{number}">'
        yield f'<h2>{escape(_name(report))} <span class="badge {state}">{escape(word)}</span></h2>'
        yield (
            f'<p class="facts">{escape(report["target"])} · {tiers} · seed {report["seed"]} · '
            f"{duration(report['seconds'])}{' on a virtual clock' if report['virtual_clock'] else ''} · "
            f"suite {escape(report['suite'])} · {escape(report['at'])}</p>"
        )
        done = experience(report)
        if done:
            yield f"<p>In this run: {done}.</p>"
        yield '<ul class="answers">'
        for stands, sentence, cases in answers(report):
            links = ", ".join(f'<a href="#{_anchor(number, case)}">{case}</a>' for case in cases)
            sign = {"kept": "✔", "broken": "✘", "unverified": "?", "absent": "–"}[stands]
            where = f" See {links}." if links else ""
            yield f'<li class="{stands}"><b>{sign}</b> <span>{escape(sentence)}{where}</span></li>'
        yield "</ul>"
        if report["leftovers"]:
            yield f'<p class="left">Left behind on the broker: {escape(", ".join(report["leftovers"]))}</p>'
        yield "</section>"


def _matrix(reports: Sequence[Report]) -> Iterator[str]:
    yield "<section><h2>Cases × targets</h2>"
    used = dict.fromkeys(case["verdict"] for report in reports for case in report["cases"])
    yield '<p class="legend">'
    for verdict in (each for each in Verdict if each in used):
        yield f'<span><i class="cell {verdict.lower()}">{SIGNS[verdict]}</i> {verdict}: {MEANINGS[verdict]}</span>'
    yield '<span><i class="cell conforms native">✔</i> by the broker itself (native)</span>'
    yield '<span><i class="cell conforms emulated">✔</i> by the adapter (emulated)</span>'
    yield '<span><i class="cell absent">–</i> not offered (absent)</span></p>'
    yield '<table class="matrix"><thead><tr><th>case</th><th>promise</th><th>level</th>'
    yield "".join(f'<th class="target">{escape(_name(report))}</th>' for report in reports) + "</tr></thead>"
    columns = [{case["id"]: case for case in report["cases"]} for report in reports]
    ids = dict.fromkeys(case["id"] for report in reports for case in report["cases"])
    group = ""
    for name in sorted(ids, key=lambda each: list(ids).index(each)):
        if name.partition(".")[0] != group:
            group = name.partition(".")[0]
            yield f'<tbody><tr class="group"><th colspan="{3 + len(reports)}">{group}</th></tr>'
        first = next(column[name] for column in columns if name in column)
        cells = "".join(_cell(number, column.get(name)) for number, column in enumerate(columns))
        yield (
            f"<tr><th>{name}</th><td>{escape(first['promise'])}</td>"
            f'<td class="level">{escape(_binding(first))}<br>{", ".join(first["rules"])}</td>{cells}</tr>'
        )
    yield "</table></section>"


def _binding(case: Report) -> str:
    needs = ", ".join(name if need == "True" else f"{name}={need}" for name, need in case["needs"].items())
    return f"{case['level']} if {needs}" if needs else str(case["level"])


def _cell(number: int, case: Report | None) -> str:
    if case is None:
        return '<td class="cell none" title="not run">·</td>'
    verdict = Verdict(case["verdict"])
    support = case["support"] if case["needs"] else "native"
    sign = SIGNS[verdict]
    title = escape(f"{case['id']}: {verdict}, {support}. {case['reason']}".strip())
    if verdict in TOLD:
        sign = f'<a href="#{_anchor(number, case["id"])}">{sign}</a>'
    return f'<td class="cell {verdict.lower()} {support}" title="{title}">{sign}</td>'


def _claims(reports: Sequence[Report]) -> Iterator[str]:
    names = dict.fromkeys(name for report in reports for name in report["claims"])
    if not names:
        return
    yield '<section><h2>What each target claims</h2><table class="claims"><thead><tr><th>capability</th>'
    yield "".join(f"<th>{escape(_name(report))}</th>" for report in reports) + "</tr></thead><tbody>"
    for name in names:
        cells = []
        for report in reports:
            claim = report["claims"].get(name, "")
            kind = claim.partition(",")[0]
            cells.append(
                f'<td><span class="claim {escape(kind)}">{escape(kind)}</span>{escape(claim[len(kind) :])}</td>'
            )
        yield f"<tr><th>{name}</th>{''.join(cells)}</tr>"
    yield "</tbody></table></section>"


def _failures(reports: Sequence[Report]) -> Iterator[str]:
    failed = [
        (number, report, case)
        for number, report in enumerate(reports)
        for case in report["cases"]
        if case["verdict"] in TOLD
    ]
    if not failed:
        return
    yield "<h2>What went wrong</h2>"
    if any(case["timeline"] for _, _, case in failed):
        yield (
            '<p class="legend"><span>bar: a delivery while it is lent</span><span>band: a fault</span>'
            "<span>▲ published</span><span>▼ delivered</span><span>✔ acked</span><span>▬ nacked</span>"
            "<span>✕ rejected or died</span><span>◆ lease lost</span><span>ring: what the checker points at</span>"
            "<span>pale: refused, or nobody knows</span></p>"
        )
    for number, report, case in failed:
        yield from _failure(number, report, case)


def _failure(number: int, report: Report, case: Report) -> Iterator[str]:
    yield f'<section class="failure" id="{_anchor(number, case["id"])}">'
    yield (
        f'<h3>{case["id"]} <span class="badge broken">{case["verdict"]}</span> '
        f"<small>{escape(_name(report))} · {escape(level(case))} · {', '.join(case['rules'])}</small></h3>"
    )
    yield f"<p>{escape(case['promise'])}</p>"
    if case["attempts"]:
        yield f"<p>Attempts: {', '.join(case['attempts'])}</p>"
    if case["expected"]:
        yield "<dl>"
        yield f"<dt>{case['rule']} expected</dt><dd>{escape(case['expected'])}</dd>"
        yield f"<dt>actual</dt><dd>{escape(case['actual'])}</dd></dl>"
    elif not case["violations"]:
        yield f"<pre>{escape(case['reason'])}</pre>"
    for violation in case["violations"]:
        yield f"<p><b>{violation['rule']}</b> {escape(violation['message'])} <small>{violation['checker']}</small></p>"
        if violation["events"]:
            rows = "".join(f"<li>{escape(words(event))}</li>" for event in violation["events"])
            yield f'<ol class="events">{rows}</ol>'
    yield timeline(case["timeline"], case["lasted"])
    command = f"unistream conform {report['target']} --only {case['id']} --seed {case['seed']}"
    yield f"<p>Again: <code>{escape(command)}</code></p></section>"


def _anchor(number: int, case: str) -> str:
    return f"case-{number}-{case}"
