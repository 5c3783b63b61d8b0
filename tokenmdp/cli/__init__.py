"""The ``tokenmdp`` command: which commands there are, and how errors are reported.

Each command is a file beside this one, with its options and what it does. It is imported when it runs, so that
``tokenmdp --help`` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

from gymnasium.error import Error as GymnasiumError
from rich.console import Console
from rich.text import Text

from tokenmdp.runs.display import (
    CLOSED_STATUS,
    MessageConsole,
    accept_any_text,
    discard_broken_output,
    termination_is_an_interrupt,
)
from tokenmdp.wording import visible

COMMANDS = {
    "train": "train a policy against a reward model, then show what changed",
    "sample": "write texts with a policy, each token tinted by its credit",
    "score": "the score of a text and the credit of each token",
    "rlhf": "comparisons, a reward model and a policy trained on it, round by round",
    "soup": "average the weights of two policies, and evaluate each average",
    "prefer": "sample responses, ask a model or a person which is better, and write the comparisons",
    "behaviours": "questions about behaviour that models write, what models answer, and how training changes it",
    "eval": "evaluate a run's policy before and after training again",
    "credits": "list the credit methods: what each does, promises and needs",
    "quality": "measure where each method's credit lands, with intervals and costs",
    "ablate": "compare credit methods over seeds, with statistics and a page",
}
RESUMABLE = ("train", "prefer", "rlhf", "soup", "behaviours", "ablate")


def installed_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("tokenmdp")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``tokenmdp`` command.

    Returns:
        0; 1 if a run of a study failed; 2 for a user's error, which is one line on standard error; 130 after Ctrl-C,
        SIGTERM or the end of the terminal; 141 if nobody reads the output any more.
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
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name == "--version":
        print(f"tokenmdp {installed_version()}")
        return 0
    if name in ("--help", "-h"):
        print_commands()
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        report_error(f"there is no command {name!r}; {hint}")
        return 2
    if name in ("train", "rlhf"):
        from tokenmdp.runs import process_settings  # before all that takes long: it notes when the process began

        if "--no-reexec" not in rest and argv is None:
            process_settings.reexecute_with_settings()
    try:
        with termination_is_an_interrupt(), warnings.catch_warnings():
            warnings.showwarning = show_warning
            return run(name, rest)
    except KeyboardInterrupt:
        print("interrupted" + ("; run the same command to go on" if name in RESUMABLE else ""))
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("TOKENMDP_TRACEBACK"):
            raise
        # These errors name the value and the remedy; a trace above them would hide both.
        own = type(error).__module__.startswith("tokenmdp")
        in_words = isinstance(error, OSError) and error.errno is None  # not of the operating system
        plain = own or in_words or type(error) is ValueError or isinstance(error, GymnasiumError)
        expected = plain or isinstance(error, (ValueError, OSError, FloatingPointError))
        where = "shows where" if expected else "shows where: no input should end like this, so please report it"
        named = "" if plain else f"{type(error).__name__}: "
        remedy = "; make room, then run the same command again" if os.strerror(errno.ENOSPC) in str(error) else ""
        report_error(f"{named}{error}{remedy}", hint=f" (TOKENMDP_TRACEBACK=1 {where})")
        return 2


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    return import_module(f"tokenmdp.cli.{name}").main(arguments)


def print_commands() -> None:
    """What ``tokenmdp --help`` shows."""
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    print("usage: tokenmdp COMMAND ...\n\nText generation as a token MDP.\n\ncommands:")
    print("\n".join(lines))
    print("\n`tokenmdp COMMAND --help` shows the options of a command, `tokenmdp --version` the version.")


def report_error(message: str, hint: str = "") -> None:
    """One line on standard error, with a hint at its end."""
    error_console().print(Text.assemble(("error: ", "bold red"), visible(message), (hint, "dim")))


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
