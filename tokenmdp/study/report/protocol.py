"""The section on how a study was made: commands, versions, settings, learning rates and the search for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tokenmdp.files import read_json
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import model_name, name_of, without_directories
from tokenmdp.study.results import Cell, cell_record
from tokenmdp.study.tuning import MOST_KL, SEARCH, chosen_rates, edge_note, rates_of
from tokenmdp.wording import count

COMMANDS = "With these commands, each with the same directory as <code>--out</code>:"
LACKING = {"crashed": "crashed", "not_run": "not run"}


def protocol(study: Study) -> str:
    """The HTML of commands, versions, learning rates, their search, and every grid's settings."""
    commands = "\n".join(
        without_directories(command)
        for grid in study.grids
        for command in study.commands.get(grid) or [f"tokenmdp ablate --preset {grid}"]
    )
    settings = "".join(
        f"<details><summary>settings of the grid {escape(grid)}</summary>{_settings(study.declared(grid))}</details>"
        for grid in study.grids
        if study.declared(grid)
    )
    return f"<p>{COMMANDS}</p><pre>{escape(commands)}</pre>{_versions(study)}{_rates(study)}{_search(study)}{settings}"


def _versions(study: Study) -> str:
    versions = Counter(json.dumps(result.versions, sort_keys=True) for result in study.results.values())
    listed = "".join(
        f"<li>{count(number, 'run')} with {escape(_listed(json.loads(kind)))}</li>"
        for kind, number in versions.most_common()
    )
    same = all(study.packages.items() <= result.versions.items() for result in study.results.values())
    packages = "" if same else f"; the last command ran with {_listed(study.packages)}"
    return f"<p>A study of tokenmdp {escape(study.version)}{escape(packages)}.</p><ul>{listed}</ul>"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _rates(study: Study) -> str:
    """One row per grid: which methods learn at which rate."""
    rows = ""
    for grid in study.grids:
        rates = rates_of(study.declared(grid)) if grid != SEARCH else {}
        texts = [
            f"<b>{rate:g}</b> {escape('all methods' if len(rates) == 1 else ', '.join(map(name_of, methods)))}"
            for rate, methods in rates.items()
        ]
        rows += f'<tr><th scope="row">{escape(grid)}</th><td>{"; ".join(texts)}</td></tr>' if texts else ""
    head = '<thead><tr><th scope="col">grid</th><th scope="col">learning rates</th></tr></thead>'
    return f'<div class="scroll"><table class="rates">{head}<tbody>{rows}</tbody></table></div>' if rows else ""


def search_record(study: Study) -> dict[str, Any] | None:
    """The result of the search for learning rates: this study's, else from its ``learning_rates.json``; or None.

    Raises:
        CheckpointError: the file is damaged.
    """
    if study.select(SEARCH):
        return chosen_rates(study)
    place = study.path / "learning_rates.json"
    record = read_json(place) if place.exists() else None
    return record if isinstance(record, dict) and "search" in record else None


def _search(study: Study) -> str:
    """A row per method and a column per rate, with the chosen rate and those at the edge marked."""
    record = search_record(study)
    if record is None:
        return ""
    chosen, search = record["learning_rates"], record["search"]
    tried = {(entry["method"], entry.get("setting", ""), entry["learning_rate"]): entry for entry in search}
    rates = sorted({rate for *_, rate in tried})
    several = len({setting for _, setting, _ in tried}) > 1
    rows = ""
    for method, setting in dict.fromkeys((method, setting) for method, setting, _ in tried):
        name = f"{name_of(method)}, {setting}" if several else name_of(method)
        areas = (_area(tried.get((method, setting, rate)), rate == chosen.get(method)) for rate in rates)
        rows += f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{area}</td>" for area in areas)}</tr>'
    head = "".join(f'<th scope="col">{rate:g}</th>' for rate in rates)
    seeds = sorted({int(seed) for entry in search for seed in entry["areas"]})
    note = (
        f"The mean score over training at each learning rate, over seed{'s' * (len(seeds) > 1)} "
        f"{' and '.join(map(str, seeds))}, and the KL at its end; in bold the best of those whose KL, as a mean over "
        f"seeds, is at most {MOST_KL:g} nats. That bound was set after the first search had been seen; the paper's "
        f"policies end at 14.2 to 18.7 nats. {edge_note(record)}"
    )
    return (
        f"<h3>The search for learning rates</h3><p>{escape(note)}</p>"
        f'<div class="scroll"><table class="rates"><thead><tr><th scope="col">method</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _area(entry: Mapping[str, Any] | None, chosen: bool) -> str:
    if entry is None:
        return "&ndash;"
    mean = "&ndash;" if entry["mean"] is None else f"{entry['mean']:.2f}"
    notes = [] if entry.get("kl") is None else [f"KL {entry['kl']:.0f}"]
    notes += [f"{len(entry[key])} {what}" for key, what in LACKING.items() if entry.get(key)]
    below = f"<small>{', '.join(notes)}</small>" if notes else ""
    return f"{f'<b>{mean}</b>' if chosen else mean}{below}"


def _settings(cells: Sequence[Cell]) -> str:
    shared = shared_settings(cells)
    varied = sorted({key for cell in cells for key in flat_settings(cell)} - shared.keys())
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in shared.items())
    return f"<p>Not the same in all runs: {escape(', '.join(varied) or 'nothing')}.</p><pre>{escape(lines)}</pre>"


def flat_settings(cell: Cell) -> dict[str, Any]:
    """All that decides what a cell computes, the algorithm's options among the others; models by `model_name`."""
    record = cell_record(cell)
    settings = record["settings"]
    options = {key: value for key, value in settings.items() if key != "config"} | settings["config"]
    return _named(options | {key: record[key] for key in ("updates", "gold", "eval_every", "eval_samples")})


def _named(value: Any) -> Any:
    """The same value with `model_name` applied to every text in it."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return model_name(value) if isinstance(value, str) else value


def shared_settings(cells: Sequence[Cell]) -> dict[str, Any]:
    """The settings that are the same in all cells."""
    records = [flat_settings(cell) for cell in cells]
    return {key: value for key, value in records[0].items() if all(record.get(key) == value for record in records)}
