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
    every = [rounds.Policy([judge] * 2, [0.0], kl)._asdict() for judge, kl in policies]
    path.write_text(json.dumps({"comparisons": 30, "policies": every}))


@pytest.fixture
def out(tmp_path):
    """A fixed reference ends higher and farther; a round before its last one is farther still and worse."""
    for seed in (1, 2, 3):
        write(tmp_path, "all at once", seed, (seed, 0.0), (seed + 2.0, 4.0))
        write(tmp_path, "fixed reference", seed, (seed, 0.0), (seed + 2.0, 1.0), (seed + 1.0, 16.0), (seed + 6.0, 9.0))
    return tmp_path


def test_last_policies_are_compared_at_equal_kl_seed_by_seed(out, capsys):
    rounds.report(out)
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() == printed
    last = [cell.strip() for cell in printed.splitlines()[-1].split("|")[1:-1]]
    assert last[:4] == ["fixed reference", "3", "30", "round 3"]
    assert last[-2] == "2.00 [2.00, 2.00]"  # 4 above the start where the root is 2, and the other one is 2
    assert last[-1] == "2.00 [2.00, 2.00]"  # between 2 above it at a root of 1 and 6 at 3
    chance = 1 / (1 + math.exp(-4))  # of a response that is better by 4
    elo = f"{400 * math.log10(chance / (1 - chance)):+.0f}"
    assert last[-3] == f"{elo} [{elo}, {elo}]"
    assert printed.splitlines()[2].split("|")[-2].strip() == ""
    assert (out / "rounds.png").stat().st_size > 10_000


def test_the_line_through_the_rounds_is_another_one():
    policies = [rounds.Policy([score], [], kl) for score, kl in ((0.0, 0.0), (0.0, 1.0), (3.0, 9.0))]
    assert rounds.on_the_line(policies, 2.0) == 1.5
    assert rounds.on_the_line((policies[0], policies[-1]), 2.0) == 2.0


def test_comparisons_must_divide(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rounds.main(["--out", str(tmp_path), "--pairs", "10"])
    assert "--pairs 10 does not divide into 3 rounds" in capsys.readouterr().err


@pytest.mark.long
def test_every_arm_runs_once_and_asks_the_same_number(tmp_path, monkeypatch):
    order = ["--out", str(tmp_path), "--seeds", "1", "--pairs", "48", "--updates", "1", "--eval-samples", "4"]
    rounds.main(order)
    first = rounds.read(tmp_path)
    assert {arm: len(runs[1].policies) for arm, runs in first.items()} == {
        "all at once": 2, "all at once, longer": 2, "fixed reference": 4, "moved reference": 4
    }  # fmt: skip
    assert all(40 <= runs[1].comparisons <= 48 for runs in first.values())
    record = json.loads((rounds.record(tmp_path, rounds.LONGER, 1).with_suffix("") / "pipeline.json").read_text())
    assert record["settings"]["updates"] == 3
    monkeypatch.setattr(rounds, "rlhf", lambda *_: pytest.fail("run again"))
    rounds.main(order)
    assert rounds.read(tmp_path) == first
