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


def test_ends_are_averaged_over_seeds(tmp_path, capsys):
    for seed in (1, 2):
        for run, more in {"js": 0.0, "tv": 0.25}.items():
            curves = {name: [float(seed), 4.0] for name in targets.CURVES}
            end = {"alignment": 2.0 + seed + more * seed, "kl": 1.0, "distinct_2": 0.5, "tv": 0.25}
            file = targets.record(tmp_path, "sentiment", run, seed)
            file.write_text(json.dumps({"seed": seed, "curves": curves, "end": end}))
        place = {"alignment": 4.0, "kl": 3.0, "effective": 50.0, "start": 0.125}
        targets.record(tmp_path, "sentiment", targets.PLACE, seed).write_text(json.dumps(place))
    targets.report(tmp_path)
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert rows[2] == ["sentiment", "the start", "2", "0.125 [0.125, 0.125]", "", "0", "", "", ""]
    assert rows[3][1:4] == ["the target, by 50 effective responses", "2", "4 [4, 4]"]
    assert rows[4][:5] == ["sentiment", "js", "2", "3.5 [-2.85, 9.85]", ""]
    assert rows[5][3:5] == ["3.88 [-4.07, 11.8]", "0.375 [-1.21, 1.96]"]  # .25 and .5 above JS of the same seed
    assert rows[5][7] == "0 [0, 0]"
    assert len(rows) == 6
    assert (tmp_path / "targets.png").stat().st_size > 10_000


def test_a_target_that_no_response_meets_is_named(monkeypatch):
    monkeypatch.setattr(targets, "GOALS", {"odd": targets.Goal("word:qzxv", 4, {})})
    with pytest.raises(SystemExit, match="none of --samples 4 responses meets word:qzxv"):
        targets.place_of("odd", 1, 4)


def test_parts_are_checked(tmp_path, capsys):
    with pytest.raises(SystemExit):
        targets.main(["--out", str(tmp_path), "--part", "2/2"])
    assert "'2/2' is not K/N with K from 0 to N - 1" in capsys.readouterr().err


@pytest.mark.long
def test_a_target_has_its_moment_and_a_run_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "SAMPLES", 8)
    goal = targets.Goal("words:not,no,never,nothing@0.5", 16, {"js": {"divergence": "js", "moment_samples": 64}})
    monkeypatch.setattr(targets, "GOALS", {"negation": goal})
    order = ["--out", str(tmp_path), "--goals", "negation", "--seeds", "1", "--updates", "1", "--samples", "256"]
    targets.main(order)
    (place,), (run,) = (targets.read(tmp_path, "negation", name) for name in (targets.PLACE, "js"))
    assert place["alignment"] == pytest.approx(0.5, abs=1e-6)
    # Of all distributions with that moment the target is the nearest one, of two parts with their shares changed.
    base = place["start"]
    assert 0 < base < 0.5
    assert place["kl"] == pytest.approx(0.5 * targets.np.log(0.25 / base / (1 - base)), abs=1e-6)
    assert 1 < place["effective"] < 256
    assert {name: len(column) for name, column in run["curves"].items()} == dict.fromkeys(targets.CURVES, 1)
    assert 0 <= run["end"]["alignment"] <= 1
    monkeypatch.setattr(targets, "trained", lambda *_: pytest.fail("made again"))
    targets.main(order)
