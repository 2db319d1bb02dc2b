"""Commands of the conformance suite: judge a backend, compare and show reports, test the suite itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from unistream.conformance import command
from unistream.conformance import storm as storms
from unistream.conformance.hooks import HOOKS
from unistream.conformance.plan import SHAPES, Shape
from unistream.conformance.registry import PROFILES
from unistream.conformance.rounds import JOBS
from unistream.conformance.target import Target
from unistream.errors import UnistreamError

__all__ = ["app"]


class _JudgesByDefault(TyperGroup):
    """A group of commands in which what is no command is the URL to judge."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` before what is no command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_JudgesByDefault,
    no_args_is_help=True,
    help="Judge a backend: `unistream conform URL`. Exit code 0: conformant, 1: not, 2: wrong call, or no preflight.",
)

UrlArgument = Annotated[str, typer.Argument(metavar="URL", help="The backend to judge.")]
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn.")]
ShapeOption = Annotated[list[str] | None, typer.Option(help=f"{', '.join(SHAPES)}; may repeat; all of them.")]
HookOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=COMMAND", help=f"Acts on the broker: {', '.join(HOOKS)}.")
]


def _carry_out(what: Callable[[], int]) -> None:
    """Leave with the exit code of a command; what was called wrongly, or can't be judged, is 2."""
    try:
        code = what()
    except (ValueError, UnistreamError) as error:
        sys.stderr.write(f"unistream conform: {error}\n")
        code = command.WRONG_CALL
    raise typer.Exit(code)


@app.command("run")
def run(
    url: UrlArgument,
    profile: Annotated[str, typer.Option(help=f"Which tiers: {', '.join(PROFILES)}.")] = "core",
    only: Annotated[list[str] | None, typer.Option(help="Id or group of cases instead; may repeat.")] = None,
    seed: SeedOption = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Cases at once on a real broker.")] = JOBS,
    rounds: Annotated[int, typer.Option(min=1, help="How often each case runs.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the JSON report, or - to print it.")] = None,
    junit: Annotated[Path | None, typer.Option(help="File for JUnit's XML.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for the page.")] = None,
    histories: Annotated[Path | None, typer.Option(help="Folder for the histories of failed cases.")] = None,
    hook: HookOption = None,
    exclude: Annotated[Path | None, typer.Option(help="TOML list of cases that are known to fail.")] = None,
    strict_claims: Annotated[bool, typer.Option("--strict-claims", help="What works unclaimed fails.")] = False,
    require_complete: Annotated[
        bool, typer.Option("--require-complete", help="What was not verified fails, whoever it binds.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would run.")] = False,
) -> None:
    """Judge a backend (the default: `unistream conform URL`)."""
    _carry_out(
        lambda: command.conform(
            url,
            command.Order(
                profile=profile,
                only=only or (),
                seed=seed,
                jobs=jobs,
                rounds=rounds,
                json=json,
                junit=junit,
                html=html,
                histories=histories,
                exclude=exclude,
                hooks=_hooks(hook or []),
                strict_claims=strict_claims,
                require_complete=require_complete,
                dry_run=dry_run,
            ),
        )
    )


@app.command("diff")
def diff(before: Annotated[Path, typer.Argument()], after: Annotated[Path, typer.Argument()]) -> None:
    """Say what changed between two JSON reports; exit code 1 if something was lost."""
    _carry_out(lambda: command.diff(before, after))


@app.command("page")
def page(
    reports: Annotated[list[Path], typer.Argument(help="JSON reports, a column for each.")],
    out: Annotated[Path, typer.Option(help="File for the page.")],
) -> None:
    """Write one page about several JSON reports."""
    _carry_out(lambda: command.render(reports, out))


@app.command("sim")
def sim(
    url: UrlArgument,
    seeds: Annotated[str, typer.Option(help="N or FIRST:LAST.")] = "20",
    shape: ShapeOption = None,
    messages: Annotated[int, typer.Option(min=1, help="Per run.")] = 60,
    keep: Annotated[Path | None, typer.Option(help="Folder for plans and histories that break a rule.")] = None,
) -> None:
    """Run random workloads with faults: short plans, drawn from seeds, that can be replayed."""
    _carry_out(
        lambda: command.sim(
            url, seeds=command.seeds_of(seeds), shapes=_shapes(shape or []), messages=messages, keep=keep
        )
    )


