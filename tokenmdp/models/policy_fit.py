"""Whether a language model fits the task that it is a policy for: tokens, ends of text, positions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenmdp.models.loading import load_tokenizer, tokenizer_home
from tokenmdp.models.names import resolve
from tokenmdp.models.sizes import output_layer, position_limit
from tokenmdp.models.tokens import VocabularyMismatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def check_rows(lm: PreTrainedModel, vocab_size: int) -> None:
    """Refuse a model with fewer logits than the environment has tokens.

    Raises:
        ValueError: with both numbers.
    """
    rows = len(output_layer(lm).weight)  # type: ignore[arg-type]
    if rows < vocab_size:
        raise ValueError(
            f"the language model has {rows} logits and the environment {vocab_size} tokens: either the "
            "tokenizer is another model's, then pass the environment tokenizer= with the policy's; or tokens such "
            "as [PAD] were added to it, then call model.resize_token_embeddings(len(tokenizer)) and save the "
            "model, or give up the token (tokenizer.pad_token = tokenizer.eos_token before it is saved)"
        )


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a policy whose own tokenizer, if it comes with one, disagrees with the environment's.

    Raises:
        VocabularyMismatch: with the first token that differs.
    """
    home = tokenizer_home("policy", name)
    if home is None:
        return
    theirs = load_tokenizer(resolve("policy", home)).get_vocab()
    different = [(index, token) for token, index in tokenizer.get_vocab().items() if theirs.get(token) != index]
    if different:
        index, token = min(different)
        raise VocabularyMismatch(
            f"the environment's tokenizer ({len(tokenizer)} tokens) and the policy {name!r} ({len(theirs)} tokens) "
            f"differ, first in id {index} ({token!r} in the environment); "
            f"make the environment with tokenizer={name!r}, and a reward model that reads it"
        )


def check_positions(lm: PreTrainedModel, slots: int) -> None:
    """Refuse episodes longer than the model's positions, which would be an index error later.

    Raises:
        ValueError: with both numbers.
    """
    limit = position_limit(lm)
    if limit is not None and slots > limit.tokens:
        raise ValueError(
            f"prompt and response take up to {slots} slots and the policy has {limit}; "
            "lower max_prompt_tokens or max_new_tokens, or of given data leave the longest records out"
        )


def warn_of_other_ends(lm: PreTrainedModel, eos_token_ids: Sequence[int]) -> None:
    """Warn where the model's generation configuration lists ends of text that do not end an episode."""
    listed = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    if isinstance(listed, list) and (others := sorted(set(listed) - set(eos_token_ids))):
        logger.warning(
            "%s ends its texts with any of the ids %s and the environment with %s only, so it will write on after %s; "
            "make the environment with eos_token_id=%s",
            type(lm).__name__, listed, list(eos_token_ids), others, sorted({*listed, *eos_token_ids}),
        )  # fmt: skip
