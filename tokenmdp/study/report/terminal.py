"""The report of a study for the terminal: the tables of one grid, and where the page is."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmdp.files import locked, write_text
from tokenmdp.study.directory import Study, load_study
from tokenmdp.study.report.page import write_report
from tokenmdp.study.results import StudyError
from tokenmdp.study.tables import METHOD_HEADINGS, method_table, method_texts
from tokenmdp.study.tuning import SEARCH, chosen_rates, edge_note
from tokenmdp.wording import clock

SHOWN = ("seeds", "mean score", "last tenth", "KL, last tenth", "- sparse", "median seed's updates to sparse's maximum")
ONE_LINE, ONE_TABLE = 150, 116  # terminal columns that fit everything, with intervals beside or below the numbers


def report(out: Path, grid: str, console: Console) -> None:
    """Write the report of a whole study and print the table of one grid.

    Raises:
        StudyError: there is no study, or no finished cell.
    """
    study = load_study(out)
    if not study.results:
        raise StudyError(f"{out} has no finished cell, so there is nothing to report; its command runs them")
    with locked(out):
        _report(study, grid, console)


def _report(study: Study, grid: str, console: Console) -> None:
    if SEARCH in study.grids:
        show_rates(study, console)
    for name in [grid] if grid in study.grids else study.grids:
        for table in tables_of(study, name, console.width):
            console.print(table)
    seconds = sum(result.seconds for result in study.results.values())
    console.print(f"{len(study.results)} of {len(study.cells)} cells, {clock(seconds)} of computing", highlight=False)
    page = write_report(study, study.path / "report")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def show_rates(study: Study, console: Console) -> None:
    """Write what the grid "tune" found, and say where the search was too narrow to find it."""
    place, chosen = study.path / "learning_rates.json", chosen_rates(study)
    write_text(place, json.dumps(chosen, indent=1) + "\n")
    console.print(f"learning rates: {place}", highlight=False, soft_wrap=True)
    if note := edge_note(chosen):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)


def tables_of(study: Study, grid: str, width: int) -> list[Table]:
    """The main columns of a grid's table for a terminal of ``width``, one setting after another.

    The page has all columns. In a narrow terminal intervals stand below their numbers; in a narrower
    one a second table has the last columns.
    """
    between = " " if width >= ONE_LINE else "\n"
    parts = (SHOWN,) if width >= ONE_TABLE else (SHOWN[:3], SHOWN[3:])
    settings: dict[str, list[dict[str, str]]] = {}
    for row in method_table(study, grid):
        settings.setdefault(row.setting, []).append(dict(zip(METHOD_HEADINGS, method_texts(row), strict=True)))
    tables = []
    for (setting, rows), shown in product(settings.items(), parts):
        table = Table(title=Text(f"{grid}: {setting}") if shown is parts[0] else None, title_justify="left")
        table.add_column("method", overflow="fold")
        for heading in shown:
            table.add_column(heading, justify="right")
        for texts in rows:
            table.add_row(*(Text(texts[heading].replace(" [", f"{between}[")) for heading in ("method", *shown)))
        tables.append(table)
    return tables
