"""The benchmark of rounds: what it reports of runs that are there, and one small run of each arm."""

import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "rounds.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import rounds  # noqa: E402


def write(out, arm, seed, *policies):
    path = rounds.record(out, arm, seed)
    path.write_text(json.dumps([rounds.Policy([judge] * 2, [0.0], kl)._asdict() for judge, kl in policies]))


@pytest.fixture
def out(tmp_path):
    """All at once rises by 1 per root of a nat, a fixed reference by 2; it goes farther."""
    for seed in (1, 2, 3):
        write(tmp_path, "all at once", seed, (seed, 0.0), (seed + 2.0, 4.0))
        write(tmp_path, "fixed reference", seed, (seed, 0.0), (seed + 2.0, 1.0), (seed + 4.0, 4.0), (seed + 6.0, 9.0))
    return tmp_path


def test_runs_are_compared_at_equal_kl_seed_by_seed(out, capsys):
    rounds.report(out)
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() == printed
    assert printed.splitlines()[-1].split("|")[2].strip() == "round 3"
    assert printed.splitlines()[-1].split("|")[-2].strip() == "2.00 [2.00, 2.00]"  # both where the root is 2
    chance = 1 / (1 + math.exp(-4))  # of a response that is better by 4
    elo = f"{400 * math.log10(chance / (1 - chance)):+.0f}"
    assert printed.splitlines()[-1].split("|")[-3].strip() == f"{elo} [{elo}, {elo}]"
    assert printed.splitlines()[2].split("|")[-2].strip() == ""
    assert (out / "rounds.png").stat().st_size > 10_000


def test_comparisons_must_divide(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rounds.main(["--out", str(tmp_path), "--pairs", "10"])
    assert "--pairs 10 does not divide into 3 rounds" in capsys.readouterr().err


@pytest.mark.long
def test_every_arm_runs_once_and_asks_the_same_number(tmp_path, monkeypatch):
    order = ["--out", str(tmp_path), "--seeds", "1", "--pairs", "48", "--updates", "1", "--eval-samples", "4"]
    rounds.main(order)
    first = rounds.read(tmp_path)
    assert {arm: [len(run) for run in runs.values()] for arm, runs in first.items()} == {
        "all at once": [2], "fixed reference": [4], "moved reference": [4]
    }  # fmt: skip
    for arm, runs in rounds.ARMS.items():
        last = rounds.record(tmp_path, arm, 1).with_suffix("") / f"round-{runs['rounds']}" / "comparisons.jsonl"
        assert len(last.read_text().splitlines()) == 48
    monkeypatch.setattr(rounds, "rlhf", lambda *_: pytest.fail("run again"))
    rounds.main(order)
    assert rounds.read(tmp_path) == first
