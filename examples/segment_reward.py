"""A reward model for single sentences, and PPO with and without it. About an hour on one core.

A sentence of a review is exchanged for one of another review: that one is irrelevant by construction. Two reward models
learn, from different reviews, to tell such sentences from the others when they have read the whole text. PPO then
continues reviews, paid for the holistic score alone (`imdb-tiny`, sentiment) or for the score and for the relevance of
every sentence by the first model. The second model and `imdb-gold` judge the texts, at equal KL. `--seeds` without a
number stops after the models.

python examples/segment_reward.py --imdb DIRECTORY --out runs/segments

DIRECTORY holds train-*.parquet and test-*.parquet of the IMDb reviews. What is finished in --out is not done again.

Source: Wu et al., "Fine-Grained Human Feedback Gives Better Rewards for Language Model Training", 2023.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from imdb_recipe.corpus import read_split

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp import cli
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.credit import FineGrainedCredit, FineReward, Resources
from tokenmdp.credit.spans import segment_ends
from tokenmdp.evaluation.policies import gold_scores, played
from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate, bootstrap_interval
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.preferences import Ranking, segment_ranking, write_records
from tokenmdp.reward_models import RewardModel, load_reward_model
from tokenmdp.runs.directory import claim
from tokenmdp.study.equal_kl import score_at_kl
from tokenmdp.types import Episode, Outcome, RewardOutput, Rollout, lay_out
from tokenmdp.wrappers import vector

PROMPT, RESPONSE = 12, 24  # tokens
ATTEMPTS = 10_000  # to find a sentence that fits
FEWEST = 4  # of a sentence that is exchanged
EVALUATED = 128  # responses to prompts of test reviews, before PPO and four times during it
MODELS = ("relevance", "judge")  # of relevance: the one that pays, and the one that only judges
ARMS = ("holistic", "holistic + relevance")
Review = tuple[list[int], list[list[int]]]  # the prompt and the segments behind it

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--imdb", required=True, help="directory of the IMDb reviews")
parser.add_argument("--out", type=Path, required=True, help="directory for data, models and numbers")
parser.add_argument("--reviews", type=int, default=4000, help="for each of both models")
parser.add_argument("--epochs", type=int, default=4, help="of both models")
parser.add_argument("--test", type=int, default=600, help="test reviews to measure the models on")
parser.add_argument("--weight", type=float, default=1.0, help="of relevance, in its standard deviations")
parser.add_argument("--updates", type=int, default=40, help="of PPO")
parser.add_argument("--num-envs", type=int, default=64)
parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="of PPO")


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("datasets") is None:
        parser.error("reading the reviews needs the extra datasets: pip install 'tokenmdp[datasets]'")
    if not Path(args.imdb).is_dir():
        parser.error(
            f"--imdb {args.imdb} is not a directory; give the one that holds train-*.parquet and test-*.parquet"
        )
    numbers = {name: value for name, value in vars(args).items() if name not in ("imdb", "out", "seeds")}
    claim(args.out / "settings.json", "models and runs", numbers)
    tokenizer = load_tokenizer("imdb-tiny")
    training = read_reviews(args.imdb, "train", tokenizer, 2 * args.reviews)
    test = read_reviews(args.imdb, "test", tokenizer, args.test)
    models = {}
    for place, name in enumerate(MODELS):
        data, run = args.out / f"{name}.jsonl", args.out / name
        write_records(data, swapped(training[place::2], tokenizer, seed=place))
        options = ["--data", str(data), "--out", str(run), "--epochs", str(args.epochs), "--batch-size", "16"]
        if cli.main(["train", "reward-model", *options]):
            raise SystemExit(f"training {name} failed")
        models[name] = load_reward_model(str(run / "checkpoint"))
    held_out = swapped(test, tokenizer, seed=2)
    for name, model in models.items():
        pairs, auc = separation(model, held_out)
        print(f"{name}, {len(test)} test reviews: own sentence scores higher in {pairs}, AUC {auc}", flush=True)
    runs: dict[str, dict[int, list[dict[str, float]]]] = {arm: {} for arm in ARMS}
    for seed in args.seeds:
        for arm in ARMS:
            file = args.out / "ppo" / f"{arm.replace(' + ', '-')}-seed{seed}.json"
            if not file.exists():
                write_text(file, json.dumps(trained(arm, seed, training, test, models, args), indent=1) + "\n")
            runs[arm][seed] = json.loads(file.read_text(encoding="utf-8"))
    if args.seeds:
        compare(runs)


def read_reviews(data: str, split: str, tokenizer: Any, number: int) -> list[Review]:
    """Some reviews, cut to `PROMPT` and `RESPONSE` tokens, in which a sentence begins behind the prompt."""
    texts = read_split(data, split)[0]
    found: list[Review] = []
    for row in np.random.default_rng(0).permutation(len(texts)):
        ids = tokenizer.encode(texts[row][: 20 * (PROMPT + RESPONSE)])
        prompt, response = ids[:PROMPT], ids[PROMPT : PROMPT + RESPONSE]
        if len(response) < RESPONSE:
            continue
        ends = segment_ends(lay_out([prompt], [response]), tokenizer, "sentences", wordless_rest=False)[0]
        cuts = [0, *(ends.nonzero()[:, 0] + 1).tolist()]
        segments = [response[one:other] for one, other in pairwise(cuts)]
        if ends[-1] and any(len(segment) >= FEWEST for segment in segments[1:]):
            found.append((prompt, segments))
        if len(found) == number:
            return found
    raise SystemExit(f"{split} has {len(found)} reviews with a new sentence in {RESPONSE} tokens; ask for fewer")


def swapped(reviews: Sequence[Review], tokenizer: Any, seed: int) -> list[Ranking]:
    """For each review a sentence of it, and the same place with a sentence of another review."""
    rng, rankings = np.random.default_rng(seed), []
    for row, (prompt, segments) in enumerate(reviews):
        # The first one finishes the prompt's sentence.
        place = int(rng.choice([j for j, one in enumerate(segments) if j and len(one) >= FEWEST]))
        room = RESPONSE - sum(map(len, segments[:place]))
        unfinished = place == len(segments) - 1
        for _ in range(ATTEMPTS):
            other = int(rng.integers(len(reviews)))
            pool = reviews[other][1]
            swap = pool[int(rng.integers(1, len(pool)))]
            # Neither the length of a text nor a sentence that is cut may betray which one was exchanged.
            fits = len(swap) >= room if unfinished else len(swap) <= room and swap is not pool[-1]
            if other != row and fits and len(swap) >= FEWEST and swap[:room] != segments[place]:
                break
        else:
            raise SystemExit(f"no sentence of {len(reviews)} reviews fits into another one; ask for more")
        new, left = [*segments[:place], swap[:room]], room - len(swap)
        for segment in segments[place + 1 :]:
            if left > 0:
                new.append(segment[:left])
                left -= len(segment)
        labels: list[list[bool | None]] = [[None] * len(segments), [None] * len(new)]
        labels[0][place], labels[1][place] = True, False
        rankings.append(segment_ranking(tokenizer, tuple(prompt), [segments, new], labels))
    return rankings


def separation(model: RewardModel, rankings: Sequence[Ranking]) -> tuple[Estimate, Estimate]:
    """How often the own sentence scores higher than the exchanged one in its place, and the AUC over all reviews.

    95% intervals: bootstrap over reviews.
    """
    scores = []
    for start in range(0, len(rankings), 32):
        some = rankings[start : start + 32]
        texts = [(one.prompt_ids, ids) for one in some for ids in one.responses_ids]
        scores.append(model(lay_out(*zip(*texts, strict=True))).score.view(-1, 2))
    own, other = torch.cat(scores).numpy().T
    wins = (own[:, None] > other) + (own[:, None] == other) / 2  # (n, n)
    rng = np.random.default_rng(0)
    drawn = [wins[np.ix_(rows, rows)].mean() for rows in rng.integers(len(own), size=(500, len(own)))]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return bootstrap_interval(wins.diagonal()), Estimate(float(wins.mean()), float(low), float(high))


def relevance(model: RewardModel, rollout: Rollout, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's answers (M,) for all sentences of a rollout, and their number in each row (N,)."""
    episode = Episode(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
    outcome = Outcome(episode, RewardOutput(rollout.scores), torch.arange(len(rollout.scores)))
    paid = FineGrainedCredit([FineReward(model, "sentence", context="whole")])(
        outcome, Resources(None, tokenizer)
    ).token_rewards
    ends = segment_ends(episode, tokenizer, "sentences", wordless_rest=False)
    return paid[ends], ends.sum(-1)


def trained(
    arm: str, seed: int, training: Sequence[Review], test: Sequence[Review], models: dict[str, RewardModel], args: Any
) -> list[dict[str, float]]:
    """PPO; what `measured` finds before, and after each quarter. Relevance is in the start's standard deviations."""
    held_out = environment(test, [FineReward()], args.num_envs)
    policy = CausalLMPolicy.for_task("imdb-tiny", held_out.unwrapped.task)
    before = measured(held_out, policy, policy, models, seed)
    units = {name: (float(before[name].mean()), float(before[name].std())) for name in MODELS}
    mean, deviation = units["relevance"]
    parts = [FineReward()]
    if arm != "holistic":
        parts.append(FineReward(models["relevance"], "sentence", args.weight / deviation, "whole", shift=mean))
    agent = PPO("imdb-tiny", environment(training, parts, args.num_envs), PPOConfig(seed=seed, update_epochs=2))
    history = []
    for part in range(5):
        agent.learn(args.updates // 4 if part else 0)
        found = measured(held_out, agent.policy, agent.reference, models, seed)
        means = {name: float(values.mean()) for name, values in found.items()}
        means |= {name: (means[name] - mean) / deviation for name, (mean, deviation) in units.items()}
        history.append({"updates": float(agent.num_updates_done), **means})
        print(f"{arm}, seed {seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in history[-1].items()), flush=True)
    return history


def environment(reviews: Sequence[Review], parts: Sequence[FineReward], num_envs: int) -> gym.vector.VectorEnv:
    """Beginnings of reviews to continue; the score is that of `imdb-tiny`."""
    envs = gym.make_vec(
        "TextGen-IMDb-v0", num_envs=num_envs, autoreset_mode="Disabled", reward_model="imdb-tiny",
        prompts=[prompt for prompt, _ in reviews], max_prompt_tokens=PROMPT, max_new_tokens=RESPONSE,
    )  # fmt: skip
    return vector.CreditReward(envs, FineGrainedCredit(parts))


def measured(
    envs: gym.vector.VectorEnv,
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    models: dict[str, RewardModel],
    seed: int,
) -> dict[str, np.ndarray]:
    """KL, scores and number of sentences of every response, and each model's answer for every sentence."""
    found: dict[str, list[torch.Tensor]] = {}
    gold, tokenizer = load_reward_model("imdb-gold"), envs.unwrapped.task.tokenizer
    for rollout in played(envs, policy, reference, samples=EVALUATED, seed=seed, credited=0):
        facts = {
            "kl": (rollout.logprobs - rollout.ref_logprobs).sum(-1),
            "holistic": rollout.scores,
            "gold": gold_scores(gold, rollout),
        }
        for name, model in models.items():
            facts[name], facts["sentences"] = relevance(model, rollout, tokenizer)
        for name, values in facts.items():
            found.setdefault(name, []).append(values.double())
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def compare(runs: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    """At the largest KL that both runs of a seed reach, by linear interpolation over their evaluations."""
    print("\n| seed | KL | | holistic | judge's sentiment | relevance, paid | relevance, judged | sentences |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines(runs):
        print(line)


def lines(runs: dict[str, dict[int, list[dict[str, float]]]]) -> Iterator[str]:
    for seed in runs[ARMS[0]]:
        equal = min(max(one["kl"] for one in runs[arm][seed]) for arm in ARMS)
        for arm in ARMS:
            history = runs[arm][seed]
            kl = [one["kl"] for one in history]
            found = [
                float(score_at_kl(kl, [one[name] for one in history], [equal])[0])
                for name in ("holistic", "gold", "relevance", "judge", "sentences")
            ]
            yield f"| {seed} | {equal:.2f} | {arm} | " + " | ".join(f"{number:.2f}" for number in found) + " |"


if __name__ == "__main__":
    main()
