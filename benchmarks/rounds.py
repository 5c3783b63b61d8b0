"""Do rounds of RLHF pay? As many comparisons, all made before training or round by round on the latest policy's texts.

    python benchmarks/rounds.py --out runs/rounds             # all that is missing; interrupt it and run it again
    python benchmarks/rounds.py --out runs/rounds --table     # of what is there

all at once            one round with all comparisons
all at once, longer    the same with as many updates as all rounds together
fixed reference        each round begins at the start again, with the comparisons of all rounds so far
moved reference        each round goes on from the latest policy and measures the KL to it: the rewards of all add up

The last policy of a fixed reference has learned as long as that of "all at once", that of a moved one three times as
long. Every run is a pipeline of `tokenmdp rlhf`. With --part 0/2 and --part 1/2 two processes share the work.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from shares import add_part, make_missing

from tokenmdp.evaluation.policies import Evaluation
from tokenmdp.files import read_json, write_text
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.preferences import read_records
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.drawing import dress, error_bars, new_figure, write_figure
from tokenmdp.report.pipeline_page import whole
from tokenmdp.runs.directory import claim
from tokenmdp.runs.pipeline import PipelineSettings, Stage, rlhf
from tokenmdp.runs.pipeline_report import elo
from tokenmdp.runs.settings import PRESETS
from tokenmdp.study.equal_kl import score_at_kl

ROUNDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "all at once": {"rounds": 1},
    "all at once, longer": {"rounds": 1},
    "fixed reference": {"rounds": ROUNDS},
    "moved reference": {"rounds": ROUNDS, "start": "last", "reference": "moved"},
}
FIRST, LONGER = "all at once", "all at once, longer"  # what the others are compared with; three times the updates

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--pairs", type=int, default=4098, help=f"sampled in a run, divisible by {ROUNDS}")
parser.add_argument("--updates", type=int, default=PRESETS["quick"].updates, help="in each round")
parser.add_argument("--algorithm", default="ppo", choices=("ppo", "rloo"))
parser.add_argument("--eval-samples", type=int, default=256, help="responses per policy")
add_part(parser)
parser.add_argument("--table", action="store_true", help="only report what is there")


class Policy(NamedTuple):
    """One policy of a run: what was measured on held-out prompts."""

    judge: list[float]  # by response
    proxy: list[float]  # by its reward model; empty for the start
    kl: float  # to the start, nats per sequence


class Run(NamedTuple):
    """A finished run."""

    comparisons: int  # that were not tied
    policies: list[Policy]  # from the start to the last round


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if args.pairs % ROUNDS:
        parser.error(f"--pairs {args.pairs} does not divide into {ROUNDS} rounds")
    if not args.table:
        made_of = {name: getattr(args, name) for name in ("pairs", "updates", "algorithm", "eval_samples")}
        claim(args.out / "settings.json", "comparisons of pipelines", made_of)
        for arm, seed in [(arm, seed) for seed in range(1, args.seeds + 1) for arm in ARMS][args.part]:
            make_missing(record(args.out, arm, seed), partial(played, arm, seed, args))
    report(args.out)


def played(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Run` of a pipeline that is played, or gone on with."""
    settings = PipelineSettings(
        pairs_per_round=args.pairs // ARMS[arm]["rounds"],
        updates=args.updates * (ROUNDS if arm == LONGER else 1),
        algorithm=args.algorithm,
        eval_samples=args.eval_samples,
        seed=seed,
        **ARMS[arm],
    )
    place = record(args.out, arm, seed).with_suffix("")
    policies = [measured(stage)._asdict() for stage in rlhf(settings, place, Console(file=io.StringIO()))]
    asked = len(read_records(place / f"round-{settings.rounds}" / "comparisons.jsonl"))
    return {"comparisons": asked, "policies": policies}


def record(out: Path, arm: str, seed: int) -> Path:
    """The file with a run's policies; beside it, without the suffix, the pipeline."""
    return out / f"{arm.replace(',', '').replace(' ', '-')}-seed{seed}.json"


