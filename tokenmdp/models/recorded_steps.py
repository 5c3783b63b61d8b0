"""Decoding steps of one shape: a cache that does not grow, so that a GPU can record one step and replay it.

A step of a small model on a GPU waits for its 150 to 200 launches, not for its products; a replayed recording is one
launch. For that every step must read and write the same memory: all columns are there from the start, and where the
next token goes is a number on the device.

Not run on a GPU yet. On other devices nothing is recorded; the steps are the same and computed one by one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from tokenmdp.models.kernels.additive_mask import additive_mask
from tokenmdp.models.kv_cache import GrowingLayer
from tokenmdp.models.token_distribution import DecodeState

logger = logging.getLogger(__name__)

COLUMNS = 64  # recordings are of multiples of it, so that prompts of other lengths need no other one


class FixedLayer(DynamicLayer):
    """Keys and values (N, heads, columns, d) whose columns are all there.

    Args:
        like: keys of the prompts, (N, heads, P, d).
        columns: of every text.
        at: (1,) int64, the column of the next token; all layers share it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    batch_select_indices = property()  # absent: ended rows stay, since other rows would need another recording

    def __init__(self, like: torch.Tensor, columns: int, at: torch.Tensor) -> None:
        super().__init__()
        rows, heads, _, width = like.shape
        self.keys, self.values = (like.new_zeros(rows, heads, columns, width) for _ in range(2))
        self.at, self.is_initialized = at, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the column of the next token; all keys and values, those after it 0."""
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values


class RecordedSteps(Cache):
    """`CausalLMPolicy.append` for N rows of at most ``columns`` slots, on one memory for all rollouts of that shape.

    Args:
        policy: a `CausalLMPolicy`, whose weights stay where they are.
        like: a state behind prompts.
        columns: of every text, the prompt's slots among them.

    Raises:
        ValueError: the model takes no positions, or a layer of its cache is not plain attention.
    """

    def __init__(self, policy: Any, like: DecodeState, columns: int) -> None:
        if not policy.takes_positions or any(type(layer) is not GrowingLayer for layer in like.cache.layers):
            raise ValueError(
                f"rollout_steps='recorded' needs plain attention and positions, which {type(policy.lm).__name__} does "
                "not have in all layers; choose 'copied' or 'plain'"
            )
        rows, device = len(like.attention_mask), like.attention_mask.device
        self.at, self.token = (torch.zeros(size, dtype=torch.long, device=device) for size in (1, rows))
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.visible = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)
        self.fixed = [FixedLayer(layer.keys, columns, self.at) for layer in like.cache.layers]
        super().__init__(layers=list(self.fixed))
        self.policy = policy
        self._recording: Any = None  # torch.cuda.CUDAGraph
        self._output: tuple[torch.Tensor, torch.Tensor] | None = None  # where it leaves its results

    def begin(self, state: DecodeState) -> DecodeState:
        """Take over the prompts of a rollout; the state to go on with."""
        prompt = state.attention_mask.shape[1]
        self.at.fill_(prompt)
        self.position.copy_(state.attention_mask.sum(1, keepdim=True))
        self.visible.zero_()
        self.visible[:, 0, 0, :prompt] = state.attention_mask.bool()
        for mine, theirs in zip(self.fixed, state.cache.layers, strict=True):
            mine.keys[:, :, :prompt], mine.values[:, :, :prompt] = theirs.keys, theirs.values
        return state._replace(cache=self)

    def append(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a token (N,) to every row.

        Returns:
            Raw logits (N, 1, rows) and hidden states (N, 1, C), which the next call overwrites.
        """
        self.token.copy_(token)
        if token.device.type != "cuda":
            return self._step()
        if self._recording is None:
            self._record()
        self._recording.replay()
        assert self._output is not None
        return self._output

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        policy = self.policy
        self.visible.index_fill_(3, self.at, True)
        mask = additive_mask(self.visible, policy.lm.dtype)
        hidden = policy.lm.base_model(
            self.token[:, None], attention_mask=mask, position_ids=self.position, **policy.caching(self)
        ).last_hidden_state
        logits = policy.logits(hidden)
        self.at.add_(1)
        self.position.add_(1)
        return logits, hidden

    def _record(self) -> None:
        state = (self.at, self.position, self.visible)
        before = [tensor.clone() for tensor in state]

        def rewind() -> None:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # A cast that autocast kept would not be part of the recording.
        with torch.autocast("cuda", dtype=self.policy.compute_dtype, cache_enabled=False,
                            enabled=torch.is_autocast_enabled("cuda")):  # fmt: skip
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries allocate their workspaces
                    self._step()
                    rewind()
            torch.cuda.current_stream().wait_stream(stream)
            self._recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._recording):
                self._output = self._step()
        rewind()  # capturing ran nothing, but is not promised to
        rows, columns = len(self.token), self.visible.shape[-1]
        logger.info("recorded a decoding step of %d rows and %d columns", rows, columns)
