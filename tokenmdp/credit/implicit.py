"""Credit from what a preference-tuned policy has learned about single tokens (RTO)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from tokenmdp.credit.base import MissingResource, Resources
from tokenmdp.credit.options import check_number, check_whole
from tokenmdp.credit.weights import redistribute, sparse_weights
from tokenmdp.types import Credit, Episode, Outcome

PROCESSING = ("vocab_size", "eos_token_id", "min_new_tokens", "temperature", "top_k")


@runtime_checkable
class TokenScorer(Protocol):
    """The part of a `CausalLMPolicy` that is used: its log-probabilities, and what shapes them."""

    vocab_size: int
    eos_token_id: int
    min_new_tokens: int
    temperature: float
    top_k: int

    def evaluate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_slots: int) -> Any:
        """``.logprobs`` (N, H) of the response tokens."""
        ...

    def parameters(self) -> Iterator[torch.Tensor]:
        """The weights, which show the device."""
        ...


@dataclass(frozen=True)
class ImplicitRewardCredit:
    """``token_rewards[t] = clip(rto_beta * (log tuned[t] - log reference[t]), -clip, clip) + score * 1[t = last]``.

    ``tuned[t]`` and ``reference[t]`` are the probabilities of response token t under a policy that was tuned on
    preferences (such as by DPO) and the policy it was tuned from; with rto_beta the dpo_beta of the tuning, the
    difference is the reward that it implies. A tuned policy that equals its reference gives sparse credit. The sum
    exceeds the score by the implicit rewards, which `info["credit_residual"]` reports. Reports ``clipped_share``, the
    share of tokens at the clip. The paper's KL term is the agent's ``kl_coef``.

    Both policies score under the same processing of their logits (end of text masked before min_new_tokens, one
    temperature); top-k is refused, because a token that one of them cannot sample has no log-ratio.

    Source: Zhong et al., "DPO Meets PPO: Reinforced Token Optimization for RLHF", 2024.

    Args:
        tuned: the preference-tuned policy: a name or directory, or a `CausalLMPolicy`; such a directory is what
            ``tokenmdp train dpo`` writes (its ``checkpoint/``).
        reference: what it was tuned from.
        rto_beta: scales the log-ratio.
        clip: the most that one token can get, in units of the score; infinity does not clip.
        rows_per_forward: texts that a policy reads at a time.
    """

    tuned: Any
    reference: Any = "imdb-tiny"
    rto_beta: float = 0.1
    clip: float = 1.0
    rows_per_forward: int = 64
    name: ClassVar[str] = "rto"
    conserves_return: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"tuned_policy"})

    def __post_init__(self) -> None:
        check_number("rto_beta", self.rto_beta)
        check_number("clip", self.clip)
        check_whole("rows_per_forward", self.rows_per_forward, 1)
        if not 0.0 <= self.rto_beta < float("inf"):
            raise ValueError(f"rto_beta is {self.rto_beta}; it scales a log-ratio and must be 0 or more")
        if not self.clip > 0.0:
            raise ValueError(f"clip is {self.clip}; it must be positive (infinity does not clip)")
        for name, policy in (("tuned", self.tuned), ("reference", self.reference)):
            if not isinstance(policy, (str, TokenScorer)):
                raise TypeError(
                    f"{name} is {type(policy).__name__}; pass a policy's name or directory, or a CausalLMPolicy, "
                    "such as CausalLMPolicy.for_task(model, env.unwrapped.task)"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> ImplicitRewardCredit:
        """The method itself: Gymnasium copies a wrapper's arguments, and two language models must not multiply."""
        return self

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) of any sign, and the report.

        Raises:
            MissingResource: a policy is given by name and there is no loader for it.
            ValueError: the two policies process their logits differently, or with top-k.
        """
        tuned, reference = (self._policy(policy, resources) for policy in (self.tuned, self.reference))
        for name in PROCESSING:
            ours, theirs = getattr(tuned, name), getattr(reference, name)
            if ours != theirs:
                raise ValueError(f"the tuned policy has {name} {ours} and its reference {theirs}; make them with one")
        if tuned.top_k:
            raise ValueError(f"the policies have top_k {tuned.top_k}; make them with top_k=0, which scores every token")
        episode, mask, score = outcome.episode, outcome.episode.response_mask.bool(), outcome.reward.score
        log_ratio = self._logprobs(tuned, episode) - self._logprobs(reference, episode)
        implicit = torch.where(mask, self.rto_beta * log_ratio, 0.0)
        clipped = implicit.clamp(-self.clip, self.clip)
        share = (clipped != implicit).sum(-1) / mask.sum(-1).clamp(min=1)
        sparse = redistribute(score, sparse_weights(mask))
        return Credit(clipped.to(score.dtype) + sparse, {"clipped_share": share})

    def _policy(self, policy: str | TokenScorer, resources: Resources) -> TokenScorer:
        if not isinstance(policy, str):
            return policy
        if resources.load_policy is None:
            raise MissingResource(f"nobody here loads the policy {policy!r} by name; pass a CausalLMPolicy instead")
        return resources.load_policy(policy)

    @torch.no_grad()
    def _logprobs(self, policy: TokenScorer, episode: Episode) -> torch.Tensor:
        """(N, H) float64 on the CPU."""
        device, parts = next(policy.parameters()).device, []
        for rows in torch.arange(len(episode.input_ids)).split(self.rows_per_forward):
            ids, mask = episode.input_ids[rows].to(device), episode.attention_mask[rows].to(device)
            parts.append(policy.evaluate(ids, mask, episode.prompt_slots).logprobs.double().cpu())
        return torch.cat(parts)
