"""Reward collapse and its cure. Offline; about half an hour on two cores.

Half of the prompts are closed ("Yes or no? ..."), half are open ("Describe it. ..."). The bundled policy answers each
eight times, the bundled judge ranks the answers, and a reward model learns the rankings with the same utility for all
prompts, then goes on with a utility for each kind. With one utility the rewards of both kinds spread alike, whatever
the prompt asks for; with two, each kind gets its own spread. The second training starts from the first one's model,
because the gradient of the utility x vanishes where a reward is near 0 or 1: in a model trained from scratch, responses
on the wrong side stay there.

python examples/reward_collapse.py --out runs/collapse --prompts 256 --epochs 18

Run the same command again to continue from the last measurement.

Source: Song et al., "Reward Collapse in Aligning Large Language Models", 2023.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.agents.reward_model import RewardModelConfig, RewardModelLearner, example_of
from tokenmdp.envs.prompts import read_prompts
from tokenmdp.files import write_text
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.preference_losses import UTILITIES
from tokenmdp.preferences import Annotator, Ranking, model_scores, read_preferences, write_records
from tokenmdp.report.colours import COLOURS
from tokenmdp.report.drawing import dress, new_figure, write_figure
from tokenmdp.reward_models import load_reward_model
from tokenmdp.rollouts.groups import sample_groups
from tokenmdp.runs.directory import claim
from tokenmdp.wrappers import vector

KINDS = {"closed": "Yes or no?", "open": "Describe it."}
RUNS = {"one utility": "log-sigmoid", "prompt-aware": "closed=x,open=-1/x"}
THEORY = {"one utility": dict.fromkeys(KINDS, "log-sigmoid"), "prompt-aware": {"closed": "x", "open": "-1/x"}}
HELD_OUT = 64  # prompts
EVERY = 3  # epochs, from one measurement to the next
BATCH_SIZE = 4  # rankings per update

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True, help="directory for figure and numbers")
parser.add_argument("--prompts", type=int, default=256, help="training prompts; half of each kind")
parser.add_argument("--responses", type=int, default=8, help="to each prompt")
parser.add_argument("--epochs", type=int, default=18, help="passes over the rankings, with each choice of utilities")
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--seed", type=int, default=1)


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    data, numbers = args.out / "rankings.jsonl", args.out / "numbers.json"
    made_of = {name: value for name, value in vars(args).items() if name != "out"} | {"batch_size": BATCH_SIZE}
    claim(args.out / "settings.json", "rankings and models", made_of)
    if not data.exists():
        write_records(data, sample(args.prompts + HELD_OUT, args.responses, args.seed))
    rankings = [one for one in read_preferences(data, load_tokenizer("imdb-tiny")) if isinstance(one, Ranking)]
    held_out, training = rankings[:HELD_OUT], rankings[HELD_OUT:]
    results: dict[str, dict] = json.loads(numbers.read_text()) if numbers.exists() else {}
    start, before = "imdb-tiny", 0
    for name, utilities in RUNS.items():
        theory = {kind: optimum(utility, args.responses) for kind, utility in THEORY[name].items()}
        result = results.setdefault(name, {"W1": [], "theory": theory})
        checkpoint = args.out / name.replace(" ", "-")
        learner = begin(args, training, utilities, start, checkpoint)
        done = learner.num_updates_done // learner.updates_per_epoch
        result["W1"] = [one for one in result["W1"] if one["epoch"] <= before + done]
        while done < args.epochs:
            epochs = min(EVERY, args.epochs - done)
            learner.learn(epochs * learner.updates_per_epoch)
            done += epochs
            found = {part: spread(learner, some) for part, some in (("training", training), ("held out", held_out))}
            result["order statistics"] = found
            result["W1"].append({"epoch": before + done} | {part: distance(one) for part, one in found.items()})
            write_text(numbers, json.dumps(results, indent=2) + "\n")
            learner.save(checkpoint)
            print(f"{name}: W1 between kinds, {show(result['W1'][-1])}", flush=True)
        gap = max(np.abs(np.subtract(result["order statistics"]["training"][k], theory[k])).max() for k in KINDS)
        print(f"{name}: order statistics are within {gap:.3f} of theory on training prompts", flush=True)
        start, before = str(checkpoint), before + args.epochs
    draw(results, args.out)
    print(f"figure: {args.out / 'collapse.png'}")


def begin(
    args: argparse.Namespace, training: Sequence[Ranking], utilities: str, start: str, checkpoint: Path
) -> RewardModelLearner:
    """A reward model to train, or the interrupted one."""
    config = RewardModelConfig(
        utilities=utilities, epochs=args.epochs, batch_size=BATCH_SIZE, learning_rate=args.learning_rate, seed=args.seed
    )
    if checkpoint.exists():
        return RewardModelLearner.load(checkpoint, training)
    return RewardModelLearner(start, training, config)


def sample(prompts: int, responses: int, seed: int) -> list[Ranking]:
    """Rankings of responses to prompts of alternating kinds, in their wording."""
    texts, _ = read_prompts("imdb-tiny")
    words = list(KINDS.items())
    asked = [f"{words[place % 2][1]} {texts[place]}" for place in range(len(texts))]
    judge = load_reward_model("imdb-gold")
    rankings: list[Ranking] = []
    rows = 8 * responses
    envs = vector.SparseReward(
        gym.make_vec(
            "TextGen-IMDb-v0", num_envs=rows, autoreset_mode="Disabled", prompts=asked, max_prompt_tokens=32,
            reward_model="lexicon", truncate_prompt="left",
        )
    )  # fmt: skip
    tokenizer = envs.unwrapped.task.tokenizer
    policy = CausalLMPolicy.for_task("imdb-tiny", envs.unwrapped.task)
    annotator = Annotator("imdb-gold", model_scores(judge, tokenizer))
    for batch in range(10 * prompts):
        groups = [group for group in sample_groups(envs, policy, responses, seed=seed, batch=batch) if group]
        for record in annotator.judge(groups, seed, batch * rows).records:
            kind = next(kind for kind, text in words if text.split()[0] in record.prompt)
            full = isinstance(record, Ranking) and len(record.responses) == responses
            if full and sum(one.kind == kind for one in rankings) < prompts // 2:
                rankings.append(Ranking(**(vars(record) | {"kind": kind})))
        if len(rankings) >= prompts // 2 * 2:
            break
    return [
        one for pair in zip(*([r for r in rankings if r.kind == kind] for kind in KINDS), strict=True) for one in pair
    ]


def spread(learner: RewardModelLearner, rankings: Sequence[Ranking]) -> dict[str, list[float]]:
    """Mean order statistics of the rewards in [0, 1] by kind of prompt, the largest first."""
    found = {}
    for kind in KINDS:
        examples = [example_of(one) for one in rankings if one.kind == kind]
        rewards = learner.scores(examples).view(len(examples), -1).sigmoid()
        found[kind] = rewards.sort(descending=True).values.mean(0).tolist()
    return found


def distance(spreads: dict[str, list[float]]) -> float:
    """W1 between the rewards of both kinds: the mean difference of order statistics."""
    one, other = spreads.values()
    return float(np.abs(np.subtract(one, other)).mean())


def optimum(utility: str, responses: int) -> list[float]:
    """The rewards in [0, 1] that maximise the sum of U over pairs, by gradient descent on sorted rewards."""
    free = torch.linspace(3, -3, responses, dtype=torch.float64).requires_grad_()
    better, worse = torch.triu_indices(responses, responses, offset=1)
    optimizer = torch.optim.LBFGS([free], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        rewards = free.sigmoid()
        loss = -UTILITIES[utility](rewards[better] - rewards[worse]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return free.detach().sigmoid().tolist()


def show(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.3g}" for name, number in numbers.items())


def draw(results: dict[str, dict], out: Path) -> None:
    """Order statistics with theory as open circles, and W1 over training."""
    figure = new_figure(10, 3.8)
    panels = figure.subplots(1, 3)
    for axes, (name, result) in zip(panels, results.items(), strict=False):
        for colour, kind in zip(COLOURS, KINDS, strict=False):
            ranks = range(1, 1 + len(result["theory"][kind]))
            axes.plot(ranks, result["order statistics"]["training"][kind], color=colour, label=f"{kind}, training")
            axes.plot(
                ranks,
                result["order statistics"]["held out"][kind],
                color=colour,
                linestyle=":",
                label=f"{kind}, held out",
            )
            axes.plot(ranks, result["theory"][kind], "o", mfc="none", color=colour, label=f"{kind}, theory")
        dress(axes, name, "rank of the response", "mean reward")
    panels[0].legend(frameon=False, fontsize=8)
    before: list[dict[str, float]] = []
    for colour, (name, result) in zip(COLOURS[2:], results.items(), strict=False):
        measured = [*before, *result["W1"]]  # it goes on from there
        epochs = [one["epoch"] for one in measured]
        for part, style in (("training", "-"), ("held out", ":")):
            panels[2].plot(epochs, [one[part] for one in measured], style, color=colour, label=f"{name}, {part}")
        before = measured[-1:]
    dress(panels[2], "W1 between kinds", "epoch", "mean difference of order statistics")
    panels[2].legend(frameon=False, fontsize=8, loc="lower right")
    write_figure(figure, out, "collapse")


if __name__ == "__main__":
    main()
