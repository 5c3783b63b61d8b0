"""The cost of a credit method, counted while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tokenmdp.credit import REWARD_MODEL_NEEDS, CreditMethod, MissingResource, Resources
from tokenmdp.credit.base import PolicyAttention
from tokenmdp.credit.rescale import Paired
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.policy_attention import ForwardAttention
from tokenmdp.reward_models import RewardModel, load_reward_model, readable_by
from tokenmdp.reward_models.base import EmbeddedTexts
from tokenmdp.types import Credit, Episode, Outcome, RewardOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BACKWARD = 2  # a backward pass counts as this many forwards: it does about twice a forward's arithmetic


class CountingRewardModel(RewardModel):
    """``model``, counting the texts it reads.

    Attributes:
        forwards: texts read so far, whatever their length, with `BACKWARD` more for each one differentiated. The
            scores of all prefixes from one forward count as that one forward. What DeepLIFT repeats inside attention
            and normalisation does not count.
    """

    def __init__(self, model: RewardModel) -> None:
        super().__init__(model.tokenizer)
        self.model = model
        self.provides, self.max_tokens = model.provides, model.max_tokens
        self.forwards = 0

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """The output of ``model``."""
        self.forwards += len(episodes.input_ids)
        return self.model.evaluate(episodes, needs)

    def embedded(self, episodes: Episode) -> EmbeddedTexts:
        """The embeddings of ``model``; their scores count, and count again when they are differentiated."""
        texts = self.model.embedded(episodes)

        def score(embeddings: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            self.forwards += len(embeddings) * (2 if isinstance(embeddings, Paired) else 1)  # a pair runs as two texts
            scores = texts.score(embeddings, index)
            if scores.requires_grad:
                with torch._C.DisableTorchFunctionSubclass():  # or DeepLIFT's pairs would take the hook for a formula
                    scores.register_hook(lambda gradient: self._count_backward(len(gradient)))
            return scores

        return texts._replace(score=score)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Call ``model``."""
        self.model.check_tokenizer(tokenizer)

    def _count_backward(self, rows: int) -> None:
        self.forwards += BACKWARD * rows

    def __repr__(self) -> str:
        return repr(self.model)


class PolicyCounter:
    """Counts the texts that policies read.

    Attributes:
        forwards: so far.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self._watched: set[int] = set()

    @contextlib.contextmanager
    def watching(self, policy: CausalLMPolicy) -> Iterator[None]:
        """Count what ``policy`` reads inside the block; once, if it is watched already."""
        if id(policy) in self._watched:
            yield
            return

        def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self.forwards += len(args[0])

        backbone: torch.nn.Module = policy.lm.base_model
        hook = backbone.register_forward_pre_hook(count)
        self._watched.add(id(policy))
        try:
            yield
        finally:
            hook.remove()
            self._watched.remove(id(policy))

    def loading(self, load: Callable[[str], CausalLMPolicy], stack: contextlib.ExitStack) -> Callable[[str], Any]:
        """``load``, with every policy that it loads watched until ``stack`` closes."""

        def load_and_watch(name: str) -> CausalLMPolicy:
            policy = load(name)
            stack.enter_context(self.watching(policy))
            return policy

        return load_and_watch


class PolicyAccess(NamedTuple):
    """The policies that credit methods may read; None: not available, and methods that need it say so."""

    policy: CausalLMPolicy | None = None  # whose attention counts as the live policy's
    load_policy: Callable[[str], CausalLMPolicy] | None = None
    refusal: str | None = None  # why there is no policy, for the error message


NO_POLICY = PolicyAccess()


class Counted(NamedTuple):
    """One method's credit for N episodes, and its total cost."""

    credit: Credit
    score: torch.Tensor  # (N,)
    reward_forwards: int  # including the forward that scores
    policy_forwards: int


def run_counted(
    method: CreditMethod,
    episodes: Episode,
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    access: PolicyAccess,
) -> Counted:
    """Score ``episodes`` and credit their tokens, as an environment does, and count.

    Args:
        method: the credit method.
        episodes: N, in the tokens of ``tokenizer``.
        model: the reward model; one with another vocabulary reads the decoded text.
        tokenizer: of the episodes.
        access: the policies; the attention is computed by one more forward of it.

    Raises:
        ValueError: the method needs something that is missing (`MissingResource`, or the reward model does not provide
            it).
    """
    models, policies = [CountingRewardModel(model)], PolicyCounter()

    def load_reward(name: str) -> RewardModel:
        models.append(CountingRewardModel(load_reward_model(name)))
        return readable_by(models[-1], tokenizer)

    readable = readable_by(models[0], tokenizer)
    reward = readable(episodes, needs=method.needs & REWARD_MODEL_NEEDS)
    outcome = Outcome(episodes, reward, torch.arange(len(episodes.input_ids)))
    with contextlib.ExitStack() as stack:
        attention: PolicyAttention | None = None
        if access.policy is not None:
            attention = ForwardAttention(access.policy)
            stack.enter_context(policies.watching(access.policy))
        elif access.refusal is not None:
            attention = _refuse(access.refusal)
        load = None if access.load_policy is None else policies.loading(access.load_policy, stack)
        credit = method(outcome, Resources(readable, tokenizer, attention, load, load_reward))
    return Counted(credit, reward.score, sum(counting.forwards for counting in models), policies.forwards)


def _refuse(reason: str) -> PolicyAttention:
    def attention(outcome: Outcome) -> torch.Tensor:
        raise MissingResource(reason)

    return attention
