"""The page of a report, as a browser shows it."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.brokers.broker import BrokerError
from tests.brokers.install import apt_install, system_program
from tests.suite.bad_reports import report_of
from unistream.conformance.page import page

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def chromium() -> str:
    """A browser: Debian's, installed when it is absent and may be."""
    try:
        apt_install("chromium", program="chromium")
    except BrokerError as error:
        pytest.fail(f"the page can't be checked: {error}", pytrace=False)
    program = system_program("chromium")
    assert program is not None
    return program


def _browse(program: str, profile: Path, *arguments: str) -> str:
    command = [program, *QUIET, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about a good target and two bad ones."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page([report_of(), report_of("overtake"), report_of("drop-on-nack")]), encoding="utf-8")
    return path


@pytest.mark.timeout(300)
def test_a_browser_shows_the_matrix_the_failures_and_their_timelines(
    chromium: str, written: Path, tmp_path: Path
) -> None:
    """A script-free page is rendered: three targets, a row for each case, linked failures with drawings, no request."""
    # The page measures itself: only a browser that laid it out knows these numbers.
    measured = tmp_path / "measured.html"
    probe = (
        "<script>addEventListener('load',()=>{const q=s=>document.querySelectorAll(s);"
        "const dead=[...q('a[href^=\"#\"]')].filter(a=>!document.getElementById(a.getAttribute('href').slice(1)));"
        "const flat=[...q('svg.timeline')].filter(s=>s.getBoundingClientRect().height<40);"
        "const out=document.documentElement.scrollWidth>innerWidth;"
        "document.title=['MEASURED',q('.summary').length,q('table.matrix tbody tr:not(.group)').length,"
        "q('svg.timeline .loan').length,dead.length,flat.length,out,"
        "performance.getEntriesByType('resource').length].join(' ')})</script>"
    )
    measured.write_text(written.read_text(encoding="utf-8") + probe, encoding="utf-8")

    shown = _browse(chromium, tmp_path / "profile", "--window-size=1200,900", "--dump-dom", measured.as_uri())

    found = re.search(r"<title>MEASURED (\d+) (\d+) (\d+) (\d+) (\d+) (\w+) (\d+)</title>", shown)
    assert found, shown[:500]
    summaries, rows, loans, dead_links, flat, too_wide, requests = found.groups()
    assert (summaries, rows) == ("3", str(len(report_of()["cases"])))
    assert int(loans) > 10
    assert (dead_links, flat, too_wide, requests) == ("0", "0", "false", "0")


@pytest.mark.timeout(300)
def test_a_screenshot_has_the_colours_of_success_and_failure(chromium: str, written: Path, tmp_path: Path) -> None:
    """What is drawn is a picture of some size, not an empty window."""
    picture = tmp_path / "page.png"

    _browse(chromium, tmp_path / "profile", "--window-size=1200,2400", f"--screenshot={picture}", written.as_uri())

    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 60_000


def test_the_page_stands_alone(written: Path) -> None:
    """It refers to nothing outside itself, and has no script."""
    references: list[str] = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            references.extend(value or "" for name, value in attributes if name in ("href", "src", "action", "data"))
            assert tag not in ("script", "link", "iframe", "img", "object")

    text = written.read_text(encoding="utf-8")
    Finder().feed(text)

    assert references
    assert all(each.startswith("#") for each in references)
    assert "url(" not in text
    assert "@import" not in text


def test_the_summary_says_in_plain_words_what_is_broken() -> None:
    """A backend that breaks the order of keys is said to do that, and nothing else of what it keeps."""
    text = page([report_of("overtake")])

    assert "The order of messages with the same key is NOT kept." in text
    assert "Confirmed messages can be lost." not in text


def test_what_a_target_says_cannot_become_markup() -> None:
    """Texts from a target are shown as text."""
    report = {**report_of("drop-on-nack"), "product": "<script>alert(1)</script>"}

    assert "<script>" not in page([report])
