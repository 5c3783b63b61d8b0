"""A study's directory: grids that grow, results read back, names without directories, damage and full disks."""

import errno
import json
import lzma
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from study_doubles import figures_not_drawn, grid_cells, make_cell, make_result, paper_like, synthetic_study

from tokenmdp import cli
from tokenmdp.cli import ablate
from tokenmdp.study import directory, results
from tokenmdp.study.directory import declare, load_study, quality_file
from tokenmdp.study.grid import expand, parse_method
from tokenmdp.study.packing import pack_cells
from tokenmdp.study.presets import PLANS
from tokenmdp.study.report import terminal
from tokenmdp.study.results import CellResult, StudyError, cell_file, read_result, write_result


def full_disk(path, text):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_two_grids_share_results_under_labels_of_their_own(tmp_path):
    synthetic_study(tmp_path, grids=("imdb", "faithful"), seeds=2, updates=20)
    study = load_study(tmp_path)
    shared = set(study.grids["imdb"]) & set(study.grids["faithful"])
    assert len(shared) == 8
    assert set(study.cells) == set(study.results)
    assert ("8-16 tokens", "red") in study.select("imdb")
    assert ("8-16 tokens, reward model imdb-tiny", "red") in study.select("faithful")
    for (setting, method), rows in study.select("faithful").items():
        assert [row.cell.seed for row in rows] == [1, 2]
        assert {(row.cell.setting, row.cell.method) for row in rows} == {(setting, method)}
    assert study.select("no such grid") == {}


def test_a_result_comes_back_with_six_digits(tmp_path):
    cell = make_cell(updates=2)
    declare(tmp_path, "imdb", [cell], {})
    result = CellResult(cell, {"kl": [1 / 3, 123456.789]}, {"update": [0, 2]}, [], 1.25, {"torch": "2"})
    write_result(tmp_path, result)
    back = read_result(tmp_path, cell.id)
    assert back.cell == cell
    assert back.metrics == {"kl": [0.333333, 123457.0]}
    again = write_result(tmp_path, back).read_text()
    assert again == write_result(tmp_path, result).read_text()


def test_a_result_without_costs_is_read(tmp_path):
    cell = make_cell(updates=2)
    costs = {"update_seconds": 0.5, "peak_bytes": 2.0**30}
    place = write_result(tmp_path, CellResult(cell, {}, {}, [], 1.0, {}, costs))
    assert read_result(tmp_path, cell.id).costs == {"update_seconds": 0.5, "peak_bytes": 1.07374e9}
    record = json.loads(place.read_text())
    del record["costs"]
    place.write_text(json.dumps(record))
    assert read_result(tmp_path, cell.id).costs == {}


def test_a_study_of_another_version_is_read_but_not_added_to(tmp_path, monkeypatch):
    cells = grid_cells("imdb", 1, 5)
    monkeypatch.setattr(directory, "tokenmdp_version", lambda: "0.0.1")
    declare(tmp_path, "imdb", cells, {})
    monkeypatch.undo()
    before = (tmp_path / "study.json").read_text()
    with pytest.raises(StudyError, match=r"holds results of tokenmdp 0\.0\.1 .* choose another --out"):
        declare(tmp_path, "imdb", cells, {})
    assert (tmp_path / "study.json").read_text() == before
    assert load_study(tmp_path).version == "0.0.1"


def test_a_notice_comes_with_the_study_where_there_is_one(tmp_path):
    place = tmp_path / directory.NOTICE
    place.write_text("\nRead <this>\nfirst.\n\n", encoding="utf-8")  # may be there before the first run
    declare(tmp_path, "imdb", [make_cell()], {})
    assert load_study(tmp_path).notice == "Read <this>\nfirst."
    for nothing in ("", " \n\n"):
        place.write_text(nothing)
        assert load_study(tmp_path).notice == ""
    place.unlink()
    assert load_study(tmp_path).notice == ""
    place.write_bytes("é".encode("latin-1"))
    with pytest.raises(StudyError, match=r"notice\.txt cannot be read .* plain text in UTF-8"):
        load_study(tmp_path)


