"""f-DPG towards three kinds of target: what each divergence gives up, and how far a rare one gets.

    python benchmarks/targets.py --out runs/targets             # all that is missing; interrupt it and run it again
    python benchmarks/targets.py --out runs/targets --table     # of what is there

sentiment    scalar: the bundled reward model's score, exp(score / 0.5); with all four divergences
excellent    binary: the word stands in the response, which it does in one of 150 of the start's
original     binary, twice as frequent: one in 70
woman        distributional: half of the responses should mention a woman; one in fifty of the start's does
negation     distributional, an easier one: half of them should say "not", "no", "never" or "nothing"; one in ten does;
             also with twice the responses per update

Alignment is the mean score of a scalar target, otherwise the share of responses that have the feature. Alignment, KL
and distinct-2 are of texts that the last policy writes to held-out prompts; total variation is estimated in the last
updates. The target's own alignment and KL are estimated on responses of the start, weighted by P / a, and the effective
number of these says what that rests on. With --part 0/2 and --part 1/2 two processes share the work.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from shares import add_part, make_missing

from tokenmdp.agents.f_dpg import FDPG
from tokenmdp.evaluation.policies import played
from tokenmdp.files import read_json, write_text
from tokenmdp.intervals import mean_interval
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.tokens import distinct_n
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.drawing import INK, dress, error_bars, new_figure, write_figure
from tokenmdp.runs.directory import claim
from tokenmdp.runs.environments import evaluation_envs, make_envs, split_prompts
from tokenmdp.runs.opening import load_policy
from tokenmdp.runs.settings import RunSettings, agent_config, preset_settings
from tokenmdp.targets import Responses, read_target
from tokenmdp.types import Episode, response_tokens

POLICY, PLACE = "imdb-tiny", "place"  # place: where a target is
TIMES = "times"
BASELINE = "js"  # every goal has a run of it
LAST = 5  # updates that are averaged at the end
SAMPLES = 1024  # texts of the last policy
FEWEST = 100  # effective responses that a target's place must rest on to be drawn
CURVES = ("alignment", "kl", "tv")


class Goal(NamedTuple):
    """A target and the runs towards it."""

    target: str
    num_envs: int  # responses per update
    runs: dict[str, dict[str, Any]]  # what each is called -> fields of `FDPGConfig`; num_envs, and `TIMES` --updates


def divergences(*names: str) -> dict[str, dict[str, Any]]:
    """A run for each divergence."""
    return {name: {"divergence": name} for name in names}


TWICE = {"js, twice the updates": {"divergence": "js", TIMES: 2}}
GOALS = {
    "sentiment": Goal("score/0.5", 128, divergences("reverse-kl", "js", "tv", "forward-kl")),
    "excellent": Goal("word:excellent", 256, divergences("js", "tv", "forward-kl") | TWICE),
    "original": Goal("word:original", 256, TWICE),
    "woman": Goal(
        "words:she,her,woman@0.5", 256,
        divergences("js") | {"js, lagged proposal": {"divergence": "js", "proposal": "lagged"}},
    ),
    "negation": Goal(
        "words:not,no,never,nothing@0.5", 256,
        divergences("js") | {"js, lagged proposal": {"divergence": "js", "proposal": "lagged"},
                             "js, 512 responses": {"divergence": "js", "num_envs": 512}},
    ),
}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--goals", nargs="+", choices=list(GOALS), default=list(GOALS))
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--updates", type=int, default=40)
parser.add_argument("--samples", type=int, default=4096, help="of the start, which tell where the target is")
add_part(parser)
parser.add_argument("--table", action="store_true", help="only report what is there")


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if not args.table:
        made_of = {name: getattr(args, name) for name in ("updates", "samples")}
        made_of |= {goal: one._asdict() for goal, one in GOALS.items()}
        made_of |= {"preset": preset_settings("quick", "f-dpg").config}
        claim(args.out / "settings.json", "runs of f-DPG", made_of)
        every = [(goal, run, seed) for seed in range(1, args.seeds + 1) for goal in args.goals
                 for run in (PLACE, *GOALS[goal].runs)]  # fmt: skip
        for goal, run, seed in every[args.part]:
            place = partial(place_of, goal, seed, args.samples)
            make = place if run == PLACE else partial(trained, goal, run, seed, args.updates)
            make_missing(record(args.out, goal, run, seed), make)
    report(args.out)


def record(out: Path, goal: str, run: str, seed: int) -> Path:
    """The file of a run's metrics."""
    return out / (f"{goal}-{run}".replace(", ", "-").replace(" ", "-") + f"-seed{seed}.json")


