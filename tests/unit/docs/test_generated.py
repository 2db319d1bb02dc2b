"""The generated parts of the pages are what the reports say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_pages_say_what_the_reports_observed() -> None:
    """README and backend pages are what `python docs/generate.py` writes from docs/conformance."""
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["generated"]()

    stale = [str(path.relative_to(ROOT)) for path, text in pages.items() if path.read_text() != text]
    assert len(pages) > 1
    assert stale == [], "run: python docs/generate.py"
