"""The search for a critic: every kind of variant runs, and the table says what the records hold."""

import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "critic_search.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import critic_search  # noqa: E402

from tokenmdp.intervals import mean_interval  # noqa: E402

KINDS = (
    "zero", "zero, 3e-3, clipped apart", "zero, 3e-3, warm-up of 3", "random, returns normalised", "own trunk, 1e-4",
    "separate value model",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", KINDS)
def test_variants_learn(variant, monkeypatch):
    env, config = critic_search.TASKS["short"]
    small = env | {"num_envs": 4, "max_new_tokens": 4, "min_new_tokens": 0, "horizon_range": None}
    monkeypatch.setitem(critic_search.TASKS, "short", (small, config))
    record = critic_search.run("short", "sparse", variant, seed=1, updates=2)
    assert all(math.isfinite(number) for column in record["history"].values() for number in column)
    # The first values are zeros wherever the head is; afterwards every variant has moved it.
    assert record["history"]["explained_variance"][1] != 0


def record(seed, score, kl):
    history = {"score_mean": score, "kl": kl, "explained_variance": [0.0, 0.2, 0.4, 0.6]}
    return {
        "task": "short",
        "credit": "sparse",
        "variant": "zero",
        "seed": seed,
        "updates": 4,
        "kl_coef": 0.2,
        "history": history,
    }


def test_the_table_has_means_over_runs_at_the_end_and_at_equal_kl():
    records = [record(1, [0.0, 1.0, 2.0, 3.0], [0, 5, 10, 15]), record(2, [0.0, 1.0, 3.0, 5.0], [0, 10, 11, 13])]
    line = critic_search.table(records).splitlines()[-1]
    mean, end = mean_interval([1.5, 2.25]), mean_interval([3.0, 5.0])
    assert (
        line == f"| short | sparse | zero | 2 x 4 | {mean} | 2.00 | {end} | 14.0 | 1.20 | 0 | 0.00, 0.20, 0.40, 0.60 |"
    )


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    path = critic_search.cell_path(tmp_path, "short", "sparse", "zero, 3e-3", 1, 120)
    assert path.name == "short-sparse-zero_3e-3-120-1.json"
    path.write_text("{}")
    monkeypatch.setattr(critic_search.subprocess, "Popen", lambda *_: pytest.fail("a process was started"))
    critic_search.main(["--out", str(tmp_path), "--tasks", "short", "--variants", "zero, 3e-3"])


def test_the_first_edition_is_read_from_the_packed_study():
    records = critic_search.first_edition(BENCHMARKS.parent / "docs" / "study_results")
    runs = [record["seed"] for record in records if (record["task"], record["credit"]) == ("short", "sparse")]
    assert sorted(runs) == list(range(1, 11))
    assert {len(column) for record in records for column in record["history"].values()} == {120}