def settings_of(goal: str, run: str, seed: int) -> RunSettings:
    """Of a run of `tokenmdp train f-dpg`."""
    quick, one = preset_settings("quick", "f-dpg"), GOALS[goal]
    fields = quick.config | one.runs.get(run, {}) | {"target": one.target}
    fields.pop(TIMES, None)
    return replace(quick, num_envs=fields.pop("num_envs", one.num_envs), seed=seed, config=fields)


def trained(goal: str, run: str, seed: int, updates: int) -> dict[str, Any]:
    """What is estimated in each update, and what the last policy writes."""
    settings, updates = settings_of(goal, run, seed), updates * GOALS[goal].runs[run].get(TIMES, 1)
    split = split_prompts(settings)
    envs, held_out = (
        make_envs(settings, settings.num_envs, split.training),
        evaluation_envs(settings, SAMPLES, split.held_out),
    )
    agent = FDPG(POLICY, envs, agent_config(settings, updates))
    agent.learn(updates)
    # Of a distributional target the mean of its feature, which should reach the moment.
    aligned = next(name for name in agent.history[0] if name == "alignment" or name.startswith("moment_"))
    curves = {name: [float(one[aligned if name == "alignment" else name]) for one in agent.history] for name in CURVES}
    responses, tokens, kls = written(held_out, agent.policy, agent.reference, SAMPLES, seed)
    assert agent.target is not None, "fitted in the first update"
    end = {
        "alignment": next(iter(agent.target.measures(responses).values())).mean().item(),
        "kl": float(np.mean(kls)),
        "distinct_2": distinct_n(tokens, 2),
        "tv": float(np.mean(curves["tv"][-LAST:])),
    }
    envs.close(), held_out.close()
    return {"seed": seed, "curves": curves, "end": end}


