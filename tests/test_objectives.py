"""The benchmark of two objectives: what it reports of policies that are there, and one policy of each kind."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "objectives.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import objectives  # noqa: E402


def write(out, method, weight, seed, *numbers):
    path = objectives.record(out, method, weight, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(objectives.Policy(*numbers)._asdict()))


def test_a_soup_is_compared_with_the_chord_of_the_same_seed(tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 10.0)):
        write(tmp_path, "PPO", 0.0, seed, 0.0 + shift, 1.0, 2.0)
        write(tmp_path, "PPO", 1.0, seed, 4.0 + shift, -1.0, 2.0)
        write(tmp_path, "PPO", 0.5, seed, 3.0 + shift, 0.0, 2.0)
        write(tmp_path, "PPO soup", 0.25, seed, 1.5 + shift, 0.5, 1.0)
    objectives.report(tmp_path, ("one", "other"))
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|") for line in printed.splitlines()}
    soup = rows["PPO soup", "0.25"]
    assert [cell.strip() for cell in soup[-4:-1]] == [
        "0.50 [0.50, 0.50]", "0.00 [0.00, 0.00]", "0.25 [0.25, 0.25], n=2"
    ]  # fmt: skip
    assert [cell.strip() for cell in rows["PPO", "0.5"][-4:-1]] == ["", "", "0.50 [0.50, 0.50], n=2"]
    assert soup[3].strip() == "2"
    assert rows["PPO", "1"][-4:-1] == ["  ", "  ", "  "]
    assert (tmp_path / "objectives.png").stat().st_size > 10_000


def test_a_policy_beyond_the_ends_is_on_no_chord():
    def policies(*firsts):
        return {seed: objectives.Policy(first, 1.0, 0.0) for seed, first in enumerate(firsts)}

    ends = policies(0.0, 0.0, 0.0), policies(1.0, 1.0, 0.0)
    beyond = objectives.above_chord_at_equal_first(ends, policies(1.5, 0.5, 0.0))
    assert beyond == "0.00, n=1", "the first lies beyond, the last has ends that are alike"
    assert objectives.above_chord_at_equal_first((policies(0.0), policies(1.0)), policies(-0.1)) == ""


def test_the_table_of_nothing(tmp_path, capsys):
    objectives.main(["--out", str(tmp_path), "--table"])
    assert "holds no measured policy yet" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_each_kind_of_policy_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objectives, "SAMPLES", 4)
    monkeypatch.setattr(
        objectives, "METHODS", {"start": (0.0,), "PPO": (0.0, 1.0), "PPO soup": (0.5,), "MODPO": (0.0, 0.5)}
    )
    order = ["--out", str(tmp_path), "--seeds", "1", "--updates", "1", "--pairs", "16"]
    objectives.main(order)
    first = objectives.found(tmp_path)
    assert {method: sorted(weights) for method, weights in first.items()} == {
        "start": [0.0], "PPO": [0.0, 1.0], "PPO soup": [0.5], "MODPO": [0.0, 0.5]
    }  # fmt: skip
    assert first["start"][0.0][1].kl == pytest.approx(0.0, abs=1e-5)
    assert (tmp_path / "seed1" / "PPO-soup-0.5" / "model.safetensors").exists()
    monkeypatch.setattr(objectives, "policy", lambda *_: pytest.fail("made again"))
    objectives.main(order)
    assert objectives.found(tmp_path) == first
