"""``tokenmdp credits``: what the credit methods do, what they promise and what they need."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from tokenmdp.cli.options import parse
from tokenmdp.credit import CREDIT_METHODS, NEEDS
from tokenmdp.credit.options import required_options
from tokenmdp.runs.credit_options import needs_of
from tokenmdp.runs.display import make_console

DECLARATIONS = """\
conserves: the credit of a text sums to its score
causal: before the last token, credit depends on what was written so far only
potential: potential-based shaping, so the reward-to-go policy gradient is unbiased"""


@dataclass(frozen=True)
class Credits:
    """List the credit methods: what each does, what it declares and what it needs."""


def main(arguments: Sequence[str]) -> int:
    """Parse and list; returns the exit status."""
    parse(Credits, "credits", arguments)
    return list_credits()


def list_credits() -> int:
    """Print the registry."""
    console = make_console()
    table = Table(show_lines=True)
    for heading in ("method", "what it does and needs", "con-\nserves", "causal", "poten-\ntial"):
        table.add_column(heading)
    for name in CREDIT_METHODS:
        method: Any = CREDIT_METHODS[name]
        declares = (method.conserves_return, method.causal, method.potential_based)
        first_line = (inspect.getdoc(method) or "").partition("\n")[0].replace("``", "").replace("`", "")
        needs = ", ".join([*needs_of(name), *(f"option {option}" for option in required_options(method))])
        does = Text.assemble(first_line, (f"\nneeds {needs}", "dim") if needs else "")
        table.add_row(name.replace("integrated-", "integrated-\n"), does, *("yes" if yes else "no" for yes in declares))
    console.print(table)
    console.print(DECLARATIONS, highlight=False)
    for need, meaning in NEEDS.items():
        console.print(f"{need}: {meaning}", highlight=False)
    return 0