def test_what_is_no_study_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(StudyError, match=r"holds mine\.txt but no study\.json"):
        declare(tmp_path, "imdb", grid_cells("imdb", 1, 5), {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(StudyError, match="holds no study"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "has format 2 and this version of tokenmdp reads 3"),
        ("[]", "holds a list"),
        ("{", "cannot be read"),
        ('{"format": 3, "version": "x", "grids": {}}', "is damaged"),
        ('{"format": 3}', "is damaged"),
    ],
)
def test_another_format_and_damage_are_named(tmp_path, text, message):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(StudyError, match=message):
        load_study(tmp_path)


def test_a_packed_study_is_the_same_and_is_only_read(tmp_path):
    synthetic_study(tmp_path, grids=("imdb",), seeds=2, updates=5, crashed=lambda cell: cell.method == "red")
    before, (kept, *later) = load_study(tmp_path), sorted((tmp_path / "cells").glob("*.json"))
    aside = [(file, file.read_text()) for file in later]
    for file in later:
        file.unlink()
    pack_cells(tmp_path)
    for file, text in aside:
        file.write_text(text)
    assert repr(load_study(tmp_path)) == repr(before)  # some packed, some in files
    later[0].write_text("{")
    with pytest.raises(StudyError, match="delete it and the cell is run again"):
        pack_cells(tmp_path)
    later[0].write_text(aside[0][1])
    assert repr(load_study(tmp_path)) == repr(before)  # nothing was changed
    place = pack_cells(tmp_path)
    assert pack_cells(tmp_path).read_bytes() == place.read_bytes()
    unfinished = {cell.id for cell in before.cells.values() if cell.method == "red"}
    assert json.loads((tmp_path / "study.json").read_text())["cells"].keys() == unfinished
    assert repr(load_study(tmp_path)) == repr(before)
    assert not kept.exists()
    with pytest.raises(StudyError, match="holds packed cells, to which none can be added"):
        declare(tmp_path, "imdb", list(before.cells.values()), {})
    for damaged in (b"x", lzma.compress(b"{\n")):
        place.write_bytes(damaged)
        with pytest.raises(StudyError, match="restore a copy"):
            load_study(tmp_path)
    place.unlink()
    with pytest.raises(StudyError, match=r"neither in study.json nor in cells.jsonl.xz; restore a copy"):
        load_study(tmp_path)


def test_a_damaged_cell_is_named(tmp_path):
    synthetic_study(tmp_path, grids=("imdb",), seeds=1, updates=5)
    id = load_study(tmp_path).grids["imdb"][0]
    for text in ("{", "[]", '{"format": 3}'):
        cell_file(tmp_path, id).write_text(text)
        with pytest.raises(StudyError, match="delete it and the cell is run again"):
            load_study(tmp_path)


def command(text):
    return {"command": f"tokenmdp ablate --preset imdb {text}"}


def test_a_second_command_adds_to_a_grid(tmp_path):
    before = [make_cell(method, seed) for seed in (1, 2) for method in ("sparse", "attention")]
    after = [make_cell(method, seed, setting) for seed in (1, 3) for method in ("red",) for setting in ("8-16 tokens",)]
    declare(tmp_path, "imdb", before, command("one"))
    declare(tmp_path, "imdb", after, command("two"))
    declare(tmp_path, "imdb", after, command("two"))  # a shard, say
    study = load_study(tmp_path)
    assert study.grids["imdb"] == [cell.id for cell in before + after]
    assert study.commands["imdb"] == [command("one")["command"], command("two")["command"]]


def at_rate(rate, seeds, method="attention"):
    return [make_cell(method, seed, config={"kl_coef": 0.2, "learning_rate": rate}) for seed in seeds]


