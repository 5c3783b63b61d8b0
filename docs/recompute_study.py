"""The study's main tables and its leads at equal KL again, with numpy and nothing of tokenmdp.

    python docs/recompute_study.py                       # the second edition
    python docs/recompute_study.py docs/study_results    # the first

For readers who would rather not trust our statistics. Prints, for each setting and method: its runs, the mean score
over updates and runs, the difference to sparse's run of the same setting and seed with its 95% t interval, and the same
of the updates in which a run's KL lies in 6 to 9, 9 to 12 and 12 to 15 nats. Settings without sparse are left out.
"""

import json
import lzma
import sys
from pathlib import Path

import numpy as np

PLACE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "study_second"
BINS = ((6, 9), (9, 12), (12, 15))
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t, 97.5%

settings: dict = {}  # everything but the method and the seed -> method -> seed -> (score, KL) of each update
names: dict = {}
for line in lzma.decompress((PLACE / "cells.jsonl.xz").read_bytes()).decode().splitlines():
    record = json.loads(line)
    cell, columns = record["cell"], record["metrics"]
    rest = {name: value for name, value in cell["settings"].items() if not name.startswith(("credit", "seed"))}
    key = json.dumps([cell["updates"], rest], sort_keys=True)
    names.setdefault(key, cell["setting"])
    run = np.array(columns["score_mean"]), np.array(columns["kl"])
    settings.setdefault(key, {}).setdefault(cell["method"], {})[cell["seed"]] = run


def difference(runs, baseline, measure):
    """The mean over seeds of the measure of some runs less that of others, with its 95% t interval."""
    values = np.array([measure(*runs[seed]) - measure(*baseline[seed]) for seed in runs.keys() & baseline.keys()])
    values = values[np.isfinite(values)]
    half = T[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return f"{values.mean():.2f} [{values.mean() - half:.2f}, {values.mean() + half:.2f}]" if len(values) else "none"


def within(low, high):
    """The mean score of the updates of a run whose KL lies there; NaN where there are none."""
    return lambda score, kl: score[there].mean() if (there := (low <= kl) & (kl < high)).any() else np.nan


print("setting | method | runs | mean score | less sparse | the same at 6 to 9 nats | at 9 to 12 | at 12 to 15")
for key, methods in settings.items():
    for method, runs in methods.items() if "sparse" in methods else ():
        row = [names[key], method, str(len(runs)), f"{np.mean([score.mean() for score, _ in runs.values()]):.2f}"]
        if method != "sparse":
            measures = (lambda score, kl: score.mean(), *(within(*ends) for ends in BINS))
            row += [difference(runs, methods["sparse"], measure) for measure in measures]
        print(" | ".join(row))
