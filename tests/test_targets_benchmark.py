"""The benchmark of targets: its tables and figure of what is there, where a target is, and one run of each kind."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "targets.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import targets  # noqa: E402


def test_the_last_updates_are_averaged_seed_by_seed(tmp_path, capsys):
    for seed in (1, 2):
        columns = {name: [100.0] * 5 + [seed + place for place in range(5)] for name in targets.MEASURED}
        targets.record(tmp_path, "sentiment", "js", seed).write_text(json.dumps(columns))
        place = {"target": [4.0, 3.0, 50.0], "start": [0.125]}
        targets.record(tmp_path, "sentiment", targets.PLACE, seed).write_text(json.dumps(place))
    targets.report(tmp_path)
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert rows[2] == ["sentiment", "the start", "", "0.125", "0", "", "", ""]
    assert rows[3] == ["sentiment", "the target", "", "4", "3.00", "", "", "0"]
    assert rows[4][:4] == ["sentiment", "js", "2", "3.50 [-2.85, 9.85]"]
    assert len(rows) == 5
    assert (tmp_path / "targets.png").stat().st_size > 10_000


@pytest.mark.long
def test_a_target_has_its_moment_and_a_run_is_made_once(tmp_path, monkeypatch):
    goal = targets.Goal("words:not,no,never,nothing@0.5", 16, {"js": {"divergence": "js", "moment_samples": 64}})
    monkeypatch.setattr(targets, "GOALS", {"negation": goal})
    order = ["--out", str(tmp_path), "--goals", "negation", "--seeds", "1", "--updates", "1", "--samples", "256"]
    targets.main(order)
    (place,), (run,) = (targets.read(tmp_path, "negation", name) for name in (targets.PLACE, "js"))
    aligned, kl, effective = place["target"]
    assert aligned == pytest.approx(0.5, abs=1e-6)
    # Of all distributions with that moment the target is the nearest one, of two parts with their shares changed.
    base = place["start"][0]
    assert 0 < base < 0.5
    assert kl == pytest.approx(0.5 * targets.np.log(0.25 / base / (1 - base)), abs=1e-6)
    assert 1 < effective < 256
    assert {name: len(column) for name, column in run.items()} == dict.fromkeys(targets.MEASURED, 1)
    monkeypatch.setattr(targets, "trained", lambda *_: pytest.fail("made again"))
    targets.main(order)
