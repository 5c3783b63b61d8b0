"""What a language model must do to be a policy, tried on a few tokens when it becomes one.

Sampling reads a token at a time through a cache, scoring reads whole texts, and texts of different length stand beside
one another behind padding. Where these disagree every log-probability would be wrong, and nothing would say so.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tokenmdp.models.kv_cache import make_cache

SHORT, LONG = 3, 9  # tokens of the probes
TOLERANCE = 1e-3  # of the largest difference between logits
LARGE = 100.0  # raw logits at which a cap shows


class Reads(Protocol):
    """The parts of a `CausalLMPolicy` that are tried."""

    lm: Any
    vocab_size: int
    rows: int  # of the output layer

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        """The output of the backbone."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states."""

    def caching(self, cache: Any) -> dict[str, Any]:
        """Arguments of `read` for a cache."""


@torch.no_grad()
def check_logits(policy: Reads) -> None:
    """Refuse models that change the logits after the output layer in a way that is not known here.

    Tried with hidden states as they are and so large that a soft cap would show.

    Raises:
        ValueError: with the largest difference; or the logits are not finite.
    """
    lm, ids = policy.lm, _probe(policy, SHORT)[None]
    head = lm.get_output_embeddings()
    largest = head(_hidden(policy, ids)).abs().max().clamp(min=1e-6)
    for scale in (1.0, float(LARGE / largest)):
        hook = head.register_forward_pre_hook(lambda layer, inputs, scale=scale: (inputs[0] * scale, *inputs[1:]))
        try:
            ours, theirs = policy.logits(_hidden(policy, ids)), lm(ids).logits
        finally:
            hook.remove()
        if scale == 1 and not theirs.isfinite().all():
            raise ValueError(f"{type(lm).__name__} gives NaN or infinite logits; look for NaN in its weights")
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(lm).__name__} changes its logits after the output layer (largest difference "
                f"{(ours - theirs).abs().max():.3g} where logits reach {ours.abs().max():.3g}); use a model whose "
                "logits are lm_head(backbone(ids)), or their soft cap, such as GPT-2, Llama, Gemma or Qwen2"
            )


@torch.no_grad()
def reads_padding(policy: Reads) -> bool:
    """Whether the numbers of a text change with the padding before it, so that all prompts need one length.

    Raises:
        ValueError: reading token by token through the cache gives other numbers than reading the whole text.
    """
    short, long = _probe(policy, SHORT), _probe(policy, LONG)
    beside = torch.stack([torch.cat([short.new_zeros(LONG - SHORT), short]), long])
    mask = torch.ones_like(beside)
    mask[0, : LONG - SHORT] = 0
    whole = policy.logits(_hidden(policy, short[None]))[0, -1]
    stepwise = _last_logits(policy, short[None], torch.ones_like(short)[None])
    spread = (whole.max() - whole.min()).clamp(min=1e-6)

    def differs(logits: torch.Tensor) -> bool:
        return not bool((logits - whole).abs().max() <= TOLERANCE * spread)

    if differs(stepwise):
        raise ValueError(
            f"{type(policy.lm).__name__} gives other logits when it reads token by token through its cache than when "
            f"it reads a whole text (largest difference {(stepwise - whole).abs().max():.3g}), so what it samples "
            "could not be scored; use a causal language model with a key-value cache, such as GPT-2, Llama or Qwen2"
        )
    padded = policy.logits(policy.read(beside, mask, use_cache=False).last_hidden_state)[0, -1]
    return differs(padded) or differs(_last_logits(policy, beside, mask))


def _probe(policy: Reads, length: int) -> torch.Tensor:
    """``length`` different ids, the same at every call."""
    ids = (torch.arange(length, device=policy.lm.device) * 7 + 2) % min(policy.vocab_size, policy.rows)
    return ids


def _hidden(policy: Reads, ids: torch.Tensor) -> torch.Tensor:
    return policy.read(ids, torch.ones_like(ids), use_cache=False).last_hidden_state


def _last_logits(policy: Reads, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first row's logits after its last token, which is read alone behind a cache of the others; float32, raw."""
    cache = make_cache(policy.lm.config)
    policy.read(ids[:, :-1], mask[:, :-1], **policy.caching(cache))
    hidden = policy.read(ids[:, -1:], mask, **policy.caching(cache)).last_hidden_state
    return policy.logits(hidden)[0, -1]
