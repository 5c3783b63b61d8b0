"""What a policy needs that learns from given responses: its tokens, its reference, and how likely responses are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tokenmdp.agents.data import DataLearner, Example, Reads
from tokenmdp.agents.learner import policy_and_reference, without_value_head
from tokenmdp.models.encoding import vocab_size
from tokenmdp.models.loading import load_config, load_own_tokenizer
from tokenmdp.models.sizes import configured_limit
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from accelerate import Accelerator


class DataTokens(NamedTuple):
    """The `tokenmdp.types.TokenSpace` of given texts."""

    tokenizer: Any
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_prompt_tokens: int
    max_new_tokens: int
    min_new_tokens: int = 0

    @property
    def eos_token_id(self) -> int:
        """Ends a response."""
        return self.eos_token_ids[0]


class PolicyFromData(DataLearner):
    """A policy that learns from given responses; the value head is not used and stays as it is.

    Args:
        policy: Alias, directory or hub name of a causal language model, or such a model (trained in place).
        examples: In the tokens of that model.
        config: The run's numbers.
        reference: Name or model that the KL is measured to; default ``policy`` as it starts.
        accelerator: For a run in several processes.
        tokenizer: Of a policy that is an object; that of a named one is loaded.

    Raises:
        BadPreferences: ids that the model does not have, or more of them than it reads.
        ValueError: a model object without a tokenizer.
    """

    def __init__(
        self,
        policy: str | Any,
        examples: Sequence[Example],
        config: Any,
        reference: str | Any | None,
        accelerator: Accelerator | None,
        tokenizer: Any,
    ) -> None:
        super().__init__(examples, config, accelerator)
        if tokenizer is None and not isinstance(policy, str):
            raise ValueError("the policy is an object; pass tokenizer= with the tokenizer of the data")
        self._tokenizer = tokenizer or load_own_tokenizer("policy", policy)
        reads, end = what_it_reads(policy, self._tokenizer), self._tokenizer.eos_token_id
        reads.check(examples)
        prompt, response = (int(longest) for longest in self.lengths.max(0))
        tokens = DataTokens(self._tokenizer, reads.vocab_size, (0 if end is None else end,), prompt, response)
        self.policy, frozen = policy_and_reference(policy, reference, tokens, self.config, self.processes)
        self.prepare(self.policy, frozen)

    @property
    def tokenizer(self) -> Any:
        """Of the policy."""
        return self._tokenizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The language model or its adapters."""
        return without_value_head(self.policy, self.config.learning_rate)

    def logprobs(self, model: Any, episodes: Episode) -> torch.Tensor:
        """Log-probabilities (n, H) in nats of the response tokens, 0 in the padding."""
        scored = model(episodes.input_ids, episodes.attention_mask, episodes.prompt_slots).logprobs
        return scored * episodes.response_mask


def what_it_reads(policy: str | Any, tokenizer: Any) -> Reads:
    """Of a model, or of one that is not loaded yet, by name."""
    if isinstance(policy, str):
        name, config = policy, load_config("policy", policy)
    else:
        name, config = type(policy).__name__, policy.config
    limit = configured_limit(config)
    return Reads(name, vocab_size(tokenizer), limit and limit.tokens)
