"""The command line of ``benchmarks/learning.py``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from speed_parts.report import WIDTH
from speed_parts.trl_process import default_directory, make_environment

from learning_parts.curves import run_all, run_one
from learning_parts.figure import draw
from learning_parts.protocol import OURS, RACERS, TRL, TRL_ALLOCATOR, Engine, Protocol, Run, curve_engines
from learning_parts.race import run_seeds
from learning_parts.results import ResultError, curves_in, races_in
from learning_parts.tables import Table, curve_table, described, finished, race_table
from tokenmdp.files import write_text
from tokenmdp.runs.settings import parse_options

SMOKE = {"updates": 2, "episodes": 8}
START, END = "<!-- made by benchmarks/learning.py report -->", "<!-- end -->"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments, Console())
    except (ResultError, ValueError) as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="learning.py", description="Our PPO beside TRL's on the bundled models; benchmarks/README.md explains it."
    )
    commands = parser.add_subparsers(required=True)

    curves = commands.add_parser("curves", help="learning curves, each run a process of its own")
    curves.add_argument("--engines", nargs="+", help="default trl, ours and every --variant")
    curves.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("LABEL", "NAME=VALUE"),
        help="ours with other fields of PPOConfig, as engine ours-LABEL; may be repeated",
    )  # fmt: skip
    curves.add_argument("--updates", type=int, default=60)
    curves.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    curves.add_argument("--threads", type=int, default=1, help="of each run; default 1")
    curves.add_argument("--jobs", type=int, default=2, help="runs at a time; default 2")
    curves.set_defaults(run=run_curves)

    clock = commands.add_parser("time", help="seconds until a mean score is reached, all sides in turn in one call")
    clock.add_argument(
        "--sides", nargs="+", choices=list(RACERS), help=f"default all but {TRL_ALLOCATOR}; the first is compared with"
    )
    clock.add_argument("--targets", type=float, nargs="+", default=[2.5, 3.0], help="default 2.5 3.0")
    clock.add_argument("--max-updates", type=int, dest="updates", default=100, help="of a side; default 100")
    clock.add_argument("--seeds", type=int, nargs="+", default=[1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    clock.add_argument("--threads", type=int, default=cores, help="of every side; default all cores")
    clock.set_defaults(run=run_time)

    for command in (curves, clock):
        command.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE", help="PPOConfig fields of ours")
        command.add_argument("--episodes", type=int, default=64, help="per update; default 64")
        command.add_argument("--trl-venv", type=Path, default=default_directory(), help="made if it is not there")
        command.add_argument("--no-reexec", action="store_true", help="keep the system's allocator settings")
        command.add_argument("--smoke", action="store_true", help="2 updates of 8 episodes; TRL only if named")

    report = commands.add_parser("report", help="tables and figure of what the other commands wrote")
    report.add_argument("--figure", type=Path, help="PNG of the curves; default learning.png in --out")
    report.add_argument("--into", type=Path, help=f"a page to put the tables into, between {START} and {END}")
    report.add_argument("--no-reexec", action="store_true", help=argparse.SUPPRESS)
    report.set_defaults(run=run_report)
    for command in (curves, clock, report):
        command.add_argument("--out", type=Path, default=Path("runs/learning"), help="default runs/learning")

    one = commands.add_parser("run", help="one run of curves, as curves starts it")
    one.add_argument("order", type=json.loads)
    one.add_argument("--no-reexec", action="store_true", help=argparse.SUPPRESS)
    one.set_defaults(run=lambda arguments, console: run_one(arguments.order))
    return parser


def run_curves(arguments: argparse.Namespace, console: Console) -> int:
    config = parse_options(arguments.config, "--config")
    variants = {label: parse_options(options, "--config") for label, *options in arguments.variant}
    engines = curve_engines(config, variants)
    if unknown := [name for name in arguments.engines or () if name not in engines]:
        raise ValueError(
            f"--engines {unknown[0]} is not one of {', '.join(engines)}; --variant LABEL adds {OURS}-LABEL"
        )
    default = [name for name in engines if not (arguments.smoke and name == TRL)]
    chosen = [engines[name] for name in arguments.engines or default]
    seeds = arguments.seeds[:1] if arguments.smoke else arguments.seeds
    # Seeds outside: an interrupted command leaves whole pairs.
    runs = [Run(engine, protocol_from(arguments), seed) for seed in seeds for engine in chosen]
    prepare(chosen, arguments, console)
    if failed := run_all(runs, arguments.out, arguments.jobs, arguments.trl_venv, console):
        console.print(f"failed: {', '.join(failed)}", markup=False)
        return 1
    return run_report(argparse.Namespace(out=arguments.out, figure=None, into=None), console)


def run_time(arguments: argparse.Namespace, console: Console) -> int:
    config = parse_options(arguments.config, "--config")
    default = [name for name in RACERS if name != TRL_ALLOCATOR and not (arguments.smoke and RACERS[name].is_trl)]
    chosen = [RACERS[name] for name in arguments.sides or default]
    engines = {
        engine.name: engine if engine.is_trl else Engine(engine.name, engine.credit, engine.fields | config)
        for engine in chosen
    }
    prepare(list(engines.values()), arguments, console)
    torch.set_num_threads(arguments.threads)
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"the load is {load:.1f}: other programs are running and will be in the seconds", style="yellow")
    protocol = protocol_from(arguments)
    run_seeds(engines, protocol, sorted(arguments.targets), arguments.seeds, arguments.out, arguments.trl_venv, console)
    return run_report(argparse.Namespace(out=arguments.out, figure=None, into=None), console)


def protocol_from(arguments: argparse.Namespace) -> Protocol:
    numbers: dict[str, Any] = {"updates": arguments.updates, "episodes": arguments.episodes}
    return Protocol(**numbers | (SMOKE if arguments.smoke else {}), threads=arguments.threads)


def prepare(engines: Sequence[Engine], arguments: argparse.Namespace, console: Console) -> None:
    """Check what can fail before anything is run: our fields and TRL's virtual environment."""
    for engine in engines:
        engine.config(protocol_from(arguments), seed=1)
    if any(engine.is_trl for engine in engines):
        make_environment(arguments.trl_venv)


