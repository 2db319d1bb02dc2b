"""The command `unistream`; one small module per command. Needs the extra `cli` (typer, rich)."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from unistream.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the command line needs {error.name!r}: install unistream-mq with its extra `cli`")
    sys.exit(run())
