"""The report of a study: a page that needs nothing else, figures as files, tables as Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from tokenmdp.files import write_text
from tokenmdp.report.drawing import inline, theme_colours, write_figure
from tokenmdp.report.heatmap import credit_scale, sample_html
from tokenmdp.report.page import SCRIPT, STYLE
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import name_of, without_directories
from tokenmdp.study.report.parts import Picture, Section, first_setting, number_cell, typeset
from tokenmdp.study.report.protocol import protocol
from tokenmdp.study.report.quality import quality_table
from tokenmdp.study.report.sections import sections
from tokenmdp.study.report.style import STUDY_STYLE
from tokenmdp.study.report.words import WORDS
from tokenmdp.study.results import Cell
from tokenmdp.study.tables import (
    EQUAL_KL_HEADINGS,
    EQUAL_KL_LEGEND,
    LEGEND,
    METHOD_HEADINGS,
    MethodRow,
    equal_kl_table,
    markdown,
    method_table,
    method_texts,
)
from tokenmdp.wording import clock, count

SHOWN_SAMPLES = 3  # per method


class Tables(NamedTuple):
    """The numbers of a grid."""

    methods: Sequence[MethodRow]
    at_equal_kl: Sequence[tuple[str, ...]]  # none without a baseline


def write_report(
    study: Study,
    path: str | Path,
    *,
    title: str = "Credit methods compared",
    intro: str | None = None,
    first: Sequence[Section] = (),
) -> Path:
    """Write the report of everything in ``study`` into the directory ``path``.

    index.html     the page; needs nothing else
    figures/       its figures, PNG and SVG
    tables.md      the tables of ``first`` and of every grid

    The page and the tables begin with the notice of the study, if it has one. What the study does not hold is left
    out, and the page says so. The same study gives the same bytes.

    Args:
        study: of `load_study`.
        path: created if it does not exist.
        title: of the page.
        intro: HTML below the title; default: one paragraph about the methods.
        first: sections of your own, before those about the figures. ``examples/abc_report.py`` passes one.

    Returns:
        The page.
    """
    path = Path(path)
    grids = {
        grid: Tables(method_table(study, grid), equal_kl_table(study, grid))
        for grid in study.grids
        if study.select(grid)
    }
    notice = _paragraphs(study.notice)
    tables = ["# Study\n", *[f"> {paragraph}\n" for paragraph in notice]]
    tables += [text for section in first if section.markdown for text in (f"## {section.title}\n", section.markdown)]
    for grid, numbers in grids.items():
        tables += [f"## {grid}\n", markdown(METHOD_HEADINGS, map(method_texts, numbers.methods))]
        if numbers.at_equal_kl:
            tables += [markdown(EQUAL_KL_HEADINGS, numbers.at_equal_kl)]
    write_text(path / "tables.md", "\n".join([*tables, LEGEND, "", EQUAL_KL_LEGEND, ""]))
    found = [*first, *sections(study)]
    figures = path / "figures"
    shown = {
        picture.name: write_figure(picture.figure, figures, picture.name)
        for section in found
        for picture in section.pictures
    }
    for old in [*figures.glob("*.png"), *figures.glob("*.svg")]:
        if old.stem not in shown:  # of a grid or setting that no longer exists
            old.unlink(missing_ok=True)
    others = [grid for grid in grids if not any(grid in section.grids for section in found)]
    parts = [
        *((section.id, section.title, _section(study, section, shown, grids)) for section in found),
        ("samples", "What they write in the end", _samples(study)),
        ("unfinished", "What is missing", _unfinished(study)),
        ("how", "How it was made", protocol(study) + "".join(_grid_table(grid, grids[grid]) for grid in others)),
    ]
    links = " ".join(f'<a href="#{id}">{escape(title)}</a>' for id, title, _ in parts)
    bodies = "".join(f'<section id="{id}"><h2>{escape(title)}</h2>{body}</section>' for id, title, body in parts)
    seconds = sum(result.seconds for result in study.results.values())
    note = (
        f"{len(study.results)} of {count(len(study.cells), 'training run')} finished, {clock(seconds)} of "
        f"computing, {count(len(grids), 'grid')}: {', '.join(grids)}."
    )
    above = f'<aside class="notice">{"".join(f"<p>{paragraph}</p>" for paragraph in notice)}</aside>' * bool(notice)
    page = (
        '<!doctype html><html lang="en" data-scale="common"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{theme_colours()}{STUDY_STYLE}</style></head><body>"
        f'{above}<header><h1>{escape(title)}</h1><button id="theme" type="button">dark / light</button></header>'
        f'<p class="note">{escape(note)}</p>{_intro(study) if intro is None else intro}{WORDS}<nav>{links}</nav>'
        f"<main>{bodies}</main><script>{SCRIPT}</script></body></html>"
    )
    write_text(path / "index.html", page)
    return path / "index.html"


def _paragraphs(text: str) -> list[str]:
    r"""Plain text as escaped paragraphs of one line each.

    >>> _paragraphs("One\nline.\n\nA < B.")
    ['One line.', 'A &lt; B.']
    """
    return [escape(" ".join(part.split()), quote=False) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _intro(study: Study) -> str:
    methods = dict.fromkeys(name_of(cell.method) for grid in study.grids for cell in study.declared(grid))
    return (
        f"<p>How a policy learns when the score of a text is spread over its tokens in different ways: "
        f"{escape(', '.join(methods))}. Runs with the same seed get the same prompts.</p>"
    )


def _section(study: Study, section: Section, shown: Mapping[str, str], grids: Mapping[str, Tables]) -> str:
    held = section.pictures or section.html
    what = "No figure" if section.models else "Not in this study"
    missing = "" if held else f'<p class="note">{what}: {escape(section.missing)}.</p>'
    if missing and not section.models:
        return missing
    pictures = "".join(_picture(picture, shown[picture.name]) for picture in section.pictures)
    tables = "".join(_grid_table(grid, grids[grid], opened=section.id == "curves") for grid in section.grids)
    tables += "".join(quality_table(study, model) for model in section.models)
    intro = f"<p>{escape(section.intro)}</p>" * bool(section.intro)
    return f"{intro}{section.html}{missing}{pictures}{tables}"


def _picture(picture: Picture, svg: str) -> str:
    return (
        f'<figure><div class="scroll">{inline(svg, picture.name, escape(picture.title))}</div>'
        f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption></figure>"
    )


def _grid_table(grid: str, tables: Tables, *, opened: bool = False) -> str:
    legend, note = (
        f'<p class="note">{escape(typeset(text))}</p>' * opened for text in (LEGEND, EQUAL_KL_LEGEND)
    )  # once
    equal = f"{_numbers(EQUAL_KL_HEADINGS, tables.at_equal_kl)}{note}" if tables.at_equal_kl else ""
    return (
        f"<details{' open' if opened else ''}><summary>all numbers of the grid {escape(grid)}</summary>"
        f"{_numbers(METHOD_HEADINGS, map(method_texts, tables.methods))}{legend}{equal}</details>"
    )


def _numbers(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose rows begin with setting and method; a setting is a line across it."""
    head = "".join(f'<th scope="col">{escape(typeset(heading))}</th>' for heading in headings[1:])
    body, last = "", None
    for setting, method, *numbers in rows:
        if setting != last:
            last = setting
            body += f'<tr class="group"><th colspan="{len(headings) - 1}">{escape(setting)}</th></tr>'
        body += f'<tr><th scope="row">{escape(name_of(method))}</th>{"".join(map(number_cell, numbers))}</tr>'
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _samples(study: Study) -> str:
    if (first := first_setting(study)) is None:
        return '<p class="note">Not in this study: no run has finished.</p>'
    grid, setting, groups = first
    seeds = Counter(result.cell.seed for results in groups.values() for result in results)
    seed, columns = min(seeds, key=lambda seed: (-seeds[seed], seed)), ""  # the seed that most methods have
    found = {
        cell.cell.method: cell.samples for results in groups.values() for cell in results if cell.cell.seed == seed
    }
    for method, samples in ((method, kept[:SHOWN_SAMPLES]) for method, kept in found.items()):
        scale = credit_scale([sample.credits for sample in samples])
        texts = "".join(sample_html(sample, scale, digits=2) for sample in samples)
        columns += (
            f'<div><h3>{escape(name_of(method))}</h3><p class="legend"><span class="num">&minus;{scale:.2f}'
            f'</span><span class="bar"></span><span class="num">+{scale:.2f}</span></p>{texts}</div>'
        )
    return (
        f"<p>The last evaluation of seed {seed} (grid {escape(grid)}, {escape(setting)}): the same "
        "held-out prompts for every method, in grey. The colour of a token is its credit, "
        '<b class="key up">rewarded</b> or <b class="key down">penalised</b>, on a scale of each method\'s '
        f'own; point at a token for its number.</p><div class="columns">{columns}</div>'
    )


