"""The ``tokenmdp`` command: ``train``, ``sample``, ``score``, ``eval``, ``credits``, ``quality`` and ``ablate``.

This module only parses arguments and reports errors. Everything that needs torch is imported when a command runs, so
that ``tokenmdp --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, TextIO

import tyro
from gymnasium.error import Error as GymnasiumError
from rich.console import Console
from rich.text import Text

from tokenmdp.cli.options import Ablate, AllOrOne, CreditName, Credits, Eval, Quality, Sample, Score, Train
from tokenmdp.runs.display import CLOSED_STATUS, MessageConsole, accept_any_text, discard_broken_output
from tokenmdp.wording import visible

__all__ = [
    "Ablate", "AllOrOne", "CreditName", "Credits", "Eval", "Quality", "Sample", "Score", "Train", "main",
]  # fmt: skip

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Credits, tyro.conf.subcommand("credits")]
    | Annotated[Quality, tyro.conf.subcommand("quality")]
    | Annotated[Ablate, tyro.conf.subcommand("ablate")]
)
Parsed = Train | Sample | Score | Eval | Credits | Quality | Ablate


def installed_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("tokenmdp")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def run(command: Parsed) -> int:
    """Carry out one parsed command; returns the exit status."""
    if isinstance(command, Train):
        from tokenmdp.cli.train import train

        return train(command)
    if isinstance(command, Score):
        from tokenmdp.cli.score import score

        return score(command)
    if isinstance(command, (Credits, Quality)):
        from tokenmdp.cli import quality

        return quality.list_credits() if isinstance(command, Credits) else quality.measure_quality(command)
    if isinstance(command, Ablate):
        from tokenmdp.cli.ablate import ablate

        return ablate(command)
    from tokenmdp.cli import sample

    return sample.sample(command) if isinstance(command, Sample) else sample.evaluate_run(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``tokenmdp`` command.

    Returns:
        0; 1 if a run of a study failed; 2 for a user's error, which is one line on standard error; 130 after Ctrl-C;
        141 if nobody reads the output any more.
    """
    accept_any_text()
    try:
        status = _main(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_broken_output()
        return CLOSED_STATUS
    return status


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"tokenmdp {installed_version()}")
        return 0
    command: Parsed = tyro.cli(
        Command,
        prog="tokenmdp",
        description="Text generation as a token MDP: train, sample, score, evaluate, compare credit methods.",
        args=arguments,
    )
    if isinstance(command, Train) and command.reexec and argv is None:
        from tokenmdp.runs.process_settings import reexecute_with_settings

        reexecute_with_settings()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            return run(command)
    except KeyboardInterrupt:
        print("interrupted" + ("; run the same command to go on" if isinstance(command, Train | Ablate) else ""))
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("TOKENMDP_TRACEBACK"):
            raise
        # These errors name the value and the remedy; a trace above them would hide both.
        own = type(error).__module__.startswith("tokenmdp")
        plain = own or type(error) is ValueError or isinstance(error, GymnasiumError)
        kind = "" if plain else f"{type(error).__name__}: "
        expected = plain or isinstance(error, (ValueError, OSError, FloatingPointError))
        console = error_console()
        console.print(Text.assemble(("error: ", "bold red"), visible(f"{kind}{error}")))
        where = "shows where" if expected else "shows where: no input should end like this, so please report it"
        console.print(f"(TOKENMDP_TRACEBACK=1 {where})", style="dim")
        return 2


def error_console() -> Console:
    """For messages to the user, wrapped to the width of the terminal."""
    return MessageConsole(stderr=True, soft_wrap=True, highlight=False)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Stands in for `warnings.showwarning`: one line for what tokenmdp tells users, Python's own form for the rest."""
    own = category.__module__.startswith("tokenmdp") or Path(filename).is_relative_to(Path(__file__).parents[1])
    if own and issubclass(category, UserWarning):
        console = error_console()
        with console.capture() as shown:
            console.print(Text.assemble(("warning: ", "bold yellow"), visible(str(message))))
        # The console itself would write past a running progress display, which stands in for sys.stderr.
        sys.stderr.write(shown.get())
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