def run_report(arguments: argparse.Namespace, console: Console) -> int:
    curves, races = curves_in(arguments.out), races_in(arguments.out)
    parts: list[str] = []
    if learned := finished(curves):
        figure = arguments.figure or arguments.out / "learning.png"
        draw(learned, figure)
        beside = (arguments.into or arguments.out / "report.md").parent
        link = Path(os.path.relpath(figure, beside)).as_posix()
        names = " and ".join(learned)
        parts += [section(curve_table(curves), curves[0].machine, console), f"![Learning curves of {names}]({link})"]
    if races:
        parts.append(section(race_table(races), races[0].machine, console))
    if not parts:
        raise ResultError(f"{arguments.out} holds no finished run; start with `learning.py curves` or `time`")
    text = "\n\n".join(parts) + "\n"
    write_text(arguments.out / "report.md", text)
    if arguments.into is not None:
        write_text(arguments.into, replaced(arguments.into.read_text(encoding="utf-8"), text))
    console.print(f"wrote {arguments.into or arguments.out / 'report.md'}", markup=False, soft_wrap=True)
    return 0


def section(table: Table, machine: dict[str, Any], console: Console) -> str:
    """Print a table; its Markdown, with a line about the machine."""
    shown = RichTable(*table.headings, title=table.title)
    for row in table.rows:
        shown.add_row(*row)
    (console if console.is_terminal else Console(width=WIDTH)).print(shown, table.note)
    return f"**{table.title}.** {described(machine)}.\n\n{table.markdown()}"


def replaced(page: str, text: str) -> str:
    r"""The page with ``text`` between the marks.

    >>> replaced(f"a\n{START}\nold\n{END}\nb", "new\n") == f"a\n{START}\n\nnew\n\n{END}\nb"
    True

    Raises:
        ResultError: the page does not have the marks.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ResultError(f"the page has no place for the tables; put the lines {START} and {END} into it")
    return f"{before}{START}\n\n{text}\n{END}{after}"
