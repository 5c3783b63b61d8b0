"""Measure the bundle: bits per byte, accuracy, and whether the attention row points where the score came from."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from .corpus import pad_rows
from .language_model import autocast
from .reward_model import leave_one_out, prefix_logits, scores_and_row


def by_length(rows: list[list[int]], slots: int) -> list[list[int]]:
    """Indices in groups of at most ``slots`` padded tokens, similar lengths together."""
    groups, current = [], []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if current and len(rows[index]) * (len(current) + 1) > slots:
            groups.append(current)
            current = []
        current.append(index)
    return [*groups, current]


@torch.no_grad()
def bits_per_byte(model, tokenizer, texts: list[str], device: torch.device, slots: int = 16384) -> float:
    """``sum of -log2 p(token | text so far) / bytes`` over whole reviews.

    A review is preceded by one end-of-text token, so that its first token is predicted too, and its own end-of-text
    token counts in the sum but adds no byte. Reviews beyond 1,022 tokens continue in another row that sees one token of
    overlap.
    """
    model.to(device).eval()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows, positions = [], model.config.n_positions
    for review in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        tokens = [eos, *review, eos]
        rows += [tokens[start : start + positions] for start in range(0, len(tokens) - 1, positions - 1)]
    nats = 0.0
    for group in by_length(rows, slots):
        batch = pad_rows([rows[index] for index in group], pad).to(device)
        with autocast(device):
            logits = model(input_ids=batch).logits[:, :-1]  # (N, T-1, V)
        targets = batch[:, 1:].flatten()
        nats += F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=pad, reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.no_grad()
def scores(model, rows: list[list[int]], device: torch.device, bf16: bool = True) -> np.ndarray:
    """``logit[1] - logit[0]`` of each row."""
    model.to(device).eval()
    found = np.zeros(len(rows))
    for group in by_length(rows, 32768):
        batch = pad_rows([rows[index] for index in group], model.config.pad_token_id).to(device)
        lengths = torch.tensor([len(rows[index]) for index in group], device=device)
        logits = prefix_logits(model, batch, bf16)[torch.arange(len(group)), lengths - 1]
        found[group] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
    return found


def accuracy(model, rows: list[list[int]], labels: list[int], device: torch.device) -> float:
    """Share of rows whose score has the sign of the label."""
    return float(((scores(model, rows, device) > 0) == np.array(labels)).mean())


def agreement(model, other, texts: list[list[int]], device: torch.device) -> dict:
    """Correlations of two models' scores over texts, with a 95% interval of Pearson's, and the spread of both."""
    first, second = (scores(each, texts, device, bf16=False) for each in (model, other))
    pearson = stats.pearsonr(first, second)
    return {
        "pearson": float(pearson.statistic),
        "pearson_95": [float(end) for end in pearson.confidence_interval()],
        "spearman": float(stats.spearmanr(first, second).statistic),
        "score_std": [float(first.std()), float(second.std())],
    }


@torch.no_grad()
def sample_responses(policy, prompts: list[list[int]], tokens: int, device: torch.device, seed: int,
                     temperature: float = 1.0) -> list[list[int]]:  # fmt: skip
    """One response of exactly ``tokens`` tokens for each prompt, sampled without end-of-text."""
    policy.to(device).eval()
    torch.manual_seed(seed)
    eos, pad = policy.config.eos_token_id, policy.config.pad_token_id
    responses: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        chosen = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(chosen), 256):
            part = chosen[start : start + 256]
            batch = torch.tensor([prompts[index] for index in part], device=device)
            text = policy.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=True, top_k=0, temperature=temperature,
                max_new_tokens=tokens, suppress_tokens=[eos, pad], pad_token_id=pad,
            )  # fmt: skip
            for index, row in zip(part, text[:, length:].tolist(), strict=True):
                responses[index] = row
    return responses


@torch.no_grad()
def row_faithfulness(model, prompts: list[list[int]], responses: list[list[int]], device: torch.device) -> dict:
    """Spearman correlation of the row with |leave-one-out| over each response; mean and 95% interval over texts.

    Also the row's entropy over the response as a share of its maximum, and the share of the row that lies on it.
    """
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    importance = leave_one_out(model, texts, device, bf16=False)  # bf16 noise would shuffle the unimportant tokens
    correlations, entropies, masses = [], [], []
    for start in range(0, len(texts), 64):
        part = range(start, min(start + 64, len(texts)))
        lengths = torch.tensor([len(texts[index]) for index in part], device=device)
        batch = pad_rows([texts[index] for index in part], model.config.pad_token_id).to(device)
        _, rows = scores_and_row(model, batch, lengths)
        for index, row in zip(part, rows.cpu(), strict=True):
            inside = slice(len(prompts[index]), len(texts[index]))
            weights = row[inside].double().numpy()
            correlations.append(float(stats.spearmanr(weights, importance[index][inside].numpy()).statistic))
            share = weights / weights.sum()
            entropies.append(-(share * np.log(share + 1e-12)).sum() / math.log(len(share)))
            masses.append(weights.sum())
    half = 1.96 * float(np.std(correlations, ddof=1)) / len(correlations) ** 0.5
    mean = float(np.mean(correlations))
    return {
        "row_spearman": mean,
        "row_spearman_95": [mean - half, mean + half],
        "row_entropy_share": float(np.mean(entropies)),
        "row_response_mass": float(np.mean(masses)),
    }
