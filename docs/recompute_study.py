"""The study's main table and its leads at equal KL again, with numpy and nothing of tokenmdp.

    python docs/recompute_study.py

For readers who would rather not trust our statistics. Prints, for each method at 8 to 15 tokens: its runs, the mean
score over updates and runs, the difference to sparse's run of the same seed with its 95% t interval, and the same of
the updates in which a run's KL lies in 6 to 9, 9 to 12 and 12 to 15 nats.
"""

import json
import lzma
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "study_results" / "cells.jsonl.xz"
BINS = ((6, 9), (9, 12), (12, 15))
T = {2: 4.303, 4: 2.776, 9: 2.262}  # Student's t, 97.5%, by degrees of freedom, from any table

runs: dict = {}  # method -> seed -> (score, KL) of each update
for line in lzma.decompress(FILE.read_bytes()).decode().splitlines():
    record = json.loads(line)
    cell, columns = record["cell"], record["metrics"]
    if cell["setting"] == "8-16 tokens" and cell["updates"] == 150:  # 250 are those over credit_beta
        run = np.array(columns["score_mean"]), np.array(columns["kl"])
        runs.setdefault(cell["method"], {})[cell["seed"]] = run


def difference(method, measure):
    """The mean over seeds of the method's measure less sparse's, with its 95% t interval."""
    both = sorted(runs[method].keys() & runs["sparse"].keys())
    values = np.array([measure(*runs[method][seed]) - measure(*runs["sparse"][seed]) for seed in both])
    values = values[np.isfinite(values)]
    half = T[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.2f} [{values.mean() - half:.2f}, {values.mean() + half:.2f}]"


def within(low, high):
    """The mean score of the updates of a run whose KL lies there."""
    return lambda score, kl: score[(low <= kl) & (kl < high)].mean()


print("method | runs | mean score | less sparse | the same at 6 to 9 nats | at 9 to 12 | at 12 to 15")
for method, found in runs.items():
    row = [method, str(len(found)), f"{np.mean([score.mean() for score, _ in found.values()]):.2f}"]
    if method != "sparse":
        row += [
            difference(method, lambda score, kl: score.mean()),
            *(difference(method, within(*ends)) for ends in BINS),
        ]
    print(" | ".join(row))
