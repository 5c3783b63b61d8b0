"""How large a Hugging Face model is, read from the layers that count and not from the names of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Entries of configurations that name a limit; MPT's is the second.
LIMITS = ("max_position_embeddings", "max_seq_len")
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # of Gemma 2 and later, of RecurrentGemma


class PositionLimit(NamedTuple):
    """The longest text that a model reads, in tokens."""

    tokens: int
    reason: str  # "" for the number of its positions; else why it is less

    def __str__(self) -> str:
        return f"{self.tokens} positions{self.reason}"


def position_limit(model: PreTrainedModel) -> PositionLimit | None:
    """The longest text; None where the configuration names no limit, as with ALiBi or recurrent layers.

    A model with LongRoPE reads all tokens of a batch by other angles as soon as one text is longer than what it was
    first trained with, also those that are in a cache already. So it ends there.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return PositionLimit(module.num_embeddings - module.padding_idx - 1, "")  # RoBERTa counts from padding_idx
    return configured_limit(model.config)


def configured_limit(config: Any) -> PositionLimit | None:
    """`position_limit` as far as a configuration alone tells."""
    text = config.get_text_config()
    found = [limit for name in LIMITS if isinstance(limit := getattr(text, name, None), int) and limit > 0]
    limit = found[0] if found else None
    switch = _long_rope_switch(text)
    if switch is not None and (limit is None or switch < limit):
        reason = (
            f" (of {limit}: with LongRoPE the numbers of a text change with the longest text beside it once that is "
            "longer)"
        )
        return PositionLimit(switch, reason)
    return None if limit is None else PositionLimit(limit, "")


def _long_rope_switch(config: Any) -> int | None:
    """The length behind which LongRoPE turns by other angles; None without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one per kind of layer.
    sets = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    lengths = [
        part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for part in sets
        if part.get("rope_type") == "longrope"
    ]
    return min((int(length) for length in lengths if length), default=None)


def output_layer(lm: PreTrainedModel) -> nn.Module:
    """The layer from hidden states (..., C) to logits (..., rows).

    Raises:
        ValueError: there is none with a weight of that shape.
    """
    layer = lm.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if layer is None or weight is None or weight.dim() != 2:
        raise ValueError(
            f"{type(lm).__name__} has no single output layer from hidden states to logits; use a causal language model "
            "such as GPT-2, Llama, Qwen2 or GPT-NeoX"
        )
    return layer


def embedding_rows(model: PreTrainedModel) -> int:
    """The token ids that the model has an embedding for; vocabularies padded for speed have more than tokens.

    Raises:
        ValueError: it has no single table of embeddings.
    """
    try:
        return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    except (NotImplementedError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} has no table of token embeddings; use a model that reads token ids, such as "
            "GPT-2, Llama, BERT or DistilBERT"
        ) from error


def check_finite(weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse weights that are NaN or infinite: most texts would not show it.

    Args:
        weights: By name.
        name: What holds them, for the message.

    Raises:
        ValueError: with the first such weight and how many of its numbers are wrong.
    """
    for key, weight in weights.items():
        if not weight.is_meta and weight.is_floating_point() and (wrong := int((~weight.isfinite()).sum())):
            raise ValueError(
                f"{name} has a weight {key} in which {wrong} of {weight.numel()} numbers are NaN or infinite; restore "
                "a copy, or load a checkpoint from before"
            )


def logit_cap(lm: PreTrainedModel) -> float | None:
    """``cap`` of a model whose logits are ``cap * tanh(raw / cap)``; None: they are raw."""
    text = lm.config.get_text_config()
    found = [cap for name in CAPS if (cap := getattr(text, name, None))]
    return float(found[0]) if found else None


def capped(raw: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(raw / cap)``, or ``raw`` where ``cap`` is None.

    >>> import torch
    >>> capped(torch.tensor([0.0, 60.0]), 30.0).tolist()[0], capped(torch.ones(1), None).tolist()
    (0.0, [1.0])
    """
    return raw if cap is None else cap * (raw / cap).tanh()
