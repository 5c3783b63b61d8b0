"""Seconds per update and tokens per second of PPO by precision, and of the loop that TRL 0.11 makes."""

from __future__ import annotations

import gc
from typing import Any

import torch
from speed_parts.shapes import Shape, make_agent, make_envs, make_policy
from speed_parts.timing import wait_for
from torch import nn

from gpu_parts.phase import WAYS, Phase


def ours(phase: Phase) -> None:
    """`PPO.learn(1)`, and its rollout, the reference and the reward model included, as milliseconds per token."""
    for shape in phase.shapes:
        for way in WAYS:
            phase.attempt(f"{shape.name} {' '.join(way)}", lambda s=shape, w=way: _ours(phase, s, *w))


def _ours(phase: Phase, shape: Shape, dtype: str, products: str, rollout_steps: str) -> dict[str, Any]:
    torch.set_float32_matmul_precision(products)
    if phase.device.type == "cuda":
        gc.collect()  # of the agent before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    agent = make_agent(shape, make_envs(shape), dtype, str(phase.device), rollout_steps=rollout_steps)
    seconds = phase.median_seconds(lambda: agent.learn(1))
    finding = {"seconds": seconds, "tokens_per_second": shape.tokens / seconds, "loss": agent.history[-1]["loss"]}
    finding["rollout_seconds"] = phase.median_seconds(agent.play)
    finding["ms_per_step"] = finding["rollout_seconds"] / shape.response_tokens * 1e3
    if phase.device.type == "cuda":
        finding["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return finding


def plain(phase: Phase) -> None:
    """A loop with TRL 0.11's steps, in float32 with either kind of product.

    `generate`, the logits of policy and reference over whole texts, minibatches, Adam; no adaptive coefficient, of
    the statistics only the loss, read once per minibatch. What it leaves out makes it faster than TRL.
    """
    for shape in phase.shapes:
        for products in ("highest", "high"):
            torch.set_float32_matmul_precision(products)
            phase.attempt(f"{shape.name} float32 {products}", lambda s=shape: _plain(phase, s))


def _plain(phase: Phase, shape: Shape) -> dict[str, float]:
    loop = PlainLoop(shape, phase.device)
    seconds = phase.median_seconds(loop.iteration, warmups=1)
    return {"seconds": seconds, "tokens_per_second": shape.tokens / seconds}


class PlainLoop:
    """One model, its frozen copy, a value head and Adam."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.lm, self.reference = make_policy(shape).to(device), make_policy(shape).to(device)
        self.lm.eval()
        self.reference.eval()
        self.head = nn.Linear(shape.width, 1).to(device)
        self.optimizer = torch.optim.Adam([*self.lm.parameters(), *self.head.parameters()], lr=3e-5)

    def read(self, lm: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and values (N, H) of the response tokens."""
        output = lm(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        rows = slice(self.shape.prompt_tokens - 1, -1)
        logprobs = output.logits[:, rows].float().log_softmax(-1)
        chosen = logprobs.gather(-1, ids[:, self.shape.prompt_tokens :, None])[..., 0]
        return chosen, self.head(output.hidden_states[-1][:, rows])[..., 0]

    def iteration(self) -> None:
        """Write, score, learn."""
        shape = self.shape
        prompts = torch.randint(1, shape.vocab_size, (shape.episodes, shape.prompt_tokens), device=self.device)
        length = {"min_new_tokens": shape.response_tokens, "max_new_tokens": shape.response_tokens}
        ids = self.lm.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0, pad_token_id=0,
            **length,
        )  # fmt: skip
        size = shape.episodes // shape.num_minibatches
        with torch.no_grad():
            old, values = map(torch.cat, zip(*(self.read(self.lm, rows) for rows in ids.split(size)), strict=True))
            base = torch.cat([self.read(self.reference, rows)[0] for rows in ids.split(size)])
        rewards = -0.2 * (old - base)
        rewards[:, -1] += torch.rand(shape.episodes, device=self.device)
        advantages = self.advantages(rewards, values)
        targets = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for _ in range(shape.update_epochs):
            for rows in torch.randperm(shape.episodes, device=self.device).split(size):
                new, value = self.read(self.lm, ids[rows])
                ratio = (new - old[rows]).exp()
                worse = torch.maximum(-advantages[rows] * ratio, -advantages[rows] * ratio.clamp(0.8, 1.2))
                loss = worse.mean() + 0.1 * (value - targets[rows]).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
                self.optimizer.step()
                loss.item()  # TRL's statistics
        wait_for(self.device)

    def advantages(self, rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """GAE with lambda .95, (N, H)."""
        last, found = torch.zeros_like(rewards[:, 0]), []
        for t in reversed(range(rewards.shape[1])):
            following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            last = rewards[:, t] + following - values[:, t] + 0.95 * last
            found.append(last)
        return torch.stack(found[::-1], 1)
