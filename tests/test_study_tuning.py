"""Which learning rate a search chooses, and what it may not choose."""

import json

import pytest
from study_doubles import make_cell

from tokenmdp.study.directory import declare, load_study
from tokenmdp.study.grid import read_rates
from tokenmdp.study.results import CellResult, cell_file, write_result
from tokenmdp.study.tuning import MOST_KL, chosen_rates, edge_note

SHORT, LONG = "8-16 tokens", "20-30 tokens"
LENGTHS = {SHORT: (8, 15), LONG: (20, 29)}


def searched(path, areas, far=()):
    """The study whose cells have these areas, at the rates ``far`` with too much KL.

    A text instead of an area is why a cell crashed, None is one that has not run.
    """
    cells = []
    for (method, setting, rate), seeds in areas.items():
        low, high = LENGTHS[setting]
        given = {"horizon_range": (low, high), "min_new_tokens": low, "max_new_tokens": high}
        for seed, area in enumerate(seeds, 101):
            label = f"{setting}, learning_rate={rate:g}"
            cells.append((make_cell(method, seed, label, 2, config={"learning_rate": rate}, **given), area))
    declare(path, "tune", [cell for cell, _ in cells], {})
    (path / "cells").mkdir()
    for cell, area in cells:
        if isinstance(area, str):
            cell_file(path, cell.id, ".error.txt").write_text(area)
        elif area is not None:
            end = MOST_KL + 1 if cell.settings.config["learning_rate"] in far else 1.0
            metrics = {"score_mean": [area - 1, area + 1], "kl": [0.0, end]}
            write_result(path, CellResult(cell, metrics, {}, [], 1.0, {}))
    return load_study(path)


def test_the_best_mean_area_chooses_the_rate(tmp_path):
    study = searched(tmp_path, {
        ("sparse", SHORT, 1e-5): (1, 2), ("sparse", SHORT, 1e-4): (3, 0), ("sparse", SHORT, 1e-3): (2, 2),
        ("red", SHORT, 1e-5): (4, 4), ("red", SHORT, 1e-4): (4, 4),
    })  # fmt: skip
    record = chosen_rates(study)
    assert record["learning_rates"] == {"sparse": 1e-3, "red": 1e-5}  # of equal ones the lower
    assert record["at_the_edge_of_the_search"] == ["sparse", "red"]
    row = {
        "method": "sparse",
        "learning_rate": 1e-4,
        "setting": SHORT,
        "areas": {101: 3.0, 102: 0.0},
        "mean": 1.5,
        "kl": 1.0,
    }
    assert row | {"crashed": [], "not_run": []} in record["search"]
    file = tmp_path / "learning_rates.json"
    file.write_text(json.dumps(record))
    assert read_rates(file) == record["learning_rates"]


@pytest.mark.parametrize("lost", ["RuntimeError: nan", None])
def test_a_rate_that_lost_a_seed_is_not_chosen_for_the_ones_that_survived(tmp_path, lost):
    study = searched(tmp_path, {
        ("sparse", SHORT, 1e-4): (2, 2), ("sparse", SHORT, 3e-4): (3, 3), ("sparse", SHORT, 1e-3): (lost, 9),
    })  # fmt: skip
    record = chosen_rates(study)
    assert record["learning_rates"] == {"sparse": 3e-4}
    assert record["at_the_edge_of_the_search"] == []  # a higher rate was tried
    row = record["search"][-1]
    assert (row["areas"], row["mean"]) == ({102: 9.0}, 9.0)
    assert (row["crashed"], row["not_run"]) == (([101], []) if lost else ([], [101]))


def test_a_rate_that_leaves_the_reference_behind_is_not_chosen_for_its_reward(tmp_path):
    areas = {("sparse", SHORT, rate): (place, place) for place, rate in enumerate((1e-5, 1e-4, 1e-3))}
    record = chosen_rates(searched(tmp_path, areas, far={1e-3}))
    assert record["learning_rates"] == {"sparse": 1e-4}
    assert [row["kl"] for row in record["search"]] == [1.0, 1.0, MOST_KL + 1]


def test_a_choice_that_hangs_on_the_bound_says_so(tmp_path):
    areas = {("sparse", SHORT, rate): (place, place) for place, rate in enumerate((1e-5, 1e-4, 1e-3))}
    areas |= {("red", SHORT, rate): (-place, -place) for place, rate in enumerate((1e-5, 1e-4, 1e-3))}
    record = chosen_rates(searched(tmp_path, areas, far={1e-3}))  # one nat beyond the bound
    assert record["learning_rates"] == {"sparse": 1e-4, "red": 1e-5}
    assert record["limited_by_kl"] == ["sparse"]
    assert record["with_other_bounds"] == {"18.7": {}, "25": {"sparse": 1e-3}}
    note = edge_note(record)
    assert f"Held back by the bound of {MOST_KL:g} nats" in note
    assert "a better mean score: sparse (0.0001)." in note
    assert note.endswith("A bound of 25 nats would choose otherwise for sparse (0.001).")


def test_a_method_of_which_no_rate_finished_is_left_out(tmp_path):
    record = chosen_rates(searched(tmp_path, {("sparse", SHORT, 1e-4): (2, 2), ("red", SHORT, 1e-4): (None, None)}))
    assert record["learning_rates"] == {"sparse": 1e-4}
    assert record["search"][-1]["mean"] is None
    assert json.loads(json.dumps(record))["search"][-1]["not_run"] == [101, 102]


def test_every_length_counts(tmp_path):
    study = searched(tmp_path, {
        ("sparse", SHORT, 1e-4): (1, 1), ("sparse", SHORT, 1e-3): (5, 5),
        ("sparse", LONG, 1e-4): (8, 8), ("sparse", LONG, 1e-3): (2, 2),
    })  # fmt: skip
    record = chosen_rates(study)
    assert record["learning_rates"] == {"sparse": 1e-4}  # 4.5 against 3.5
    assert [(row["setting"], row["learning_rate"], row["mean"]) for row in record["search"]] == [
        (SHORT, 1e-4, 1.0), (LONG, 1e-4, 8.0), (SHORT, 1e-3, 5.0), (LONG, 1e-3, 2.0),
    ]  # fmt: skip


def test_a_rate_that_was_tried_at_fewer_lengths_is_not_ranked(tmp_path):
    study = searched(tmp_path, {
        ("sparse", SHORT, 1e-4): (1, 1), ("sparse", LONG, 1e-4): (2, 2), ("sparse", LONG, 1e-3): (9, 9),
    })  # fmt: skip
    assert chosen_rates(study)["learning_rates"] == {"sparse": 1e-4}


def test_the_edge_of_the_search_is_said_in_words(tmp_path):
    study = searched(tmp_path, {
        ("sparse", SHORT, 1e-4): (1, 1), ("sparse", SHORT, 1e-3): (5, 5), ("red", SHORT, 1e-4): (1, 1),
    })  # fmt: skip
    assert edge_note(chosen_rates(study)).endswith("may be better: sparse (0.001).")
    assert edge_note({"at_the_edge_of_the_search": [], "learning_rates": {}}) == ""
