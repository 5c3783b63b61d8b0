"""The attention rows of a few tokens, captured at sdpa speed and without a T x T map.

transformers gives attention weights only in its eager implementation, which holds (N, heads, T, T). Here a model runs
an implementation of our own: sdpa, which inside `capture_rows` also computes the rows that were asked for, each one
softmax over T numbers per head. After the forward the latest are the last layer's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from tokenmdp.models.kernels import additive_mask, cpu_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "tokenmdp_row"


class RowCapture:
    """The rows of the latest attention call, or of every call; see `capture_rows`.

    They are computed as the call is made. Keeping its keys for later would keep more: in GPT-2 they are a view of one
    tensor with queries and values, (N, T, 3 heads D), which would stay in memory while the layer's widest activations
    exist.
    """

    def __init__(self, index: torch.Tensor, every_layer: bool) -> None:
        self.index = index  # (N, R) int64: among the queries of a call, those whose rows are wanted
        self.every_layer = every_layer
        self._layers: list[torch.Tensor] = []  # (N, heads, R, T) each

    @property
    def seen(self) -> bool:
        """Whether there was any call."""
        return bool(self._layers)

    def keep(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None, is_causal: bool
    ) -> None:
        """Keep one call's rows: query (N, heads, S, D), key (N, key heads, T, D), mask (N, 1 or heads, 1 or S, T)."""
        if not self.every_layer:
            self._layers.clear()
        rows = torch.arange(query.shape[0], device=query.device)[:, None]  # (N, 1) against (N, R)
        index, key_heads = self.index.to(query.device), key.shape[1]
        chosen = query[rows, :, index].transpose(1, 2).float()  # (N, heads, R, D)
        chosen = chosen.unflatten(1, (key_heads, chosen.shape[1] // key_heads))  # query heads that share a key head
        with torch.autocast(query.device.type, enabled=False):  # it would round the products
            scores = torch.einsum("nkgrd,nktd->nkgrt", chosen, key.float()).flatten(1, 2)  # (N, heads, R, T)
        # In place from here on: for many rows the scores are the largest tensor of the layer.
        scores.mul_(query.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is not None:
            mask = mask.expand(query.shape[0], -1, query.shape[2], -1)  # a view: no memory
            visible = mask[rows, :, index].transpose(1, 2)  # (N, 1 or heads, R, T)
            if visible.dtype == torch.bool:
                scores.masked_fill_(~visible, -torch.inf)
            else:
                scores.add_(visible)
        elif is_causal:
            cached = key.shape[2] - query.shape[2]  # keys of earlier calls stand before this call's
            seen = torch.arange(key.shape[2], device=key.device) <= cached + index[..., None]  # (N, R, T)
            scores.masked_fill_(~seen[:, None], -torch.inf)
        self._layers.append(scores.softmax(-1))

    def rows(self) -> torch.Tensor:
        """``mean over heads of softmax(q K^T * scaling)`` in float32; (N, R, T), each row sums to 1.

        Raises:
            ValueError: no attention call was seen.
        """
        if not self.seen:
            raise ValueError(
                "the model made no call through transformers' AttentionInterface, so its attention row cannot be "
                "captured; use UniformReward or SparseReward, or a model such as GPT-2, Llama, BERT or DistilBERT"
            )
        return self._layers[-1].mean(1)

    def layers(self) -> torch.Tensor:
        """The rows of every layer and head, (N, layers, heads, R, T), where ``every_layer`` was asked for."""
        return torch.stack(self._layers, dim=1)


_capture: ContextVar[RowCapture | None] = ContextVar("tokenmdp_row_capture", default=None)


@contextlib.contextmanager
def capture_rows(index: torch.Tensor, *, every_layer: bool = False) -> Iterator[RowCapture]:
    """Keep the rows of queries ``index`` (N, R) of the last layer run in the block, by a model that `install` prepared.

    Layers run one after the other and each overwrites what the one before left, so the last one stays: no architecture
    needs to be known. With ``every_layer`` the rows of all are kept.
    """
    capture = RowCapture(index, every_layer)
    token = _capture.set(capture)
    try:
        yield capture
    finally:
        _capture.reset(token)


def install(model: PreTrainedModel) -> bool:
    """Switch ``model`` to sdpa with row capture; False, and no change, where its architecture does not allow that."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not (model._supports_sdpa and model._can_set_attn_implementation()):
        return False
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    model.set_attn_implementation(IMPLEMENTATION)
    return True


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal  # as sdpa reads it
    capture = _capture.get()
    if capture is not None:
        if options.get("position_bias") is not None:
            raise ValueError(
                f"{type(module).__name__} adds position biases to its attention scores, which the captured row does "
                "not know; use UniformReward or SparseReward with this model"
            )
        capture.keep(query, key, attention_mask, scaling, causal)
    if cpu_attention.attends(query, key) and not options.get("dropout") and options.get("position_bias") is None:
        return cpu_attention.attend(query, key, value, attention_mask, scaling, causal), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
    )


def _mask(
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    use_vmap: bool = False,
    **options: Any,
) -> torch.Tensor | None:
    """Transformers' sdpa mask, but for two cases.

    Plain padding in an encoder stays (N, 1, 1, T) instead of (N, 1, T, T). And on a GPU nobody asks whether there is
    padding, because the host would wait for the answer (`tokenmdp.models.kernels.additive_mask`). So a mask is always
    passed there: FlashAttention, which takes none, is never used, models with grouped queries repeat their keys and
    values, and (N, 1, S, T) is held. Whether that is quicker has not been measured on a GPU.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = local_size is None and not use_vmap
    if attention_mask is None or attention_mask.device.type == "cpu":
        if allow_is_bidirectional_skip and plain:
            return None if attention_mask is None or attention_mask.all() else attention_mask.bool()[:, None, None, :]
    elif allow_is_bidirectional_skip and plain:
        return additive_mask.padding_mask(attention_mask.bool(), options["dtype"])
    else:
        queries, tokens = options.get("q_length", 0), options["kv_length"]  # earlier versions give cache_position
        whole = queries > 0 and options["q_offset"] == tokens - queries and attention_mask.shape[1] == tokens
        if whole and plain and options["mask_function"] is causal_mask_function:
            return additive_mask.causal_mask(attention_mask.bool(), queries, options["dtype"])
        allow_is_bidirectional_skip, options["allow_is_causal_skip"] = False, False
    return sdpa_mask(
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        local_size=local_size,
        use_vmap=use_vmap,
        **options,
    )
