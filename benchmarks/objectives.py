"""Two objectives in conflict: fronts of PPO on weighted sums, MODPO, and soups of what each objective alone gives.

    python benchmarks/objectives.py --out runs/objectives           # all that is missing; interrupt it and run it again
    python benchmarks/objectives.py --out runs/objectives --table   # of what is there

By default sentiment, as `imdb-gold` scores it, against restraint, a list of evaluative words; --objectives takes any
two reward models. The weight is the first one's, the second one has the rest; both count in their own unit.

PPO          on the weighted sum of both, at the last token
PPO soup     averages of the weights of the two policies that PPO trained on one objective alone
MODPO        on comparisons by the first one, with the second as margin; at the ends plain DPO on one of them
MODPO soup   averages of the weights of the policies at these ends

The table says how far each soup is above the chord of its ends' means, objective by objective, and how far each policy
between two ends is above it in the second objective where the first one is the same.

With --part 0/2 and --part 1/2 two processes share the seeds.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from shares import add_part, make_missing

from tokenmdp.agents.dpo import DPO
from tokenmdp.agents.ppo import PPO
from tokenmdp.credit import FineGrainedCredit, FineReward
from tokenmdp.evaluation.policies import evaluate
from tokenmdp.files import make_directory, read_json, write_text
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.models.soup import write_soup
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.drawing import FAINT, dress, error_bars, new_figure, write_figure
from tokenmdp.reward_models import load_reward_model
from tokenmdp.runs.comparisons import Comparing, ask_model
from tokenmdp.runs.directory import claim
from tokenmdp.runs.environments import evaluation_envs, make_envs, split_prompts
from tokenmdp.runs.opening import load_policy
from tokenmdp.runs.settings import PRESETS, agent_config, preset_settings
from tokenmdp.wrappers import vector

POLICY = "imdb-tiny"
SAMPLES = 256  # texts per policy
START = "start"
ENDS, BETWEEN = (0.0, 1.0), (0.25, 0.5, 0.75)  # weights of the first objective
METHODS = {START: ENDS[:1]} | {  # in the order in which one needs another
    name: weights
    for family in ("PPO", "MODPO")
    for name, weights in ((family, (*ENDS, *BETWEEN)), (f"{family} soup", BETWEEN))
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--objectives", nargs=2, default=["imdb-gold", "restraint"], metavar="REWARD_MODEL")
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--updates", type=int, default=PRESETS["quick"].updates, help="of PPO")
parser.add_argument("--pairs", type=int, default=4096, help="comparisons by each objective")
add_part(parser, "seed")
parser.add_argument("--table", action="store_true", help="only report what is there")


class Policy(NamedTuple):
    """What was measured of one: means over responses to held-out prompts."""

    first: float
    second: float
    kl: float  # to the start, nats per sequence


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    settings = args.out / "settings.json"
    if not args.table:
        presets = {name: preset_settings("quick", name).config for name in ("ppo", "dpo")}
        claim(settings, "fronts", {name: getattr(args, name) for name in ("objectives", "updates", "pairs")} | presets)
        for seed in range(1, args.seeds + 1)[args.part]:
            for method, weight in [(method, weight) for method, weights in METHODS.items() for weight in weights]:
                make_missing(record(args.out, method, weight, seed), partial(measured, args, method, weight, seed))
    report(args.out, read_json(settings)["objectives"] if settings.exists() else args.objectives)


def record(out: Path, method: str, weight: float, seed: int) -> Path:
    """The file with a policy's numbers; beside it, without the suffix, the directory of its weights."""
    if method == START:
        return out / "start.json"
    return out / f"seed{seed}" / f"{method.replace(' ', '-')}-{weight:g}.json"


def policy(args: argparse.Namespace, method: str, weight: float, seed: int) -> str:
    """The directory of a policy, trained or averaged first if it is missing."""
    place = record(args.out, method, weight, seed).with_suffix("")
    if method == START:
        return POLICY
    if not place.exists():
        if method.endswith("soup"):
            ends = tuple(policy(args, method.removesuffix(" soup"), end, seed) for end in ENDS)
            write_soup(ends, (1 - weight, weight), place)
        else:
            (ppo if method == "PPO" else modpo)(args, weight, seed).save(place)
    return str(place)


def ppo(args: argparse.Namespace, weight: float, seed: int) -> PPO:
    """PPO on the weighted sum of both scores."""
    first, second = args.objectives
    settings = replace(preset_settings("quick", "ppo"), reward_model=first, credit="sparse", seed=seed)
    credit = FineGrainedCredit([FineReward(weight=weight), FineReward(second, weight=1 - weight)])
    envs = make_envs(settings, settings.num_envs, split_prompts(settings).training)
    agent = PPO(POLICY, vector.CreditReward(envs.env, credit), agent_config(settings, args.updates))
    agent.learn(args.updates)
    envs.close()
    return agent


def modpo(args: argparse.Namespace, weight: float, seed: int) -> DPO:
    """MODPO on the first objective's comparisons with the second as margin; at weights 1 and 0 DPO on one's alone."""
    settings, labelled = preset_settings("quick", "dpo"), 0 if weight else 1
    file = args.out / f"seed{seed}" / f"pairs-{labelled}.jsonl"
    make_directory(file.parent)
    asked = Comparing(
        policy=POLICY, out=file, judge=args.objectives[labelled], pairs=args.pairs, seed=seed, max_new_tokens=16,
        device="cpu",
    )  # fmt: skip
    records = ask_model(Console(file=io.StringIO()), asked)
    config = {"margin": args.objectives[1], "objective_weight": weight} if 0 < weight < 1 else {}
    agent = DPO(POLICY, records, agent_config(replace(settings, seed=seed, config=settings.config | config), None))
    agent.learn(agent.config.total_updates)
    return agent