def written(
    envs: gym.vector.VectorEnv, policy: CausalLMPolicy, reference: CausalLMPolicy, samples: int, seed: int
) -> tuple[Responses, list[list[int]], list[float]]:
    """Responses, their tokens, and the log-ratio of each to the reference."""
    texts: list[str] = []
    tokens: list[list[int]] = []
    scores, kls = [], []
    for rollout in played(envs, policy, reference, samples=samples, seed=seed, credited=0):
        episodes = Episode(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
        texts += Responses.of(episodes, envs.unwrapped.task.tokenizer).texts
        tokens += response_tokens(rollout)
        kls += (rollout.logprobs - rollout.ref_logprobs).sum(-1).tolist()
        scores.append(rollout.scores)
    return Responses(texts, torch.cat(scores)), tokens, kls


def place_of(goal: str, seed: int, samples: int) -> dict[str, float]:
    """The target's alignment, its KL to the start, and the effective number of responses that these rest on.

    On responses of the start, with weights w = P / a: alignment = E[w phi] / E[w], KL = E[w log w] / E[w] - log E[w],
    effective number = (sum of w)^2 / sum of w^2.
    """
    settings = settings_of(goal, PLACE, seed)
    envs = make_envs(settings, settings.num_envs, split_prompts(settings).training)
    start = load_policy(POLICY, envs, {}, "cpu")
    responses, _, _ = written(envs, start, start, samples, seed)
    envs.close()
    nothing = torch.zeros(samples, dtype=torch.float64)
    wanted = read_target(GOALS[goal].target)
    found = wanted.fitted(responses, nothing) if wanted.moments else wanted.fitted()
    phi = next(iter(found.measures(responses).values())).double()
    log_w = found.log_unnormalised(nothing, responses)
    if not (log_w > -torch.inf).any():
        raise SystemExit(f"none of --samples {samples} responses meets {GOALS[goal].target}; ask for more")
    share = log_w.softmax(0)
    kl = (share * torch.where(share > 0, log_w, 0.0)).sum() - log_w.logsumexp(0) + math.log(samples)
    return {"alignment": (share @ phi).item(), "kl": kl.item(), "effective": (1 / share.square().sum()).item(),
            "start": phi.mean().item()}  # fmt: skip


def read(out: Path, goal: str, run: str) -> list[dict[str, Any]]:
    """One record per seed, of what is there."""
    return [read_json(path) for path in sorted(out.glob(record(out, goal, run, 0).name[:-6] + "*"))]


def report(out: Path) -> None:
    """Write and print ``table.md``, and draw; intervals are Student's t over seeds."""
    found = {goal: {run: seeds for run in one.runs if (seeds := read(out, goal, run))} for goal, one in GOALS.items()}
    goals = {goal: runs for goal, runs in found.items() if runs}
    if not goals:
        print(f"{out} holds no finished run yet")
        return
    lines = [
        "| target | | seeds | alignment | minus JS | KL, nats | distinct-2 | minus JS | total variation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for goal, runs in goals.items():
        if places := read(out, goal, PLACE):
            aligned, kl, start, effective = (
                [one[name] for one in places] for name in ("alignment", "kl", "start", "effective")
            )
            lines.append(f"| {goal} | the start | {len(places)} | {three_digits(start)} | | 0 | | | |")
            rests = f"the target, by {np.mean(effective):.0f} effective responses"
            place = f"{three_digits(aligned)} | | {three_digits(kl)} | | | 0"
            lines.append(f"| {goal} | {rests} | {len(places)} | {place} |")
        for run, seeds in runs.items():
            columns = [
                text
                for name in ("alignment", "kl", "distinct_2", "tv")
                for text in (
                    three_digits([one["end"][name] for one in seeds]),
                    *([gain(seeds, runs.get(BASELINE, []), name)] if name in ("alignment", "distinct_2") else []),
                )
            ]
            lines.append(f"| {goal} | {run} | {len(seeds)} | {' | '.join(columns)} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(goals, out)


def three_digits(values: Sequence[float]) -> str:
    """The mean over seeds with its interval.

    >>> three_digits([0.011, 0.013]), three_digits([4.0])
    ('0.012 [-0.000706, 0.0247]', '4')
    """
    value, low, high = mean_interval(values)
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if math.isfinite(low) else "")


def gain(seeds: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], name: str) -> str:
    """How much higher a run ends than the baseline of the same seed, with the interval; nothing for itself."""
    other = {one["seed"]: one["end"][name] for one in base}
    pairs = [one["end"][name] - other[one["seed"]] for one in seeds if one["seed"] in other]
    return three_digits(pairs) if pairs and seeds is not base else ""


def draw(goals: dict[str, dict[str, list[dict[str, Any]]]], out: Path) -> None:
    """Alignment against the KL, below it against distinct-2, a column per goal; a star is the target."""
    figure = new_figure(3.6 * len(goals), 6.4)
    panels = figure.subplots(2, len(goals), squeeze=False)
    for column, (goal, runs) in enumerate(goals.items()):
        upper, lower = panels[:, column]
        for number, (run, seeds) in enumerate(runs.items()):
            look = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 6, "capsize": 3}
            upper.plot(*(curve(seeds, name) for name in ("kl", "alignment")), color=COLOURS[number], linewidth=1.0)
            end = mean_interval([one["end"]["alignment"] for one in seeds])
            for axes, across in ((upper, "kl"), (lower, "distinct_2")):
                place = np.mean([one["end"][across] for one in seeds])
                axes.errorbar([place], [end.value], yerr=error_bars([end]), linestyle="none", label=run, **look)
        places = read(out, goal, PLACE)
        if places and np.mean([one["effective"] for one in places]) >= FEWEST:
            kl, aligned = (np.mean([one[name] for one in places]) for name in ("kl", "alignment"))
            upper.plot(kl, aligned, "*", color=INK, markersize=11, linestyle="none", label="the target")
        dress(upper, goal, "KL, nats", "alignment" if column == 0 else "")
        dress(lower, "", "distinct-2", "alignment" if column == 0 else "")
        lower.locator_params(axis="x", nbins=4)
        upper.legend(frameon=False, fontsize=8)
    write_figure(figure, out, "targets")


def curve(seeds: list[dict[str, Any]], name: str) -> list[float]:
    """A metric's mean over seeds and over each eighth of the updates, as single ones are noise."""
    means = np.mean([seed["curves"][name] for seed in seeds], axis=0)
    return [float(part.mean()) for part in np.array_split(means, min(8, len(means)))]


if __name__ == "__main__":
    main()
