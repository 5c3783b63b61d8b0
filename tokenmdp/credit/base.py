"""What a credit method is: finished episodes in, one reward per token out, and what it declares about itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch

from tokenmdp.types import Credit, Outcome

if TYPE_CHECKING:
    from tokenmdp.reward_models import RewardModel

NEEDS = {
    "attention": "the reward model's last-layer attention row of the token it pools",
    "attention_layers": "that row in every layer and head",
    "prefix_scores": "the reward model's score of every prefix, from one forward",
    "gradients": "gradients of the score with respect to the reward model's input embeddings",
    "reward_calls": "further reward-model forwards on changed texts",
    "policy_attention": "the live policy's attention, which an agent attaches",
    "tuned_policy": "a preference-tuned policy and its reference",
}
# What a reward model must provide; it computes all but the gradients in the forward that scores.
REWARD_MODEL_NEEDS = frozenset({"attention", "attention_layers", "prefix_scores", "gradients"})

PolicyAttention = Callable[[Outcome], torch.Tensor]


class MissingResource(ValueError):
    """A credit method needs something that is not attached; the message says what, and how to attach it."""


class Resources(NamedTuple):
    """What an environment provides to a credit method beyond the outcome. None: not available in this environment.

    Attributes:
        reward_model: the model that gave the score, for further calls.
        tokenizer: of the response tokens.
        policy_attention: ``(outcome) -> (N, H, H)`` float32: entry ``[n, q, k]`` is how much the policy's last layer,
            averaged over heads, looked at response token k when it had read response tokens up to q, so it is zero
            for k > q. Row q stands before the choice of token q + 1; the row of the last token is never read and may
            hold anything.
        load_policy: ``(name) -> CausalLMPolicy`` for this task, loaded once.
        load_reward_model: ``(name) -> RewardModel`` that reads this task's tokens, loaded once.
    """

    reward_model: RewardModel | None = None
    tokenizer: Any = None
    policy_attention: PolicyAttention | None = None
    load_policy: Callable[[str], Any] | None = None
    load_reward_model: Callable[[str], RewardModel] | None = None


class CreditMethod(Protocol):
    """Turns finished episodes into token rewards; what a wrapper binds.

    Attributes:
        name: what the registry, the command line and reports call it.
        conserves_return: ``sum_t token_rewards[t] == score``.
        causal: before the last token, ``token_rewards[t]`` depends on the prompt and on tokens up to t only.
        potential_based: equals the sparse reward plus ``phi(s[t+1]) - phi(s[t])`` for a function phi of the state, so
            that with gamma = 1 the reward-to-go policy gradient (GAE with lambda 1) is unbiased. With a smaller lambda
            a critic's errors bias it, whatever the credit.
        needs: keys of `NEEDS`. No forward beyond the one that scores happens unless it says so.
    """

    name: ClassVar[str]
    conserves_return: ClassVar[bool]
    causal: ClassVar[bool]
    potential_based: ClassVar[bool]
    needs: ClassVar[frozenset[str]]

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) in the score's dtype for the N episodes of ``outcome``, zero outside the response.

        Raises:
            MissingResource: something that the method needs is not in ``resources``.
        """
        ...
