"""An adapter of a third party is found, works, and is judged, in an environment that knows nothing of this tree."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_driver"


@pytest.mark.timeout(300)
def test_third_party_driver_passes_the_smoke_tier(fresh: Callable[..., Path], tmp_path: Path) -> None:
    """Installed beside the wheel, found by its entry point, the example conforms."""
    programs = fresh(str(EXAMPLE), "typer", "rich")
    report = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UNISTREAM", "PYTHON"))}

    judged = subprocess.run(
        [programs / "unistream", "conform", f"sqlite:///{tmp_path}/queue.db", "--profile", "smoke", "--json", report],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )

    assert judged.returncode == 0, judged.stdout + judged.stderr
    verdicts = {case["id"]: case["verdict"] for case in json.loads(report.read_text())["cases"]}
    assert "CONFORMS" in verdicts.values()
    assert not set(verdicts.values()) & {"VIOLATION", "UNVERIFIED", "ERROR", "UNSTABLE"}