def measured(stage: Stage) -> Policy:
    """What is kept of a stage; its reward model's scores are the evaluation's second ones."""
    found = stage.evaluation
    return Policy(found.scores, found.gold, float(np.mean(found.kls)))


def read(out: Path) -> dict[str, dict[int, Run]]:
    """Arm -> seed -> run, of those that are there."""
    runs: dict[str, dict[int, Run]] = {}
    for arm in ARMS:
        for path in sorted(out.glob(record(out, arm, 0).name.replace("seed0", "seed*"))):
            one = read_json(path)
            policies = [Policy(**policy) for policy in one["policies"]]
            runs.setdefault(arm, {})[int(path.stem.rpartition("seed")[2])] = Run(one["comparisons"], policies)
    return runs


def lead(runs: Mapping[int, Run], base: Mapping[int, Run], rounds: bool) -> Estimate | None:
    """The judge's score of the last policies less that of the base's at the smaller one's KL, seed by seed.

    The farther policy counts with the score at that KL on a line in the root of the KL: the straight one from the start
    to it, or with ``rounds`` the one through all its policies.
    """
    leads = []
    for seed in runs.keys() & base.keys():
        both = runs[seed].policies, base[seed].policies
        level = min(root(policies[-1]) for policies in both)
        own, other = (on_the_line(policies if rounds else (policies[0], policies[-1]), level) for policies in both)
        leads.append(own - other)
    return mean_interval(leads) if leads else None


def on_the_line(policies: Sequence[Policy], level: float) -> float:
    """The judge's score at a root of the KL, linear between policies."""
    return float(score_at_kl([root(one) for one in policies], [np.mean(one.judge) for one in policies], [level])[0])


def root(policy: Policy) -> float:
    """The square root of a policy's KL; a negative estimate counts as 0."""
    return math.sqrt(max(policy.kl, 0.0))


def report(out: Path) -> None:
    """Write and print ``table.md``, and draw the runs; intervals are Student's t over the seeds' means."""
    arms = read(out)
    if not arms:
        print(f"{out} holds no finished run yet")
        return
    lines = [
        f"| | seeds | comparisons | policy | judge's score | KL, nats | reward model's score | Elo against {FIRST} "
        f"| less {FIRST}, at equal KL | the same through the rounds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in arms.items():
        rounds = ARMS[arm]["rounds"]
        asked = f"{np.mean([run.comparisons for run in runs.values()]):.0f}"
        for number in range(1, rounds + 1):
            at = [run.policies[number] for run in runs.values()]
            columns = ([np.mean(one.judge) for one in at], [one.kl for one in at], [np.mean(one.proxy) for one in at])
            versus = ["", "", ""]
            if arm != FIRST and number == rounds and FIRST in arms:
                leads = (lead(runs, arms[FIRST], rounds=through) for through in (False, True))
                versus = [elo_of(runs, arms[FIRST]), *(str(one or "") for one in leads)]
            row = [
                arm,
                str(len(runs)),
                asked,
                f"round {number}",
                *(str(mean_interval(one)) for one in columns),
                *versus,
            ]
            lines.append(f"| {' | '.join(row)} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(arms, out)


def elo_of(runs: Mapping[int, Run], base: Mapping[int, Run]) -> str:
    """Elo of the last policies against the base's, over seeds."""
    pairs = [[each[seed].policies[-1].judge for each in (runs, base)] for seed in sorted(runs.keys() & base.keys())]
    found = [elo(*(Evaluation(scores, [], [], []) for scores in pair)).value for pair in pairs]
    return whole(mean_interval(found)) if found else ""


def draw(arms: Mapping[str, Mapping[int, Run]], out: Path) -> None:
    """The judge's score and the reward model's against the root of the KL, round after round."""
    figure = new_figure(9.5, 4.2)
    left, right = figure.subplots(1, 2)
    for number, (arm, runs) in enumerate(arms.items()):
        steps = list(zip(*(run.policies for run in runs.values()), strict=True))
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
