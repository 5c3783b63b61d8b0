"""Decoding steps of one shape: a cache that does not grow, so that a GPU can record one step and replay it.

A step of a small model has 150 to 200 launches (counted on a device that the CPU plays) and hardly any products; a
replayed recording is one launch. For that every step must read and write the same memory: all columns are there from
the start, and where the next token goes is a number on the device.

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
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of probabilities
REMEDY = "choose 'copied' or 'plain'"


class FixedLayer(DynamicLayer):
    """Keys and values (N, heads, columns, d) whose columns are all there, those not yet written 0.

    Args:
        like: a layer that holds the prompts.
        columns: of every text.
        at: (1,) int64, the column of the next token; all layers share it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    batch_select_indices = property()  # absent: ended rows stay, since other rows would need another recording

    def __init__(self, like: Any, columns: int, at: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = (
            part.new_zeros(*part.shape[:2], columns, part.shape[-1]) for part in (like.keys, like.values)
        )
        self.at, self.is_initialized = at, True

    def begin(self, like: Any, prompt: int) -> None:
        """Take over the first ``prompt`` columns of another layer."""
        for mine, theirs in ((self.keys, like.keys), (self.values, like.values)):
            mine.zero_()  # a NaN of the rollout before would get through the mask
            mine[:, :, :prompt] = theirs[:, :, :prompt]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the column of the next token; all keys and values."""
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values


class RecordedSteps(Cache):
    """`CausalLMPolicy.append` for N rows of at most ``columns`` slots, on one memory for all rollouts of that shape.

    It is of the policy's weights where they are now: not to be kept where they move, or are replaced.

    Args:
        policy: a `CausalLMPolicy`.
        state: behind the prompts of a rollout. Its cache is used up: first steps are compared with plain ones.
        columns: of every text, the prompt's slots among them.
        steps: of the rollout, at most; its texts fit into ``columns``.

    Raises:
        ValueError: the model takes no positions, a layer of its cache is not plain attention, or steps of one shape
            give it other probabilities.
    """

    def __init__(self, policy: Any, state: DecodeState, columns: int, steps: int) -> None:
        kind = type(policy.lm).__name__
        if not policy.takes_positions or any(type(layer) is not GrowingLayer for layer in state.cache.layers):
            raise ValueError(
                f"rollout_steps='recorded' needs plain attention and positions, which {kind} does not have in all "
                f"layers; {REMEDY}"
            )
        rows, device = len(state.attention_mask), state.attention_mask.device
        self.at, self.token = (torch.zeros(size, dtype=torch.long, device=device) for size in (1, rows))
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.visible = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)
        self.fixed = [FixedLayer(layer, columns, self.at) for layer in state.cache.layers]
        super().__init__(layers=list(self.fixed))
        self._recording: Any = None  # torch.cuda.CUDAGraph
        self._output: tuple[torch.Tensor, torch.Tensor] | None = None  # where it leaves its results
        self._compare(policy, self.begin(state), state, min(steps, 2))

    def _compare(self, policy: Any, mine: DecodeState, plain: DecodeState, steps: int) -> None:
        """Some steps of either kind: what the first one's recording took for constant shows in the second."""
        for token in range(steps):
            tokens = torch.full_like(self.token, token)
            mine, plain = policy.append(mine, tokens), policy.append(plain, tokens)
            found, expected = (state.logits.softmax(-1) for state in (mine, plain))
            if bool(((found - expected).abs() > TOLERANCE[policy.compute_dtype]).any()):
                raise ValueError(
                    f"rollout_steps='recorded' gives {type(policy.lm).__name__} other probabilities than plain steps; "
                    f"{REMEDY}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without the recording, which is of this memory: a copy makes its own."""
        return vars(self) | {"_recording": None, "_output": None}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.token), self.visible.shape[-1]

    def begin(self, state: DecodeState) -> DecodeState:
        """Take over the prompts of a rollout; the state to go on with."""
        prompt = state.attention_mask.shape[1]
        self.at.fill_(prompt)
        self.position.copy_(state.attention_mask.sum(1, keepdim=True))
        self.visible.zero_()
        self.visible[:, 0, 0, :prompt] = state.attention_mask.bool()
        for mine, theirs in zip(self.fixed, state.cache.layers, strict=True):
            mine.begin(theirs, prompt)
        return state._replace(cache=self)

    def append(self, policy: Any, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a token (N,) to every row; ``policy`` is that of the constructor.

        Returns:
            Raw logits (N, 1, rows) and hidden states (N, 1, C), which the next call overwrites.

        Raises:
            ValueError: the step cannot be recorded.
        """
        self.token.copy_(token)
        if token.device.type != "cuda":
            return self._step(policy)
        if self._recording is None:
            self._record(policy)
        self._recording.replay()
        assert self._output is not None
        return self._output

    def _step(self, policy: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.visible.index_fill_(3, self.at, True)
        mask = additive_mask(self.visible, policy.lm.dtype)
        hidden = policy.lm.base_model(
            self.token[:, None], attention_mask=mask, position_ids=self.position, **policy.caching(self)
        ).last_hidden_state
        logits = policy.logits(hidden)
        self.at.add_(1)
        self.position.add_(1)
        return logits, hidden

    def _record(self, policy: Any) -> None:
        state = (self.at, self.position, self.visible)
        before = [tensor.clone() for tensor in state]

        def rewind() -> None:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)

        recording = torch.cuda.CUDAGraph()
        # A cast that autocast kept would not be part of the recording.
        uncached = torch.autocast("cuda", dtype=policy.compute_dtype, cache_enabled=False,
                                  enabled=torch.is_autocast_enabled("cuda"))  # fmt: skip
        with torch.cuda.device(self.token.device), uncached:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries allocate their workspaces
                    self._step(policy)
                    rewind()
            torch.cuda.current_stream().wait_stream(stream)
            try:
                with torch.cuda.graph(recording, stream=stream):
                    output = self._step(policy)
            except RuntimeError as error:
                raise ValueError(
                    f"a decoding step of {type(policy.lm).__name__} cannot be recorded ({error}); {REMEDY}"
                ) from error
        rewind()  # capturing ran nothing, but is not promised to
        self._recording, self._output = recording, output
        logger.info("recorded a decoding step of %d rows and %d columns", *self.shape)