def measured(args: argparse.Namespace, method: str, weight: float, seed: int) -> dict[str, float]:
    """The fields of `Policy` of one that is made first if it is missing."""
    settings = replace(preset_settings("quick", "rloo"), reward_model=args.objectives[0])
    envs = evaluation_envs(settings, SAMPLES, split_prompts(settings).held_out)
    own, start = (load_policy(one, envs, {}, "cpu") for one in (policy(args, method, weight, seed), POLICY))
    second = load_reward_model(args.objectives[1])
    found = evaluate(own, start, envs, samples=SAMPLES, judge=second, shown=0)
    envs.close()
    return Policy(*(float(np.mean(one)) for one in (found.scores, found.gold, found.kls)))._asdict()


def found(out: Path) -> dict[str, dict[float, dict[int, Policy]]]:
    """Method -> weight -> seed -> policy, of what is there; the start has one seed."""
    seeds = sorted(int(place.name.removeprefix("seed")) for place in out.glob("seed*"))
    every = {
        method: {
            weight: {
                seed: Policy(**read_json(path))
                for seed in (seeds[:1] if method == START else seeds)
                if (path := record(out, method, weight, seed)).exists()
            }
            for weight in sorted(weights)
        }
        for method, weights in METHODS.items()
    }
    return {
        method: there
        for method, weights in every.items()
        if (there := {weight: seeds for weight, seeds in weights.items() if seeds})
    }


def above_chord(ends: Sequence[dict[int, Policy]], weight: float, soups: dict[int, Policy], axis: int) -> Estimate:
    """A soup's mean of one objective less the weighted mean of its ends', seed by seed; ``ends`` of weights 0 and 1."""
    seeds = sorted(soups.keys() & ends[0].keys() & ends[1].keys())
    return mean_interval(
        [soups[seed][axis] - (1 - weight) * ends[0][seed][axis] - weight * ends[1][seed][axis] for seed in seeds]
    )


def above_chord_at_equal_first(ends: Sequence[dict[int, Policy]], policies: dict[int, Policy]) -> str:
    """The second objective less that of the chord where the first one is the same, seed by seed, and how many seeds.

    A seed counts only where the policy's first objective lies between those of the ends.
    """
    above = []
    for seed in sorted(policies.keys() & ends[0].keys() & ends[1].keys()):
        (first_0, second_0, _), (first_1, second_1, _) = ends[0][seed], ends[1][seed]
        share = (policies[seed].first - first_0) / (first_1 - first_0) if first_1 > first_0 else math.nan
        if 0 <= share <= 1:
            above.append(policies[seed].second - second_0 - share * (second_1 - second_0))
    return f"{mean_interval(above)}, n={len(above)}" if above else ""


def report(out: Path, objectives: Sequence[str]) -> None:
    """Write and print ``table.md``, and draw the fronts; intervals are Student's t over the seeds' means."""
    policies = found(out)
    if not policies:
        print(f"{out} holds no measured policy yet")
        return
    lines = [
        f"| | weight | seeds | {objectives[0]} | {objectives[1]} | KL, nats | {objectives[0]}, above the chord "
        f"| {objectives[1]}, above the chord | {objectives[1]}, above the chord at equal {objectives[0]} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, weights in policies.items():
        for weight, seeds in weights.items():
            means = [str(mean_interval([one[axis] for one in seeds.values()])) for axis in range(3)]
            chords = ["", "", ""]
            ends = [policies.get(method.removesuffix(" soup"), {}).get(end, {}) for end in ENDS]
            if weight in BETWEEN and all(ends):
                if method.endswith("soup"):
                    chords[:2] = [str(above_chord(ends, weight, seeds, axis)) for axis in (0, 1)]
                chords[2] = above_chord_at_equal_first(ends, seeds)
            cells = ["" if method == START else f"{weight:g}", str(len(seeds)), *means, *chords]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(policies, objectives, out)


def draw(policies: dict[str, dict[float, dict[int, Policy]]], objectives: Sequence[str], out: Path) -> None:
    """Second objective against the first, a line per method with the ends of its family; marks grow with the KL."""
    figure = new_figure(10, 4.6)
    for axes, family in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("PPO", "MODPO"), strict=True):
        ends = {end: seeds for end, seeds in policies.get(family, {}).items() if end in ENDS}
        for number, method in enumerate((family, f"{family} soup", START)):
            weights = policies.get(method, {}) if method in (family, START) else ends | policies.get(method, {})
            places = [list(weights[weight].values()) for weight in sorted(weights)]
            if places:
                first, second, kl = (
                    [mean_interval([one[axis] for one in seeds]) for seeds in places] for axis in range(3)
                )
                across, up = ([one.value for one in axis] for axis in (first, second))
                axes.errorbar(across, up, xerr=error_bars(first), yerr=error_bars(second), elinewidth=0.8, markersize=4,
                              marker=MARKERS[number], color=COLOURS[number], label=method)  # fmt: skip
                axes.scatter(across, up, s=[20 + 25 * max(one.value, 0.0) for one in kl], color=COLOURS[number],
                             alpha=0.5, marker=MARKERS[number])  # fmt: skip
        if len(ends) == len(ENDS):
            chord = np.array([np.mean(list(ends[end].values()), axis=0)[:2] for end in ENDS])
            axes.plot(*chord.T, "--", color=FAINT, linewidth=0.9, label="chord")
        dress(axes, family, f"mean score of {objectives[0]}", f"mean score of {objectives[1]}")
        if axes.has_data():
            axes.legend(frameon=False, fontsize=8)
    write_figure(figure, out, "objectives")


if __name__ == "__main__":
    main()
