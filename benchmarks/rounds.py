"""Do rounds of RLHF pay? The same number of comparisons, all at the start or of the policies as they learn.

    python benchmarks/rounds.py --out runs/rounds             # all that is missing; interrupt it and run it again
    python benchmarks/rounds.py --out runs/rounds --table     # of what is there

all at once        one round with all comparisons
fixed reference    rounds that begin at the start again, each with the comparisons of all rounds so far
moved reference    rounds that go on from the latest policy, near it: the rewards of all rounds add up

Every run is a pipeline of `tokenmdp rlhf`. With --part 0/2 and --part 1/2 two processes share the work.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from tokenmdp.evaluation.policies import Evaluation
from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.drawing import dress, error_bars, new_figure, write_figure
from tokenmdp.runs.directory import claim
from tokenmdp.runs.pipeline import PipelineSettings, Stage, elo, rlhf
from tokenmdp.runs.settings import PRESETS
from tokenmdp.study.equal_kl import score_at_kl

ROUNDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "all at once": {"rounds": 1},
    "fixed reference": {"rounds": ROUNDS},
    "moved reference": {"rounds": ROUNDS, "start": "last", "reference": "moved"},
}
FIRST = "all at once"  # what the others are compared with

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--pairs", type=int, default=4098, help=f"comparisons of a run, divisible by {ROUNDS}")
parser.add_argument("--updates", type=int, default=PRESETS["quick"].updates, help="of PPO in each round")
parser.add_argument("--algorithm", default="ppo", help="ppo, rloo or dpo")
parser.add_argument("--eval-samples", type=int, default=256, help="responses per policy")
parser.add_argument("--part", default="0/1", help="K/N: every N-th run from the K-th on")
parser.add_argument("--table", action="store_true", help="only report what is there")


class Policy(NamedTuple):
    """One policy of a run: what was measured on held-out prompts."""

    judge: list[float]  # by response
    proxy: list[float]  # by its reward model; empty for the start
    kl: float  # to the start, nats per sequence


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if args.pairs % ROUNDS:
        parser.error(f"--pairs {args.pairs} does not divide into {ROUNDS} rounds")
    if not args.table:
        made_of = {name: getattr(args, name) for name in ("pairs", "updates", "algorithm", "eval_samples")}
        claim(args.out / "settings.json", "comparisons of pipelines", made_of)
        part, parts = map(int, args.part.split("/"))
        for arm, seed in [(arm, seed) for seed in range(1, args.seeds + 1) for arm in ARMS][part::parts]:
            path, begun = record(args.out, arm, seed), time.monotonic()
            if not path.exists():
                settings = PipelineSettings(
                    pairs_per_round=args.pairs // ARMS[arm]["rounds"],
                    updates=None if args.algorithm == "dpo" else args.updates,
                    algorithm=args.algorithm,
                    eval_samples=args.eval_samples,
                    seed=seed,
                    **ARMS[arm],
                )
                stages = rlhf(settings, path.with_suffix(""), Console(file=io.StringIO()))
                write_text(path, json.dumps([measured(stage)._asdict() for stage in stages]) + "\n")
                print(f"{path.stem}: {time.monotonic() - begun:.0f} s", flush=True)
    report(args.out)


def record(out: Path, arm: str, seed: int) -> Path:
    """The file with a run's policies; beside it, without the suffix, the pipeline."""
    return out / f"{arm.replace(' ', '-')}-seed{seed}.json"


def measured(stage: Stage) -> Policy:
    """What is kept of a stage; its reward model's scores are the evaluation's second ones."""
    found = stage.evaluation
    return Policy(found.scores, found.gold, float(np.mean(found.kls)))


def read(out: Path) -> dict[str, dict[int, list[Policy]]]:
    """Arm -> seed -> policies from the start to the last round, of the runs that are there."""
    return {
        arm: {
            int(path.stem.rpartition("seed")[2]): [Policy(**one) for one in json.loads(path.read_text())]
            for path in sorted(out.glob(record(out, arm, 0).name.replace("seed0", "seed*")))
        }
        for arm in ARMS
    }


