"""The gain from each change to the agent: an iteration with the change undone against one as it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import DynamicCache
from transformers.activations import NewGELUActivation

from speed_parts.report import Finding, dtype_name
from speed_parts.shapes import Shape, make_agent, make_envs
from speed_parts.timing import Numbers, alternate, column, now, ratio_interval
from tokenmdp.agents.ppo import PPO
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.token_distribution import DecodeState
from tokenmdp.rollouts.decoding import Step, decode

Undo = Callable[[PPO], contextlib.AbstractContextManager[object]]


def gumbel_act(
    policy: CausalLMPolicy, state: DecodeState, uniform: torch.Tensor | None = None, deterministic: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sampling with a random number for each token of the vocabulary."""
    noise = torch.empty_like(state.logits).exponential_().clamp_(min=1e-20)
    token = (state.logits - noise.log()).argmax(-1, keepdim=True)
    return token.squeeze(-1), state.logits.log_softmax(-1).gather(-1, token).squeeze(-1), state.value


def plain_scores(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies step by step."""
    every_logprob = logits.float().log_softmax(-1)
    entropy = -(every_logprob.exp() * every_logprob).sum(-1)
    return every_logprob.gather(-1, tokens[..., None]).squeeze(-1), entropy


def every_row_to_the_end(*arguments: Any) -> Iterator[Step]:
    """Decoding that never leaves a row out."""
    return decode(*arguments[:-1], share_ended=math.inf)


@contextlib.contextmanager
def plain_activations(agent: PPO) -> Iterator[None]:
    """GPT-2's activation as transformers writes it."""
    fused = [
        (module, name)
        for model in (agent.policy, agent.reference)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.GELU
    ]
    try:
        for module, name in fused:
            setattr(module, name, NewGELUActivation())
        yield
    finally:
        for module, name in fused:
            setattr(module, name, nn.GELU(approximate="tanh"))


@contextlib.contextmanager
def sdpa_alone(agent: PPO) -> Iterator[None]:
    """PyTorch's fused kernel on bfloat16 throughout, and a cache of bfloat16."""
    with (
        patch("tokenmdp.models.kernels.cpu_attention.attends", lambda *_: False),
        patch("tokenmdp.models.kv_cache.IMPLEMENTATION", None),
    ):
        yield


CHANGES: dict[str, Undo] = {
    "float32 products by oneDNN": lambda agent: patch("tokenmdp.models.kernels.onednn._takes", lambda *_: False),
    "one random number per token": lambda agent: patch.object(CausalLMPolicy, "act", gumbel_act),
    "token scores in one pass": lambda agent: patch("tokenmdp.models.policy.token_scores", plain_scores),
    "activation in one kernel": plain_activations,
    "bfloat16 attention on the CPU": sdpa_alone,
    "weights packed for decoding": lambda agent: patch(
        "tokenmdp.models.kernels.packed_weights.can_pack", lambda *_: False
    ),
    "keys and values in place": lambda agent: patch(
        "tokenmdp.models.policy.make_cache", lambda config: DynamicCache(config=config)
    ),
}
# These do something only where responses have different lengths.
CHANGES_OF_LENGTHS: dict[str, Undo] = {
    "ended rows are left out": lambda agent: patch("tokenmdp.rollouts.collecting.decode", every_row_to_the_end),
    "groups of like length": lambda agent: patch("tokenmdp.agents.base.FORWARD_SLOTS", math.inf),
}
LONGEST = 128  # response tokens in that case; horizons are drawn evenly from 8 on


def measure(shape: Shape, device: torch.device, repetitions: int) -> list[Finding]:
    """``seconds without the change / seconds as it is`` of `PPO.learn(1)`, for each change alone."""
    usual = dtype_name("auto", device)
    findings = []
    for dtype in dict.fromkeys((usual, "float32")):
        alike = make_agent(shape, make_envs(shape), dtype, str(device))
        findings += _undone(shape.name, alike, CHANGES, dtype, device, repetitions)
    longest = shape.response_tokens if shape.name == "smoke" else LONGEST
    mixed = replace(shape, response_tokens=longest)
    unlike = make_agent(mixed, make_envs(mixed, shortest=min(8, longest)), usual, str(device))
    name = f"{shape.name}, 8 to {longest}"
    return findings + _undone(name, unlike, CHANGES_OF_LENGTHS, usual, device, repetitions)


def _undone(
    name: str, agent: PPO, changes: dict[str, Undo], dtype: str, device: torch.device, repetitions: int
) -> list[Finding]:
    def side(undo: Undo | None) -> Numbers:
        with contextlib.nullcontext() if undo is None else undo(agent):
            start = now(device)
            agent.learn(1)
            return {"seconds": (now(device) - start) / agent.history[-1]["response_tokens"]}

    sides = {"as it is": partial(side, None)} | {change: partial(side, undo) for change, undo in changes.items()}
    records = alternate(sides, repetitions)
    usual = column(records["as it is"], "seconds")
    return [
        Finding(
            "changes", name, f"without / with: {change}, {dtype}",
            ratio_interval(column(records[change], "seconds"), usual),
            f"{1e3 * column(records[change], 'seconds').mean():.3f} / {1e3 * usual.mean():.3f} ms a response token",
            measurements={"with": records["as it is"], "without": records[change]},
        )
        for change in changes
    ]  # fmt: skip
