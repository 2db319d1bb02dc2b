"""Collects the commands, and turns errors into one line and an exit code."""

from __future__ import annotations

import sys

import typer

from unistream.cli import conform, consume, demo, publish, topics
from unistream.errors import ConfigError, UnistreamError, UnsupportedError

__all__ = ["app", "run"]

USAGE = 2
FAILED = 1
INTERRUPTED = 130

app = typer.Typer(
    help="One messaging interface, the same promises on every broker.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo.demo)
app.command()(publish.publish)
app.command()(consume.consume)
app.command("topics")(topics.topics)
app.command("groups")(topics.groups)
app.add_typer(conform.app, name="conform")


def run() -> int:
    """
    Run the command line.

    Returns:
        0: done. 1: the broker or the data said no. 2: the call was wrong, or asks what the backend does not offer.
        130: interrupted.
    """
    try:
        # A command ends with `typer.Exit`, whose code comes back as a result.
        return app(standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except UnistreamError as error:
        sys.stderr.write(f"unistream: {error}\n")
        return USAGE if isinstance(error, (ConfigError, UnsupportedError)) else FAILED
    except Exception as error:
        # What click raises for wrong usage knows how to show itself; anything else is a defect and keeps its trace.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return USAGE