def lead(runs: Mapping[int, list[Policy]], base: Mapping[int, list[Policy]]) -> Estimate | None:
    """The judge's score of the last policies less the base's at the same KL, seed by seed, as far as both reach.

    Between a run's policies the score is taken linear in the root of the KL.
    """
    leads = []
    for seed in runs.keys() & base.keys():
        level = min(last_root(runs[seed]), last_root(base[seed]))
        own, other = (
            score_at_kl([root(one) for one in each], [float(np.mean(one.judge)) for one in each], [level])[0]
            for each in (runs[seed], base[seed])
        )
        leads.append(own - other)
    return mean_interval(leads) if leads else None


def root(policy: Policy) -> float:
    """Of its KL."""
    return math.sqrt(max(policy.kl, 0.0))


def last_root(run: list[Policy]) -> float:
    """Of the largest KL of a run."""
    return max(map(root, run))


def report(out: Path) -> None:
    """Write and print ``table.md``, and draw the runs; intervals are Student's t over the seeds' means."""
    arms = {arm: runs for arm, runs in read(out).items() if runs}
    if not arms:
        print(f"{out} holds no finished run yet")
        return
    lines = [
        f"| | policy | seeds | judge's score | KL, nats | reward model's score | Elo against {FIRST} "
        f"| less {FIRST}, at equal KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in arms.items():
        for number in range(1, len(next(iter(runs.values())))):
            at = [run[number] for run in runs.values()]
            cells = [mean_interval([float(np.mean(numbers)) for numbers in column]) for column in
                     ([one.judge for one in at], [one.kl for one in at], [one.proxy for one in at])]  # fmt: skip
            last = arm != FIRST and number == len(next(iter(runs.values()))) - 1
            versus, gain = (elo_of(runs, arms[FIRST]), lead(runs, arms[FIRST])) if last and FIRST in arms else ("", "")
            row = [arm, f"round {number}", len(runs), *cells, versus or "", gain or ""]
            lines.append(f"| {' | '.join(map(str, row))} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(arms, out)


def elo_of(runs: Mapping[int, list[Policy]], base: Mapping[int, list[Policy]]) -> str:
    """Elo of the last policies against the base's, over seeds."""
    pairs = [(runs[seed][-1].judge, base[seed][-1].judge) for seed in sorted(runs.keys() & base.keys())]
    found = [elo(*(Evaluation(scores, [], [], []) for scores in pair)).value for pair in pairs]
    if not found:
        return ""
    value, low, high = mean_interval(found)
    return f"{value:+.0f}" + (f" [{low:+.0f}, {high:+.0f}]" if math.isfinite(low) else "")


def draw(arms: Mapping[str, Mapping[int, list[Policy]]], out: Path) -> None:
    """The judge's score and the reward model's against the root of the KL, round after round."""
    figure = new_figure(9.5, 4.2)
    left, right = figure.subplots(1, 2)
    for number, (arm, runs) in enumerate(arms.items()):
        steps = list(zip(*runs.values(), strict=True))
        across = [float(np.mean([root(one) for one in step])) for step in steps]
        for axes, name, first in ((left, "judge", 0), (right, "proxy", 1)):
            heights = [mean_interval([float(np.mean(getattr(one, name))) for one in step]) for step in steps[first:]]
            axes.errorbar(
                across[first:], [one.value for one in heights], yerr=error_bars(heights), capsize=3, markersize=5,
                marker=MARKERS[number], color=COLOURS[number], label=arm,
            )  # fmt: skip
    for axes, title in ((left, "judge"), (right, "the reward model of the round")):
        dress(axes, title, "square root of the KL to the start, nats", "mean score")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    write_figure(figure, out, "rounds")


if __name__ == "__main__":
    main()
