"""f-DPG towards three kinds of target: what each divergence gives up, and how far a rare one gets.

    python benchmarks/targets.py --out runs/targets             # all that is missing; interrupt it and run it again
    python benchmarks/targets.py --out runs/targets --table     # of what is there

sentiment    scalar: the bundled reward model's score, exp(score / 0.5)
excellent    binary: the word stands in the response, which it does in one of a hundred
woman        distributional: half of the responses mention a woman, which one of fifty does
negation     distributional, an easier one: half of the responses say "not", "no", "never" or "nothing"

Alignment is the mean score of a scalar target, otherwise the share of responses that have the feature. The target's own
alignment and KL are estimated on responses of the start, weighted by P / a. With --part 0/2 and --part 1/2 two
processes share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from tokenmdp.agents.f_dpg import FDPG, FDPGConfig
from tokenmdp.evaluation.policies import played
from tokenmdp.files import write_text
from tokenmdp.intervals import mean_interval
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.drawing import INK, dress, error_bars, new_figure, write_figure
from tokenmdp.runs.directory import claim
from tokenmdp.runs.environments import split_prompts
from tokenmdp.runs.settings import preset_settings
from tokenmdp.targets import Responses, read_target
from tokenmdp.types import Episode
from tokenmdp.wrappers import vector

POLICY, PLACE = "imdb-tiny", "place"  # place: where a target is
LAST = 5  # updates that are averaged at the end
MEASURED = ("alignment", "kl", "distinct_2", "entropy", "tv")


class Goal(NamedTuple):
    """A target, and who is sent there."""

    target: str
    num_envs: int
    runs: dict[str, dict[str, Any]]  # what each is called -> fields of `FDPGConfig`


def divergences(*names: str) -> dict[str, dict[str, Any]]:
    """A run for each divergence."""
    return {name: {"divergence": name} for name in names}


GOALS = {
    "sentiment": Goal("score/0.5", 128, divergences("reverse-kl", "js", "tv", "forward-kl")),
    "excellent": Goal("word:excellent", 256, divergences("js", "tv", "forward-kl")),
    "woman": Goal(
        "words:she,her,woman@0.5", 256,
        divergences("js") | {"js, lagged proposal": {"divergence": "js", "proposal": "lagged"}},
    ),
    "negation": Goal(
        "words:not,no,never,nothing@0.5", 256,
        divergences("js") | {"js, lagged proposal": {"divergence": "js", "proposal": "lagged"}},
    ),
}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--goals", nargs="+", choices=list(GOALS), default=list(GOALS))
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--updates", type=int, default=40)
parser.add_argument("--samples", type=int, default=4096, help="of the start, which tell where the target is")
parser.add_argument("--part", default="0/1", help="K/N: every N-th run from the K-th on")
parser.add_argument("--table", action="store_true", help="only report what is there")


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if not args.table:
        claim(args.out / "settings.json", "runs of f-DPG", {"updates": args.updates, "samples": args.samples})
        part, parts = map(int, args.part.split("/"))
        every = [(goal, run, seed) for seed in range(1, args.seeds + 1) for goal in args.goals
                 for run in (PLACE, *GOALS[goal].runs)]  # fmt: skip
        for goal, run, seed in every[part::parts]:
            path, begun = record(args.out, goal, run, seed), time.monotonic()
            if not path.exists():
                found = place_of(goal, seed, args.samples) if run == PLACE else trained(goal, run, seed, args.updates)
                write_text(path, json.dumps(found) + "\n")
                print(f"{path.stem}: {time.monotonic() - begun:.0f} s", flush=True)
    report(args.out)


def record(out: Path, goal: str, run: str, seed: int) -> Path:
    """The file of a run's metrics."""
    return out / f"{goal}-{run.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"


def envs_of(goal: str) -> gym.vector.VectorEnv:
    """The prompts that `tokenmdp train` learns on."""
    settings = preset_settings("quick", "f-dpg")
    return vector.SparseReward(
        gym.make_vec(
            "tokenmdp:TextGen-IMDb-v0", num_envs=GOALS[goal].num_envs, autoreset_mode="Disabled",
            score_when="all_done", reward_model=settings.reward_model, prompts=split_prompts(settings).training,
        )
    )  # fmt: skip


def trained(goal: str, run: str, seed: int, updates: int) -> dict[str, list[float]]:
    """Each measured metric by update."""
    fields = preset_settings("quick", "f-dpg").config | GOALS[goal].runs[run] | {"target": GOALS[goal].target}
    agent = FDPG(POLICY, envs_of(goal), FDPGConfig(**fields, seed=seed, device="cpu"))
    agent.learn(updates)
    agent.envs.close()
    # Of a distributional target the mean of its feature, which should reach the moment.
    aligned = next(name for name in agent.history[0] if name == "alignment" or name.startswith("moment_"))
    return {name: [float(one[aligned if name == "alignment" else name]) for one in agent.history] for name in MEASURED}


