"""The policy's attention while it wrote: the providers behind ``Resources.policy_attention``.

Both give ``attention[n, q, k]``: how much the last layer, averaged over heads, looked at response token k after reading
token q, for the choice of token q + 1. `SampledAttention` keeps the rows that sampling with the cache computes anyway;
`ForwardAttention` computes them afterwards in one forward, for loops that do not sample through `CausalLMPolicy`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tokenmdp.models.attention_rows import capture_rows, install
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.types import Outcome


class SampledAttention:
    """The rows of N episodes in progress, one per decoding step; `tokenmdp.rollouts.collect` attaches it.

    Args:
        policy: the one that samples; its attention is switched to an implementation that can keep rows.
        prompt_columns: slots of the prompt in its cache.
        num_rows: N.
        max_new_tokens: H of the environment.
    """

    def __init__(self, policy: CausalLMPolicy, prompt_columns: int, num_rows: int, max_new_tokens: int) -> None:
        _prepare(policy)
        self._prompt_columns = prompt_columns
        self._attention = torch.zeros(num_rows, max_new_tokens, max_new_tokens, device=policy.lm.device)
        self._step = 0

    @contextlib.contextmanager
    def reading(self, rows: torch.Tensor) -> Iterator[None]:
        """Around the policy's `append` of the next response token to the episodes ``rows`` (n,): keep their rows."""
        with capture_rows(torch.zeros_like(rows)[:, None]) as capture:  # the only query of a step
            yield
        row = capture.rows()[:, 0]  # (n, columns of the layer's cache), the token just read last
        # A layer with a sliding window keeps the latest columns only: so count from the right.
        first = self._prompt_columns + self._step + 1 - row.shape[-1]  # the column of the text that row[:, 0] is about
        row = row[:, max(self._prompt_columns - first, 0) :].float()  # (n, at most step + 1)
        self._attention[rows, self._step, self._step + 1 - row.shape[-1] : self._step + 1] = row
        self._step += 1

    def __call__(self, outcome: Outcome) -> torch.Tensor:
        """The rows of the episodes that ended, (n, H, H) float32."""
        return self._attention[outcome.rows.to(self._attention.device)].cpu()


class ForwardAttention:
    """The rows of finished episodes from one more forward of ``policy`` over them.

    It takes n * heads * H * (P + H) float32 numbers for the rows of a layer and as many for their scores, beside what
    the forward itself takes: a loop with long responses passes fewer episodes at a time, or samples with
    `SampledAttention`.

    Args:
        policy: any `CausalLMPolicy`; its attention is switched to an implementation that can keep rows.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        _prepare(policy)
        self._policy = policy

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> torch.Tensor:
        """The rows of the episodes of ``outcome``, (n, H, H) float32."""
        episode, device = outcome.episode, self._policy.lm.device
        rows, horizon = episode.response_mask.shape
        index = torch.arange(episode.prompt_slots, episode.prompt_slots + horizon, device=device)
        with capture_rows(index.expand(rows, -1)) as capture:
            self._policy.prefill(episode.input_ids.to(device), episode.attention_mask.to(device))
        return capture.rows()[..., episode.prompt_slots :].cpu()  # (n, H, P+H) -> (n, H, H)


def _prepare(policy: CausalLMPolicy) -> None:
    if not install(policy.lm):
        raise ValueError(
            f"{type(policy.lm).__name__} does not let its attention be captured; use a credit method that does not "
            "need the policy's attention"
        )
