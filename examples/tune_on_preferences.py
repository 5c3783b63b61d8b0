"""A preference-tuned policy (DPO) for implicit-reward credit. Offline; minutes on two cores.

Two responses per prompt are sampled from the policy, a reward model says which is better, and the policy learns to
prefer it, staying near where it began. The directory that is written is a policy for any agent, and for RTO:

python examples/tune_on_preferences.py --out runs/tuned --pairs 4096 --steps 200
tokenmdp.credit.make_credit("rto", tuned="runs/tuned", rto_beta=0.1)      # the dpo_beta of the tuning
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import torch

import tokenmdp  # noqa: F401  (registers the environment ids)
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.precision import resolve_dtype
from tokenmdp.preference_losses import dpo_loss
from tokenmdp.rollouts import collect
from tokenmdp.types import Rollout
from tokenmdp.wrappers import vector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True, help="directory for the tuned policy and its tokenizer")
parser.add_argument("--pairs", type=int, default=4096, help="prompts, each with two responses")
parser.add_argument("--steps", type=int, default=200, help="updates, of one batch of pairs each")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--env", default="TextGen-IMDb-v0", help="its reward model says which response is better")
parser.add_argument("--policy", default="imdb-tiny")
parser.add_argument("--dpo-beta", type=float, default=0.1)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--seed", type=int, default=1)


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if min(args.pairs, args.steps, args.batch) < 1:
        parser.error("--pairs, --steps and --batch must be at least 1")
    num_envs = min(args.batch, args.pairs)
    envs = vector.SparseReward(gym.make_vec(args.env, num_envs=num_envs, autoreset_mode="Disabled"))
    task, dtype = envs.unwrapped.task, resolve_dtype("auto", torch.device("cpu"))
    policy = CausalLMPolicy.for_task(args.policy, task, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(args.seed)

    # The same seed draws the same prompts, and the generator has moved on: two responses per prompt.
    batches, scores = [], []
    for seed in range(args.seed, args.seed + args.pairs - num_envs + 1, num_envs):
        first, second = (collect(envs, policy, policy, generator, seed=seed)[0] for _ in range(2))
        scores.append(torch.stack([first.scores, second.scores]))
        if (first.scores != second.scores).any():
            batches.append((first, second))
    if not batches:
        raise SystemExit("both responses of every pair have one score, so nothing is preferred; sample more --pairs")
    score = torch.cat(scores, dim=1)  # (2, pairs)
    preferred = (score[0] != score[1]).sum()
    print(f"{score.shape[1]} pairs, {preferred} with a preference; mean score {score.mean():+.2f}", flush=True)

    optimizer = torch.optim.AdamW(policy.lm.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - (step - 1) / args.steps)
        loss, agreement = preference_loss(policy, batches[step % len(batches)], args.dpo_beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.lm.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}, prefers the better of {agreement:.0%} of pairs", flush=True)

    reference = CausalLMPolicy.for_task(args.policy, task, compute_dtype=dtype)
    # Prompts that no pair began with.
    _, metrics = collect(envs, policy, reference, generator, seed=args.seed + args.pairs)
    print(f"tuned: mean score {metrics['score_mean']:+.2f}, KL {metrics['kl']:.2f} nats a response")
    args.out.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(args.out)
    task.tokenizer.save_pretrained(args.out)
    print(f"policy: {args.out}")


def preference_loss(
    policy: CausalLMPolicy, pair: tuple[Rollout, Rollout], dpo_beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The DPO loss of a batch of pairs, and how often the policy's implied reward agrees with the scores."""
    first, second = pair
    mask = first.scores != second.scores  # equal scores prefer nothing
    better = first.scores > second.scores
    logprobs, ref_logprobs = [], []
    for rollout in pair:
        scored = policy.evaluate(rollout.input_ids, rollout.attention_mask, rollout.prompt_slots).logprobs
        logprobs.append((scored * rollout.response_mask).sum(-1)[mask])  # (N, H) -> (pairs with a preference,)
        ref_logprobs.append(rollout.ref_logprobs.sum(-1)[mask])

    def ordered(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(better[mask], *values), torch.where(better[mask], *values[::-1])

    (chosen, rejected), (ref_chosen, ref_rejected) = ordered(logprobs), ordered(ref_logprobs)
    agreement = (chosen - ref_chosen > rejected - ref_rejected).float().mean()
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, dpo_beta), agreement


if __name__ == "__main__":
    main()
