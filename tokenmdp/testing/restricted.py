"""A real task cut down until it can be enumerated: a few real tokens, a short horizon, the real models."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.reward_models import RewardModel
from tokenmdp.testing.toy_mdp import ToyMDP, enumerate_responses
from tokenmdp.types import Episode, Outcome, RewardOutput


class RestrictedTask(NamedTuple):
    """All responses of ``horizon`` tokens over a few real ones."""

    mdp: ToyMDP  # its token v stands for token_ids[v]
    logits: torch.Tensor  # (num_prefixes, V) float64: the policy, as `mdp` reads it
    outcome: Outcome  # the M responses in real ids, as the reward model scored them, float64
    token_ids: list[int]


@torch.no_grad()
def restrict(
    policy: CausalLMPolicy, reward_model: RewardModel, prompt: list[int], token_ids: list[int], horizon: int
) -> RestrictedTask:
    """Enumerate the responses to ``prompt`` and let both models read them, the policy with one forward.

    The policy of the restricted task is ``policy`` given that it chooses among ``token_ids``: the softmax over their
    log-probabilities at every prefix. Scores, attention rows and prefix scores are the reward model's own, in float64
    (computed in float32); what it does not provide is None, and 0 in ``mdp.prefix_scores``.

    Args:
        policy: reads the prompt and ``horizon`` further tokens.
        reward_model: reads the same tokens.
        prompt: token ids.
        token_ids: V different ids without the end of text, so that every response has ``horizon`` tokens.
        horizon: H; V ** H responses are held in memory.
    """
    if policy.eos_token_id in token_ids or len(set(token_ids)) != len(token_ids):
        raise ValueError(f"token_ids are {token_ids}; give different ids, none the end of text {policy.eos_token_id}")
    tokens, mask = enumerate_responses(len(token_ids), horizon)
    ids = torch.cat([torch.tensor(prompt).expand(len(tokens), -1), torch.tensor(token_ids)[tokens]], dim=1)
    episode = Episode(ids, torch.ones_like(ids, dtype=torch.bool), mask)
    wanted = frozenset({"attention", "prefix_scores"}) & reward_model.provides
    score, *parts = reward_model(episode, needs=wanted)
    reward = RewardOutput(score.double(), *(None if part is None else part.double() for part in parts))
    prefix_scores = torch.zeros(len(tokens), horizon + 1, dtype=torch.float64)
    prefix_scores[:, -1] = reward.score
    if reward.prefix_scores is not None:
        prefix_scores = reward.prefix_scores
    mdp = ToyMDP(len(token_ids), horizon, None, tokens, mask, reward.score, prefix_scores)
    device = policy.lm.device
    logprobs = policy.evaluate(ids.to(device), episode.attention_mask.to(device), len(prompt)).logprobs.double().cpu()
    logits = torch.zeros(mdp.num_prefixes, mdp.vocab_size, dtype=torch.float64)
    logits[mdp.prefixes(), tokens] = logprobs  # responses that share a prefix write the same number
    return RestrictedTask(mdp, logits, Outcome(episode, reward, torch.arange(len(tokens))), list(token_ids))


@torch.no_grad()
def likely_tokens(
    policy: CausalLMPolicy, prompt: list[int], count: int, top: int = 50, generator: torch.Generator | None = None
) -> list[int]:
    """``count`` different tokens drawn by the policy among its ``top`` most likely after ``prompt``, no end of text."""
    ids = torch.tensor([prompt], device=policy.lm.device)
    logits = policy.prefill(ids, torch.ones_like(ids)).logits[0].cpu()
    logits[policy.eos_token_id] = -torch.inf
    best = logits.topk(top)
    return best.indices[best.values.softmax(-1).multinomial(count, generator=generator)].tolist()