def test_a_method_has_one_learning_rate_whatever_the_seeds(tmp_path):
    slow, fast, other = at_rate(1e-5, (1, 2, 3)), at_rate(1e-3, (1,)), at_rate(1e-5, (1, 2), "red")
    declare(tmp_path, "imdb", slow + other, {})
    declare(tmp_path, "imdb", fast, {})
    study = load_study(tmp_path)
    assert study.grids["imdb"] == list(study.cells) == [cell.id for cell in other + fast]
    declare(tmp_path, "imdb", at_rate(1e-3, (2,)), {})
    assert load_study(tmp_path).grids["imdb"] == [cell.id for cell in other + at_rate(1e-3, (1, 2))]


def test_a_replaced_cell_stays_where_another_grid_has_it_and_its_result_is_found_again(tmp_path):
    slow, fast = at_rate(1e-5, (1, 2)), at_rate(1e-3, (1, 2))
    declare(tmp_path, "imdb", slow, {})
    declare(tmp_path, "custom", slow[:1], {})
    for cell in slow:
        write_result(tmp_path, make_result(cell, paper_like(cell)))
    declare(tmp_path, "imdb", fast, {})
    study = load_study(tmp_path)
    assert set(study.cells) == {slow[0].id, *(cell.id for cell in fast)}
    assert list(study.results) == [slow[0].id]
    declare(tmp_path, "imdb", slow, {})
    assert set(load_study(tmp_path).results) == {cell.id for cell in slow}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": 50}, "with updates 150, and these would have 50"),
        ({"gold": None}, 'with gold "imdb-gold", and these would have null'),
        ({"reward_model": "imdb-plain"}, 'with reward_model "imdb-tiny", and these would have "imdb-plain"'),
        ({"config": {"kl_coef": 0.1}}, "with kl_coef 0.2, and these would have 0.1"),
    ],
)
def test_other_settings_under_the_same_name_are_refused(tmp_path, change, message):
    cell = make_cell()
    declare(tmp_path, "imdb", [cell], {})
    before = (tmp_path / "study.json").read_text()
    settings = {key: value for key, value in change.items() if key in ("reward_model", "config")}
    settings["config"] = cell.settings.config | settings.get("config", {})
    other = replace(cell, settings=replace(cell.settings, seed=2, **settings), seed=2)
    other = replace(other, **{key: value for key, value in change.items() if key not in settings})
    with pytest.raises(StudyError, match=message):
        declare(tmp_path, "imdb", [other], {})
    assert (tmp_path / "study.json").read_text() == before
    declare(tmp_path, "custom", [other], {})  # another grid has names of its own


def test_a_study_that_keeps_one_command_a_grid_is_read_and_added_to(tmp_path):
    """A record as written by versions before the list."""
    declare(tmp_path, "imdb", [make_cell()], command("one"))
    record = json.loads((tmp_path / "study.json").read_text())
    del record["grids"]["imdb"]["commands"]
    (tmp_path / "study.json").write_text(json.dumps(record))
    assert load_study(tmp_path).commands["imdb"] == [command("one")["command"]]
    declare(tmp_path, "imdb", [make_cell(seed=2)], command("two"))
    assert load_study(tmp_path).commands["imdb"] == [command(word)["command"] for word in ("one", "two")]


def test_without_its_study_json_the_same_command_finds_the_results(tmp_path):
    synthetic_study(tmp_path, grids=("imdb",), seeds=1, updates=5)
    before = load_study(tmp_path)
    (tmp_path / "report").mkdir(exist_ok=True)
    (tmp_path / "study.json").unlink()
    declare(tmp_path, "imdb", list(before.cells.values()), {})
    assert load_study(tmp_path).results == before.results


