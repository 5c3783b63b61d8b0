"""The frontier: cells are read, compared at equal KL, and drawn; a soup needs its member."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "frontier.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from frontier_parts import cells, lines, report  # noqa: E402


def write(out, name, value, seed, judge, kl, **more):
    path = lines.place(out, name, value, seed).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    one = {"judge": [judge - 1, judge + 1], "reward_model": [0.0, 0.0], "kl": [kl, kl], "distinct_2": 0.5}
    path.write_text(json.dumps(one | {"seconds": 1.0, "texts_scored": 64} | more))


def log(out, name, seed, seconds):
    """Ten updates, each of so many seconds, of which the n-th reaches n."""
    path = lines.place(out, name, report.MIDDLE, seed) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    records = [{"seconds": seconds, "score_mean": n + 1.0, "kl_coef": 0.5, "kl": 2.0} for n in range(1, 11)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def out(tmp_path):
    """Scores rise by 1 per root of a nat for PPO, by 2 for RLOO; they start at .5."""
    for seed in (1, 2):
        for value, kl in zip(lines.KL_COEFS, (1.0, 4.0, 9.0), strict=True):
            score = 0.5 + seed / 10 + math.sqrt(kl)
            write(tmp_path, "PPO, sparse", value, seed, score, kl, start=[0.5])
            write(tmp_path, "RLOO", value, seed, score + math.sqrt(kl), kl)
            write(tmp_path, "PPO, red", value, seed, score, kl, reward_model=[2 * score])
    for name, seconds in (("PPO, sparse", 2.0), ("PPO, red", 4.0), ("RLOO", 1.0)):
        for seed in (1, 2):
            log(tmp_path, name, seed, seconds)
    return tmp_path


def test_lines_are_compared_at_equal_kl_seed_by_seed(out):
    found, start = report.read(out)
    assert (len(found), start) == (18, 0.5)
    assert report.at(found, "RLOO", 1) == pytest.approx([0.6 + 2 * math.sqrt(level) for level in report.LEVELS])
    table = report.equal_kl(found)
    assert table[-1].startswith("| RLOO | 3.10 [2.46, 3.73] (2 seeds) | 1.22 [1.22, 1.22] (2 seeds) |")
    assert table[2].split("|")[3].strip() == "", "a line is not compared with itself"


def test_nothing_is_said_beyond_a_lines_policies(tmp_path):
    write(tmp_path, "DPO", 0.3, 1, 1.5, 2.0, start=[0.5])
    write(tmp_path, "DPO", 0.1, 1, 2.5, 4.0, start=[0.5])
    found, _ = report.read(tmp_path)
    nearest, between, farthest = report.at(found, "DPO", 1)
    assert nearest is farthest is None
    assert 1.5 < between < 2.5
    assert report.at(found, "RLOO", 1) == [None, None, None]


def test_pairs_are_of_the_same_seed(out):
    for seed, score in ((1, 3.0), (2, 5.0)):
        for value, kl in zip(lines.KL_COEFS, (1.0, 4.0, 9.0), strict=True):
            write(
                out, "DPO", {1.0: 0.3, 0.45: 0.1, 0.15: 0.03}[value], seed, 0.5 + seed / 10 + math.sqrt(kl) - score, kl
            )
    found, _ = report.read(out)
    (row,) = [row for row in report.pairs(found, []) if row.startswith("| PPO, red less DPO")]
    assert row.count("4.00 [-8.71, 16.71] (2 seeds)") == len(report.LEVELS)


def test_an_empty_directory_says_so(tmp_path, capsys):
    report.report(tmp_path)
    assert "holds no finished cell yet" in capsys.readouterr().out


def test_a_slower_run_has_fewer_updates_at_equal_seconds(out):
    sparse, red, rloo = report.equal_time_table(report.equal_time(out))[3:]
    same, reached = "8.00 [8.00, 8.00]", "3.00 [3.00, 3.00] | -5.00 [-5.00, -5.00]"
    assert sparse == f"| PPO, sparse | 2 | 20 | {same} | 0.00 [0.00, 0.00] | {reached} |"
    assert red == f"| PPO, red | 2 | 40 | {same} | 0.00 [0.00, 0.00] |  |  |", "2 updates are too few"
    assert rloo == f"| RLOO | 2 | 10 | {same} |  | {same} |  |"


def test_equal_time_needs_the_same_seeds_of_all(out):
    lines.place(out, "RLOO", report.MIDDLE, 2).with_suffix(".json").unlink()
    assert [one.seed for one in report.equal_time(out)] == [1, 1, 1]
    lines.place(out, "RLOO", report.MIDDLE, 1).with_suffix(".json").unlink()
    assert report.equal_time(out) == []
    assert report.equal_time_table([]) == []


def test_both_scores_are_drawn_along_the_kl(out):
    found, _ = report.read(out)
    for key, factor in (("judge", 1), ("reward_model", 2)):
        assert [(kl, one.value) for kl, one in report.along(found, "PPO, red", key)] == [
            (kl, pytest.approx(factor * (0.65 + kl))) for kl in (1.0, 2.0, 3.0)
        ]


def test_everything_is_written(out, capsys):
    report.report(out)
    assert (out / "table.md").read_text() == capsys.readouterr().out
    rows = (out / "cells.csv").read_text().splitlines()
    assert len(rows) == 20
    assert rows[1] == '"start",0,0,0.5,nan,0,nan,0,0'
    assert rows[2] == '"PPO, sparse",1,1,1.6,0,1,0.5,1,64'
    for name in ("frontier", "both_scores"):
        assert (out / f"{name}.png").stat().st_size > 10_000


def test_the_two_files_tell_what_the_runs_do(out, capsys):
    report.report(out)
    told = capsys.readouterr().out
    shutil.rmtree(out / "runs")
    report.report(out)
    assert capsys.readouterr().out == told


def test_the_page_has_the_tables_of_the_shipped_numbers():
    page = (BENCHMARKS.parent / "docs" / "frontier" / "README.md").read_text()
    folder = BENCHMARKS.parent / "docs" / "frontier"
    (start, *found), timed = (
        report.read_csv(folder / f"{name}.csv", kind)
        for name, kind in (("cells", report.Cell), ("equal_time", report.Timed))
    )
    assert len(found) == sum(5 * len(line.values) for line in lines.LINES.values())
    assert start.line == "start"
    tables = (
        report.every_cell(found), report.equal_kl(found), report.pairs(found, timed),
        report.equal_time_table(timed)[1:],
    )  # fmt: skip
    for table in tables:
        assert "\n".join(table) in page


def test_a_soup_says_which_run_it_needs(tmp_path):
    sources = cells.Sources(tmp_path / "pairs.jsonl", "imdb-tiny", tmp_path, 1)
    with pytest.raises(cells.MemberMissing, match=r"PPO, sparse, kl_coef 0\.15, seed 3"):
        cells.measured(sources, "soup", 0.5, 3)