def place_of(goal: str, seed: int, samples: int) -> dict[str, list[float]]:
    """The target's alignment, its KL to the start, and how many responses that rests on; the start's alignment.

    On responses of the start, with weights w = P / a: alignment = E[w phi] / E[w], KL = E[w log w] / E[w] - log E[w],
    effective number = (sum of w)^2 / sum of w^2.
    """
    envs = envs_of(goal)
    start = CausalLMPolicy.for_task(POLICY, envs.unwrapped.task)
    texts: list[str] = []
    scores = []
    for rollout in played(envs, start, start, samples=samples, seed=seed, credited=0):
        episodes = Episode(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
        texts += Responses.of(episodes, envs.unwrapped.task.tokenizer).texts
        scores.append(rollout.scores)
    responses, nothing = Responses(texts, torch.cat(scores)), torch.zeros(len(texts), dtype=torch.float64)
    wanted = read_target(GOALS[goal].target)
    found = wanted.fitted(responses, nothing) if wanted.moments else wanted.fitted()
    phi = next(iter(found.measures(responses).values())).double()
    log_w = found.log_unnormalised(nothing, responses)
    share = log_w.softmax(0)
    kl = (share * torch.where(share > 0, log_w, 0.0)).sum() - log_w.logsumexp(0) + math.log(len(texts))
    envs.close()
    place = [(share @ phi).item(), kl.item(), (1 / share.square().sum()).item()]
    return {"target": place, "start": [phi.mean().item()]}


def read(out: Path, goal: str, run: str) -> list[dict[str, list[float]]]:
    """One record per seed, of what is there."""
    return [json.loads(path.read_text()) for path in sorted(out.glob(record(out, goal, run, 0).name[:-6] + "*"))]


def ends(seeds: list[dict[str, list[float]]], name: str) -> list[float]:
    """Each seed's mean of a metric over the last updates."""
    return [float(np.mean(seed[name][-LAST:])) for seed in seeds]


def curve(seeds: list[dict[str, list[float]]], name: str) -> list[float]:
    """A metric's mean over seeds and over each eighth of the updates, as single ones are noise."""
    means = np.mean([seed[name] for seed in seeds], axis=0)
    return [float(part.mean()) for part in np.array_split(means, min(8, len(means)))]


def report(out: Path) -> None:
    """Write and print ``table.md``, and draw; intervals are Student's t over seeds."""
    goals = {
        goal: runs
        for goal in GOALS
        if (runs := {run: one for run in GOALS[goal].runs if (one := read(out, goal, run))})
    }
    if not goals:
        print(f"{out} holds no finished run yet")
        return
    lines = [
        "| target | | seeds | alignment | KL, nats | distinct-2 | entropy per token | total variation to p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for goal, runs in goals.items():
        if places := read(out, goal, PLACE):
            aligned, kl, _ = np.mean([one["target"] for one in places], axis=0)
            lines.append(f"| {goal} | the start | | {np.mean([one['start'] for one in places]):.3g} | 0 | | | |")
            lines.append(f"| {goal} | the target | | {aligned:.3g} | {kl:.2f} | | | 0 |")
        for run, seeds in runs.items():
            cells = [goal, run, len(seeds), *(mean_interval(ends(seeds, name)) for name in MEASURED)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(goals, out)


def draw(goals: dict[str, dict[str, list[dict[str, list[float]]]]], out: Path) -> None:
    """Alignment against the KL, below it against distinct-2, a column per goal; a star is the target."""
    figure = new_figure(3.6 * len(goals), 6.4)
    panels = figure.subplots(2, len(goals), squeeze=False)
    for column, (goal, runs) in enumerate(goals.items()):
        for axes, across, words in zip(
            panels[:, column], ("kl", "distinct_2"), ("KL, nats", "distinct-2"), strict=True
        ):
            for number, (run, seeds) in enumerate(runs.items()):
                axes.plot(curve(seeds, across), curve(seeds, "alignment"), color=COLOURS[number], linewidth=1.0)
                end = mean_interval(ends(seeds, "alignment"))
                axes.errorbar(
                    [np.mean(ends(seeds, across))], [end.value], yerr=error_bars([end]), color=COLOURS[number],
                    marker=MARKERS[number], markersize=6, capsize=3, linestyle="none", label=run,
                )  # fmt: skip
            dress(axes, goal if across == "kl" else "", words, "alignment" if column == 0 else "")
        upper = panels[0, column]
        if places := read(out, goal, PLACE):
            aligned, kl, _ = np.mean([one["target"] for one in places], axis=0)
            upper.plot(kl, aligned, "*", color=INK, markersize=11, linestyle="none", label="the target")
        upper.legend(frameon=False, fontsize=8)
    write_figure(figure, out, "targets")


if __name__ == "__main__":
    main()
