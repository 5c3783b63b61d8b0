"""Finished episodes as readable text: one record a sample, one piece of text a token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from tokenmdp.types import Rollout


@dataclass(frozen=True)
class Sample:
    """One finished episode as text; ``tokens[t]`` and ``credits[t]`` belong to response token t."""

    prompt: str
    tokens: list[str]
    credits: list[float]
    score: float
    facts: dict[str, float] = field(default_factory=dict)  # further numbers to show, such as kl

    @property
    def text(self) -> str:
        """The prompt and the response as one string."""
        return self.prompt + "".join(self.tokens)


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt_ids: Sequence[int] = ()
) -> tuple[str, list[str]]:
    """The text of the prompt and the piece of text that each token of ``ids`` adds to it.

    ``prompt + "".join(pieces)`` is the decoded whole: decoding token by token would lose blanks between words and
    break characters whose bytes are spread over several tokens. Such a character appears at its last token; the
    tokens before it have an empty piece.
    """

    def decode(row: Sequence[int]) -> str:
        return str(tokenizer.decode(list(row), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # A character cut in two by the prompt's end belongs to the token that completes it.
    shown = prompt = decode(prompt_ids).rstrip("�") if len(prompt_ids) else ""
    pieces = []
    for count in range(1, len(ids) + 1):
        whole = decode([*prompt_ids, *ids[:count]])
        unfinished = whole.endswith("�") and count < len(ids)  # the rest of this character's bytes may follow
        pieces.append("" if unfinished or not whole.startswith(shown) else whole[len(shown) :])
        shown += pieces[-1]
    return prompt, pieces


def samples_from_rollout(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """One `Sample` an episode, with ``kl = sum_t (logprobs[t] - ref_logprobs[t])`` in nats among its facts."""
    prompt_slots = rollout.prompt_slots
    kl = ((rollout.logprobs - rollout.ref_logprobs) * rollout.response_mask).sum(-1)
    samples = []
    for row in range(rollout.input_ids.shape[0]):
        kept = rollout.attention_mask[row].bool()
        prompt_ids = rollout.input_ids[row, :prompt_slots][kept[:prompt_slots]].tolist()
        mask = rollout.response_mask[row].bool()
        prompt, pieces = token_pieces(tokenizer, rollout.input_ids[row, prompt_slots:][mask].tolist(), prompt_ids)
        credits = rollout.token_rewards[row][mask].tolist()
        samples.append(Sample(prompt, pieces, credits, rollout.scores[row].item(), {"kl": kl[row].item()}))
    return samples