def _unfinished(study: Study) -> str:
    crashed = "".join(
        f'<tr><th scope="row">{escape(name_of(study.cells[id].method))}</th><td>{escape(study.cells[id].setting)}</td>'
        f"<td>{study.cells[id].seed}</td><td><code>{escape(without_directories(error))}</code></td></tr>"
        for id, error in study.errors.items()
    )
    table = (
        f"<p>{count(len(study.errors), 'run')} ended with an error; the same command tries again.</p>"
        '<div class="scroll"><table class="errors"><thead><tr><th scope="col">method</th><th scope="col">setting</th>'
        f'<th scope="col">seed</th><th scope="col">error</th></tr></thead><tbody>{crashed}</tbody></table></div>'
        if crashed
        else ""
    )
    lines = ""
    for grid in study.grids:
        left = [cell for cell in study.declared(grid) if cell.id not in study.results and cell.id not in study.errors]
        for (setting, method), cells in _grouped(left).items():
            seeds = f"seed{'s' * (len(cells) > 1)} {', '.join(str(cell.seed) for cell in cells)}"
            lines += f"<li>grid {escape(grid)}, {escape(setting)}, {escape(name_of(method))}: {seeds}</li>"
    waiting = f"<p>Not run yet:</p><ul>{lines}</ul>" if lines else ""
    return f"{table}{waiting}" or "<p>Nothing: every run has finished.</p>"


def _grouped(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.setting, cell.method), []).append(cell)
    return found
