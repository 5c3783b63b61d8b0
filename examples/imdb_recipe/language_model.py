"""Pretrain a small causal language model, as the policy is, on every review that is not in the test split."""

from __future__ import annotations

import functools
import math
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, PreTrainedModel

from tokenmdp.agents.sft import SFT, SFTConfig
from tokenmdp.files import CheckpointError
from tokenmdp.preferences import Demonstration
from tokenmdp.training.checkpoint import Format

from .corpus import token_batches

BLOCKS = r"\.(h|layers)\.\d"  # their names in GPT-2 and Llama


def gpt2_config(tokenizer, width: int, layers: int, heads: int, **extra) -> GPT2Config:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return GPT2Config(
        vocab_size=len(tokenizer), n_positions=1024, n_embd=width, n_layer=layers, n_head=heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own curve in one fused call: a fifth faster on CPU
        bos_token_id=eos, eos_token_id=eos, pad_token_id=pad, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **extra,
    )  # fmt: skip


class MuonWithAdamW:
    """Two optimizers as one: Muon for the blocks' matrices, AdamW for all the rest."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and re.search(BLOCKS, name)]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.parts = {
            "muon": torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """That of Muon and that of AdamW."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def set_learning_rate(self, rate: float) -> None:
        """Of both."""
        for group in self.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        """A step of both."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state of both by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def schedule(done: float) -> float:
    """Share of the peak learning rate when ``done`` of the budget is spent: warm up 2%, then cosine to 2%."""
    if done < 0.02:
        return done / 0.02 + 0.01
    return 0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.tensor((done - 0.02) / 0.98 * torch.pi))))


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class PretrainingConfig(SFTConfig):
    """The numbers of one pretraining; ``total_updates`` is given."""

    unused = ("batch_size", "epochs", "anneal_lr", "adam_eps", "lora_rank")

    batch_tokens: int = 8192  # slots per update
    learning_rate: float = 3e-3


class Pretraining(SFT):
    """SFT on whole texts from random weights: batches of equal cost, and the optimizer and schedule that this takes."""

    config_class = PretrainingConfig
    format = Format("pretraining", 1)
    norms = ("grad_norm", "others_grad_norm")
    config: PretrainingConfig
    _pass: tuple[int, int, list[list[int]]] | None = None  # the current one: its number, first update and batches

    def make_optimizer(self) -> Any:
        """Of the language model alone, without the value head."""
        return MuonWithAdamW(self.policy.lm, self.config.learning_rate)

    @functools.cached_property
    def updates_per_epoch(self) -> int:
        """Of the first one; others differ by a few."""
        return len(self.batches(0))

    def batches(self, epoch: int) -> list[list[int]]:
        """The rows of every update of a pass over the texts."""
        rng = random.Random(self.config.seed + epoch)
        return token_batches(self.lengths.sum(1).tolist(), self.config.batch_tokens, rng)

    def _batch(self, update: int) -> torch.Tensor:
        if self._pass is None or update < self._pass[1]:
            self._pass = 0, 0, self.batches(0)
        epoch, first, batches = self._pass
        while update >= first + len(batches):
            epoch, first, batches = epoch + 1, first + len(batches), self.batches(epoch + 1)
        self._pass = epoch, first, batches
        return torch.tensor(batches[update - first])

    def _schedule(self) -> float:
        rate = self.config.learning_rate * schedule(self.num_updates_done / self.config.total_updates)
        self.optimizer.set_learning_rate(rate)
        return rate


def pretrain(model: PreTrainedModel, tokenizer, rows: list[list[int]], *, tokens: int, batch_tokens: int,
             learning_rate: float, seed: int, checkpoint: Path, device: torch.device, log) -> None:  # fmt: skip
    """Train for about ``tokens`` tokens and leave ``checkpoint``; saves every few minutes and resumes from there.

    Raises:
        CheckpointError: the checkpoint was begun with other numbers or texts.
    """
    texts = [Demonstration(prompt_ids=tuple(row[:1]), response_ids=tuple(row[1:])) for row in rows]
    batches = len(token_batches(list(map(len, rows)), batch_tokens, random.Random(seed)))
    config = PretrainingConfig(
        seed=seed, device=str(device), learning_rate=learning_rate, batch_tokens=batch_tokens,
        total_updates=math.ceil(tokens / sum(len(row) - 1 for row in rows) * batches),
    )  # fmt: skip
    if checkpoint.exists():
        learner = Pretraining.load(checkpoint, texts, device=str(device))
        begun, asked = asdict(learner.config), asdict(config)
        if changes := [f"{key} {begun[key]}, asked {asked[key]}" for key in asked if begun[key] != asked[key]]:
            raise CheckpointError(
                f"{checkpoint} was begun with {'; '.join(changes)}; pass the former numbers or another --work, or "
                "delete it"
            )
        log(f"resumed after update {learner.num_updates_done}")
    else:
        learner = Pretraining(model, texts, config, tokenizer=tokenizer)
    saved_at = time.monotonic()

    def after_update(metrics: dict[str, float]) -> None:
        nonlocal saved_at
        if metrics["update"] % 50 == 0:
            recent = [one["loss"] for one in learner.history[-50:]]
            speed, loss = metrics["tokens_per_second"], sum(recent) / len(recent)
            log(f"epoch {metrics['epoch']:.2f}  loss {loss:.3f}  {speed:.0f} tokens/s")
        if time.monotonic() - saved_at > 300:
            learner.save(checkpoint)
            saved_at = time.monotonic()

    learner.learn(learner.config.total_updates - learner.num_updates_done, callback=after_update)
    learner.save(checkpoint)