@app.command("storm")
def storm(
    url: UrlArgument,
    shape: ShapeOption = None,
    messages: Annotated[int, typer.Option(min=1, help="To publish at least.")] = 100_000,
    faults: Annotated[int, typer.Option(min=0, help="At least so many.")] = 50,
    minutes: Annotated[float, typer.Option(min=0, help="At least so long, each storm.")] = 0.0,
    calm: Annotated[float, typer.Option(min=0.1, help="Most seconds between two faults.")] = 1.0,
    seed: SeedOption = 1,
    keep: Annotated[Path | None, typer.Option(help="Folder for the histories.")] = None,
    hook: HookOption = None,
) -> None:
    """Run one long workload of each shape on a real broker, its members processes, under faults of every kind."""
    _carry_out(
        lambda: storms.run(
            Target.of(url, hooks=_hooks(hook or [])),
            shapes=_shapes(shape or []),
            messages=messages,
            faults=faults,
            minutes=minutes,
            calm=calm,
            seed=seed,
            keep=keep,
        )
    )


@app.command("replay")
def replay(
    plan: Annotated[Path, typer.Argument(help="A plan that `sim --keep` kept.")],
    url: Annotated[str, typer.Option(help="Where.")] = "memory://conformance",
) -> None:
    """Carry out a plan that was kept, and judge it again."""
    _carry_out(lambda: command.replay(url, plan))


@app.command("shrink")
def shrink(
    plan: Annotated[Path, typer.Argument(help="A plan that breaks a rule.")],
    out: Annotated[Path, typer.Option(help="File for the small plan.")],
    url: Annotated[str, typer.Option(help="Where.")] = "memory://conformance",
    tries: Annotated[int, typer.Option(min=1, help="Runs of each smaller plan, where runs differ.")] = 1,
) -> None:
    """Make a plan that breaks a rule as small as it can be."""
    _carry_out(lambda: command.shrink(url, plan, out, tries=tries))


@app.command("kill")
def kill(
    url: Annotated[str, typer.Option(help="A good backend.")] = "memory://conformance",
    on: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A real broker, for what can't be tried there; may repeat.")
    ] = None,
    hook: HookOption = None,
    saboteur: Annotated[list[str] | None, typer.Option(help="Only this one; may repeat.")] = None,
    profile: Annotated[str, typer.Option(help="Which tiers.")] = "long",
    only: Annotated[list[str] | None, typer.Option(help="Id or group of cases instead; may repeat.")] = None,
    seed: SeedOption = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="Saboteurs at once.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the whole matrix.")] = None,
    assertions: Annotated[
        bool, typer.Option("--assertions", help="Remove each assertion of each checker, and see who then lives.")
    ] = False,
) -> None:
    """Prove that the suite notices broken promises: the kill matrix."""
    if assertions:
        _carry_out(lambda: command.weaken(url, names=saboteur or (), profile=profile, seed=seed))
    _carry_out(
        lambda: command.kill(
            url,
            on=on or (),
            hooks=_hooks(hook or []),
            names=saboteur or (),
            profile=profile,
            only=only or (),
            seed=seed,
            jobs=jobs,
            out=json,
        )
    )


@app.command("cleanup")
def cleanup(
    url: UrlArgument,
    prefix: Annotated[str, typer.Option(help="Of the topics to delete; begins with us-.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
) -> None:
    """Delete what runs of the suite left behind on a broker."""
    _carry_out(lambda: command.clean(url, prefix, dry_run=dry_run))


def _shapes(given: list[str]) -> list[Shape]:
    unknown = set(given) - set(SHAPES)
    if unknown:
        raise ValueError(f"unknown shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    return cast("list[Shape]", given or list(SHAPES))


def _hooks(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    wrong = [name for name, _, words in pairs if name not in HOOKS or not words]
    if wrong:
        raise ValueError(f"--hook wants NAME=COMMAND, NAME one of {', '.join(HOOKS)}; not {wrong}")
    return {name: words for name, _, words in pairs}
