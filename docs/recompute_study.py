"""The study's main tables and its leads at equal KL again, with numpy and nothing of tokenmdp.

    python docs/recompute_study.py                       # the second edition
    python docs/recompute_study.py docs/study_results    # the first

For readers who would rather not trust our statistics. Prints, for each setting and method: its runs, the mean score
over updates and runs, the variance of returns that the critic explains (median over the first third of a run's
updates, mean over runs), the difference to sparse's run of the same setting and seed with its 95% t interval, and the
same of the updates in which a run's KL lies in 6 to 9, 9 to 12 and 12 to 15 nats, and each seed's mean over these.
Settings without sparse are named and left out. No interval is corrected for their number.
"""

import json
import lzma
import sys
from pathlib import Path

import numpy as np

PLACE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "study_second"
BINS = ((6, 9), (9, 12), (12, 15))
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t, 97.5%

settings: dict = {}  # everything but method and seed -> method -> seed -> columns: a value for each update
names: dict = {}  # a setting may have a name in each of several grids
for line in lzma.decompress((PLACE / "cells.jsonl.xz").read_bytes()).decode().splitlines():
    record = json.loads(line)
    cell, columns = record["cell"], record["metrics"]
    rest = {name: value for name, value in cell["settings"].items() if not name.startswith(("credit", "seed"))}
    key = json.dumps([cell["updates"], rest], sort_keys=True)
    names.setdefault(key, set()).add(cell["setting"])
    run = [np.array(columns[name]) for name in ("score_mean", "kl", "explained_variance")]
    settings.setdefault(key, {}).setdefault(cell["method"], {})[cell["seed"]] = run


def differences(runs, baseline, measure):
    """The measure of some runs less that of others, seed by seed."""
    return np.array([measure(*runs[seed]) - measure(*baseline[seed]) for seed in sorted(runs.keys() & baseline.keys())])


def told(values):
    """The mean over seeds with its 95% t interval."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return "too few"
    half = T[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))
    mean, low, high = np.round(values.mean() + half * np.array([0, -1, 1]), 2) + 0.0  # no negative zero
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def within(low, high):
    """The mean score of the updates of a run whose KL lies there; NaN where there are none."""
    return lambda score, kl, _: score[there].mean() if (there := (low <= kl) & (kl < high)).any() else np.nan


print("setting | method | runs | mean | explained | less sparse | 6 to 9 nats | 9 to 12 | 12 to 15 | their mean")
for key, methods in settings.items():
    name = " = ".join(sorted(names[key]))
    if "sparse" not in methods:
        print(f"{name} | no sparse, left out: {', '.join(methods)}")
        continue
    for method, runs in methods.items():
        mean = np.mean([score.mean() for score, _, _ in runs.values()])
        explained = np.mean([np.median(variance[: -(-len(variance) // 3)]) for _, _, variance in runs.values()])
        row = [name, method, str(len(runs)), f"{mean:.2f}", f"{explained:.2f}"]
        if method != "sparse":
            row.append(told(differences(runs, methods["sparse"], lambda score, *_: score.mean())))
            bins = np.stack([differences(runs, methods["sparse"], within(*ends)) for ends in BINS])
            seeds = [column[np.isfinite(column)] for column in bins.T]  # each seed's mean over the bins that it has
            row += [*map(told, bins), told(np.array([some.mean() for some in seeds if len(some)]))]
        print(" | ".join(row))
