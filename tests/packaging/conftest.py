"""A wheel built once, and environments that have nothing but it."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)], check=True
    )
    [built] = out.glob("*.whl")
    return built


@pytest.fixture
def fresh(tmp_path: Path, wheel: Path) -> Callable[..., Path]:
    """Make an environment with the wheel, and whatever else is named, and return its folder of programs."""

    def make(*requirements: str) -> Path:
        venv.create(tmp_path / "env", with_pip=True)
        programs = tmp_path / "env" / "bin"
        subprocess.run([programs / "pip", "install", "--quiet", str(wheel), *requirements], check=True)
        return programs

    return make
