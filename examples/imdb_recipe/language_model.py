"""Pretrain a small causal language model, as the policy is, on every review that is not in the test split."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, PreTrainedModel

from tokenmdp.files import load_state, save_state

from .corpus import token_batches

BLOCKS = r"\.(h|layers)\.\d"  # their names in GPT-2 and Llama


def gpt2_config(tokenizer, width: int, layers: int, heads: int, **extra) -> GPT2Config:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return GPT2Config(
        vocab_size=len(tokenizer), n_positions=1024, n_embd=width, n_layer=layers, n_head=heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own curve in one fused call: a fifth faster on CPU
        bos_token_id=eos, eos_token_id=eos, pad_token_id=pad, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **extra,
    )  # fmt: skip


class Optimisation:
    """A model's optimizers, and the state to resume from: Muon for the blocks' matrices, AdamW for all the rest."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        self.model, self.learning_rate = model, learning_rate
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and re.search(BLOCKS, name)]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        ]

    def step(self, loss: torch.Tensor, done: float) -> None:
        """One step down ``loss`` when ``done`` of the budget is spent."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * schedule(done)
            optimizer.step()
            optimizer.zero_grad()

    def save(self, file: Path, **progress: int) -> None:
        """Write model, optimizers and how far the training is."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        save_state(file, {"model": self.model.state_dict(), "optimizers": optimizers, **progress})

    def restore(self, file: Path) -> dict[str, int]:
        """Read what `save` wrote; returns the progress, empty if there is no file."""
        if not file.exists():
            return {}
        state = load_state(file)
        self.model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        return state


def schedule(done: float) -> float:
    """Share of the peak learning rate when ``done`` of the budget is spent: warm up 2%, then cosine to 2%."""
    if done < 0.02:
        return done / 0.02 + 0.01
    return 0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.tensor((done - 0.02) / 0.98 * torch.pi))))


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def next_token_loss(model, batch: torch.Tensor, pad: int) -> torch.Tensor:
    """Mean nats per real token: position t predicts token t+1; padding is on the right, so causality hides it."""
    with autocast(batch.device):
        logits = model(input_ids=batch[:, :-1]).logits  # (N, T-1, V); slicing logits afterwards would copy them
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=pad).float()


def pretrain(model: PreTrainedModel, rows: list[list[int]], *, tokens: int, batch_tokens: int, learning_rate: float,
             seed: int, state_file: Path, device: torch.device, log) -> None:  # fmt: skip
    """Train on ``tokens`` tokens; saves every few minutes and resumes from the last save."""
    model.to(device).train()
    pad = model.config.pad_token_id
    optimisation, seen, epoch, skip = Optimisation(model, learning_rate), 0, 0, 0
    if state := optimisation.restore(state_file):
        seen, epoch, skip = state["seen"], state["epoch"], state["batches"]
        log(f"resumed at {seen / 1e6:.1f}M tokens")
    started, since, saved_at, losses = time.monotonic(), seen, time.monotonic(), []
    while seen < tokens:
        for number, batch in enumerate(token_batches(rows, batch_tokens, pad, random.Random(seed + epoch))):
            if number < skip:
                continue
            loss = next_token_loss(model, batch.to(device), pad)
            optimisation.step(loss, seen / tokens)
            losses.append(loss.item())
            seen += int((batch[:, 1:] != pad).sum())
            skip = number + 1
            if skip % 50 == 0:
                speed = (seen - since) / (time.monotonic() - started)
                mean = sum(losses) / len(losses)
                log(f"epoch {epoch} {seen / 1e6:6.2f}M tokens  loss {mean:.3f}  {speed:.0f} tokens/s")
                losses = []
            if time.monotonic() - saved_at > 300 or seen >= tokens:
                optimisation.save(state_file, seen=seen, epoch=epoch, batches=skip)
                saved_at = time.monotonic()
            if seen >= tokens:
                return
        epoch, skip = epoch + 1, 0
