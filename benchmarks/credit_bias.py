"""How far does each credit method turn the policy gradient? Exact, on random token MDPs and on the bundled models.

    python benchmarks/credit_bias.py --out runs/credit_bias

With the full return every method that conserves the score has the true gradient. A causal estimator (reward-to-go, GAE)
has it only where credit is potential-based. Both parts list every response, so no number here is an estimate of a
gradient; intervals (95%, bootstrap) are over instances.

* random: V = 3 tokens, horizon 3, random scores, prefix scores and attention, uniform policy; --seeds instances.
* bundled: a bundled prompt, V tokens drawn by the bundled policy among its 50 most likely next ones, every response of
  --horizon of them, the bundled reward model with its own attention; --instances instances.

"centred" spreads the score less its mean over the prompt's responses, so that a constant offset of the reward model is
not spread over tokens by weights that know the future.

Prints one table a part (cosine of the exact reward-to-go gradient with the true one, relative norm, and the cosine with
the full return) and writes credit_bias.json and credit_bias.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from tokenmdp.credit import CREDIT_METHODS, CreditMethod, Resources, conserve, make_credit
from tokenmdp.envs.task import TextGenTask
from tokenmdp.intervals import bootstrap_interval
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.policy_attention import ForwardAttention
from tokenmdp.testing import (
    TablePolicyAttention,
    ToyMDP,
    agreement,
    expectation,
    likely_tokens,
    policy_gradient,
    restrict,
    score_gradient,
)
from tokenmdp.types import Outcome

NEED_NO_MODEL = frozenset({"attention", "prefix_scores", "policy_attention"})
LEFT_OUT = {
    "rto": "needs a preference-tuned policy",
    "fine-grained": "needs several reward models",
    "owen": "is Shapley where all tokens stand in one clause",
}
OPTIONS = {"integrated-gradients": {"steps": 8}}  # the integral's error is below 1e-5 here: four embeddings move
CENTRED = ("uniform", "attention", "abc-d")
HEADER = ("method", "cosine, reward-to-go", "worst", "relative norm", "cosine, full return")
Record = dict[str, float]


def methods(needs: frozenset[str] | None = None) -> dict[str, CreditMethod]:
    """The registry, with attention also at its default blend; only what ``needs`` can feed, if given."""
    chosen = {}
    for name, method in CREDIT_METHODS.items():
        if name not in LEFT_OUT and (needs is None or method.needs <= needs):
            chosen[name] = make_credit(name, credit_beta=1.0, **OPTIONS.get(name, {}))
            if name == "attention":
                chosen["attention, beta .8"] = make_credit(name, credit_beta=0.8)
    return chosen


def measure(
    credits: dict[str, CreditMethod], mdp: ToyMDP, logits: torch.Tensor, outcome: Outcome, lent: Resources
) -> dict[str, Record]:
    """One instance: a record for each method."""
    truth, records = score_gradient(mdp, logits), {}
    rewards_of = {name: credit(outcome, lent).token_rewards for name, credit in credits.items()}
    # The same weights on the score less the prompt's mean; the mean goes to the last token, where it is a constant.
    mean = expectation(mdp.tabular_seq_logprobs(logits), mdp.scores)
    centred = outcome._replace(reward=outcome.reward._replace(score=outcome.reward.score - mean))
    for name in CENTRED:
        rewards = credits[name](centred, lent).token_rewards
        rewards_of[f"{name}, centred"] = conserve(rewards, outcome.reward.score, outcome.episode.response_mask)
    for name, rewards in rewards_of.items():
        causal = agreement(policy_gradient(mdp, logits, rewards, "reward_to_go"), truth)
        full = agreement(policy_gradient(mdp, logits, rewards, "full_return"), truth)
        records[name] = {
            "cosine": causal.cosine,
            "relative_norm": causal.relative_norm,
            "full_return_cosine": full.cosine,
        }
    return records


def random_instance(seed: int) -> dict[str, Record]:
    """Part one, one instance."""
    mdp = ToyMDP.random(vocab_size=3, horizon=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.empty(mdp.tokens.shape, dtype=torch.float64).exponential_(generator=generator)
    logits = torch.zeros(mdp.num_prefixes, mdp.vocab_size, dtype=torch.float64)
    lent = Resources(policy_attention=TablePolicyAttention(mdp, seed))
    return measure(methods(NEED_NO_MODEL), mdp, logits, mdp.outcome(alpha / alpha.sum(-1, keepdim=True)), lent)


@functools.cache
def bundled_models(horizon: int) -> tuple[TextGenTask, CausalLMPolicy]:
    task = gym.make("tokenmdp:TextGen-IMDb-v0", max_new_tokens=horizon).unwrapped.task
    return task, CausalLMPolicy.for_task("imdb-tiny", task).requires_grad_(False)


def bundled_instance(seed: int, vocab_size: int, horizon: int) -> dict[str, Record]:
    """Part two, one instance."""
    task, policy = bundled_models(horizon)
    prompt = task.draw_prompt(np.random.default_rng(seed))
    tokens = likely_tokens(policy, prompt, vocab_size, generator=torch.Generator().manual_seed(seed))
    restricted = restrict(policy, task.reward_model, prompt, tokens, horizon)
    lent = Resources(task.reward_model, task.tokenizer, ForwardAttention(policy))
    return measure(methods(), restricted.mdp, restricted.logits, restricted.outcome, lent)


def markdown(title: str, instances: list[dict[str, Record]]) -> str:
    """A table with one line per method: means with intervals."""
    lines = [f"### {title}", "", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for name in instances[0]:
        columns = {key: np.array([one[name][key] for one in instances]) for key in instances[0][name]}
        shown = {}
        for key, column in columns.items():
            mean, low, high = bootstrap_interval(column)
            shown[key] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        worst, full = f"{columns['cosine'].min():.3f}", f"{columns['full_return_cosine'].mean():.6f}"
        lines.append(f"| {' | '.join([name, shown['cosine'], worst, shown['relative_norm'], full])} |")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=4)
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    started = time.perf_counter()
    at_random = [random_instance(seed) for seed in range(args.seeds)]
    instance = functools.partial(bundled_instance, vocab_size=args.vocab_size, horizon=args.horizon)
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), **one_thread) as pool:
        bundled = list(pool.map(instance, range(args.instances)))
    text = "\n".join(
        [
            markdown(f"Random token MDPs: V = 3, horizon 3, {args.seeds} instances", at_random),
            markdown(
                f"The bundled models: V = {args.vocab_size}, horizon {args.horizon}, {args.instances} prompts", bundled
            ),
            "Left out: " + "; ".join(f"{name} ({reason})" for name, reason in LEFT_OUT.items()) + ".\n",
        ]
    )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "jobs")}
    record = {"settings": settings, "random": at_random, "bundled": bundled}
    (args.out / "credit_bias.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "credit_bias.md").write_text(text)
    print(f"wrote {args.out / 'credit_bias.json'} and credit_bias.md in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