@pytest.mark.parametrize("text", ["{}", '{"arguments": 3}'])
def test_damaged_quality_is_named(tmp_path, text):
    synthetic_study(tmp_path, grids=("imdb",), seeds=1, updates=5)
    quality_file(tmp_path, "imdb-tiny").parent.mkdir(exist_ok=True)
    quality_file(tmp_path, "imdb-tiny").write_text(text)
    with pytest.raises(StudyError, match=r"imdb-tiny\.json is damaged"):
        load_study(tmp_path)


def test_a_study_json_that_lacks_a_part_is_not_added_to(tmp_path):
    (tmp_path / "study.json").write_text('{"format": 3}')
    with pytest.raises(StudyError, match="is damaged"):
        declare(tmp_path, "imdb", [make_cell()], {})


def test_no_two_models_share_a_quality_file(tmp_path):
    names = ("a/b", "a-b", "a b", "/models/b", "/others/b", "b")
    files = {quality_file(tmp_path, name) for name in names}
    assert len(files) == len(names)
    assert not [file for file in files if "models" in file.name or "others" in file.name]
    assert quality_file(tmp_path, "imdb-tiny").name == "imdb-tiny.json"


@figures_not_drawn()
def test_relative_names_leave_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = Path(results.__file__).parents[1] / "assets" / "imdb"
    shutil.copytree(bundled / "reward_model", tmp_path / "mine")
    shutil.copy(bundled / "prompts.json", tmp_path)
    words = ["--reward-models", "mine", "imdb-tiny", "--prompts", "prompts.json", "--gold", "mine", "--seeds", "1"]
    parsed = ablate.parse_command(["--preset", "quick", *words])
    cells = expand(ablate.plan_of(*parsed))
    ablate.check_models(cells[:1])  # they are found from here
    declare("study", "quick", cells, {"command": ablate.command_of(*parsed)})
    for cell in cells:
        write_result("study", replace(make_result(cell, paper_like(cell)), cell=cell))
    last = cells[-1]
    cell_file("study", last.id).unlink()
    trace = f'File "{tmp_path}/credit.py", line 1\nOSError: cannot read {tmp_path}/mine/model.safetensors\n'
    cell_file("study", last.id, ".error.txt").write_text(trace)
    terminal.report(Path("study"), "quick", Console(quiet=True))
    for file in tmp_path.glob("study/**/*"):
        if file.is_file() and file.suffix != ".txt":
            assert str(tmp_path).encode() not in file.read_bytes(), file
    assert load_study("study").errors == {last.id: "OSError: cannot read model.safetensors"}


def test_absolute_names_show_their_last_part(tmp_path):
    plan = replace(PLANS["quick"], reward_models=(str(tmp_path / "mine"), "imdb-tiny"))
    assert {cell.setting for cell in expand(plan)} == {
        f"8-16 tokens, reward model {name}" for name in ("mine", "imdb-tiny")
    }
    method = parse_method("rto:tuned=/home/me/tuned")
    assert (method.label, method.options) == ("rto tuned=tuned", {"tuned": "/home/me/tuned"})


def test_a_full_disk_at_the_start_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(directory, "write_text", full_disk)
    assert cli.main(["ablate", "--preset", "smoke", "--out", str(tmp_path / "study"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Traceback" not in error


def test_the_search_says_where_it_was_too_narrow(tmp_path, capsys):
    cells = [
        make_cell("sparse", 1, f"8-16 tokens, learning_rate={rate:g}", 2, config={"learning_rate": rate})
        for rate in (1e-5, 1e-4)
    ]
    declare(tmp_path, "tune", cells, {})
    for cell, area in zip(cells, (1.0, 2.0), strict=True):
        write_result(tmp_path, CellResult(cell, {"score_mean": [area, area], "kl": [0.0, 1.0]}, {}, [], 1.0, {}))
    terminal.show_rates(load_study(tmp_path), Console(width=300))
    assert "At the edge of the search" in capsys.readouterr().out
    assert json.loads((tmp_path / "learning_rates.json").read_text())["learning_rates"] == {"sparse": 1e-4}
