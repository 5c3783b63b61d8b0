"""Train the reward model: sentiment at every prefix, then a last attention row that says where the score came from.

Phase 1, ``classify``: the policy's backbone with a two-label head, cross-entropy at prefixes of every length, so that
16-token openings and whole reviews are both scored sensibly.

Phase 2, ``align_row``: a plain small classifier's last row says little about its score, and attention credit read from
it is noise. So the row of the pooled token (mean over heads) is matched to leave-one-out importance,

    target[t] = |score(text) - score(text without token t)| / sum,      loss = KL(target || row),

measured again on fresh texts in every step, on the very model that is being trained: targets measured once on the phase
1 model are soon those of another function (the two rank tokens with a correlation of .44 after such a training).
Cross-entropy and distillation of the phase 1 scores hold the scores in place. The phase also teaches what the
environment adds: a closing end-of-text token, which leaves the score alone and deserves no credit.

With `uniform` for the target, phase 2 makes the counterpart: a model with the same scores whose row says nothing.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from tokenmdp.files import CheckpointError, load_state, save_state

from .corpus import pad_rows
from .language_model import MuonWithAdamW, autocast, schedule

PREFIX_STRIDE = 8
REVIEWS_EVERY = 3  # phase 2: steps between two batches of reviews, on average


def from_policy(policy: GPT2LMHeadModel) -> GPT2ForSequenceClassification:
    """A classifier that starts from the policy's backbone."""
    config = type(policy.config).from_dict(policy.config.to_dict())
    config.num_labels = 2
    config.id2label, config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    config.architectures = ["GPT2ForSequenceClassification"]
    model = GPT2ForSequenceClassification(config)
    model.transformer.load_state_dict(policy.transformer.state_dict())
    return model


def prefix_logits(model, batch: torch.Tensor, bf16: bool = True) -> torch.Tensor:
    """The score head at every position of right-padded rows: (N, T) -> (N, T, 2)."""
    with autocast(batch.device, bf16):
        return model.score(model.base_model(input_ids=batch, use_cache=False).last_hidden_state).float()


def scores_and_row(model, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (N,) and the last layer's row of the last real token, mean over heads, (N, T); differentiable."""
    captured = []
    attention = model.transformer.h[-1].attn
    hook = attention.c_attn.register_forward_hook(lambda module, inputs, output: captured.append(output))
    try:
        logits = prefix_logits(model, batch)
    finally:
        hook.remove()
    rows, last = torch.arange(len(batch), device=batch.device), lengths - 1
    query, key, _ = captured[0].float().split(attention.embed_dim, dim=-1)
    heads, width = attention.num_heads, attention.head_dim
    query = query[rows, last].view(len(batch), heads, width)  # (N, heads, width): only the pooled row
    key = key.view(*batch.shape, heads, width)  # (N, T, heads, width)
    products = torch.einsum("nhd,nthd->nht", query, key) / width**0.5
    hidden = torch.arange(batch.shape[1], device=batch.device) > last[:, None]
    row = products.masked_fill(hidden[:, None], -torch.inf).softmax(-1).mean(1)  # (N, T)
    pooled = logits[rows, last]
    return pooled[:, 1] - pooled[:, 0], row


def prefix_loss(model, batch: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy at the last token and, with equal weight, averaged over every eighth prefix."""
    logits = prefix_logits(model, batch)
    last = logits[torch.arange(len(batch)), lengths - 1]
    prefixes = logits[:, PREFIX_STRIDE - 1 :: PREFIX_STRIDE]  # (N, T/8, 2)
    inside = torch.arange(prefixes.shape[1], device=batch.device) < (lengths // PREFIX_STRIDE)[:, None]
    spread = labels[:, None].expand_as(inside)[inside]
    return 0.5 * F.cross_entropy(last, labels) + 0.5 * F.cross_entropy(prefixes[inside], spread)


def windows(reviews: list[list[int]], width: int, rng: random.Random) -> list[list[int]]:
    """Two thirds of the reviews from their opening, the others from anywhere."""
    starts = [0 if rng.random() < 2 / 3 else rng.randrange(max(1, len(review) - width // 2)) for review in reviews]
    return [review[start : start + width] for review, start in zip(reviews, starts, strict=True)]


def review_batches(reviews: list[list[int]], labels: list[int], size: int, width: int, rng: random.Random, pad: int):
    """Endless (batch, lengths, labels) of windows; rows of similar length go together."""
    while True:
        rows = windows(reviews, width, rng)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]) + rng.random() * 16)
        starts = list(range(0, len(order) - size + 1, size))
        rng.shuffle(starts)
        for start in starts:
            chosen = order[start : start + size]
            batch = [rows[index] for index in chosen]
            yield pad_rows(batch, pad), torch.tensor(list(map(len, batch))), torch.tensor([labels[i] for i in chosen])


def train_steps(model, state_file: Path, steps: int, learning_rate: float, make_step, log, every: int = 50) -> None:
    """The loop both phases share; resumes from ``state_file``.

    ``make_step(first)`` returns ``step_loss()``, which gives the loss and figures to log; ``first`` is the step to
    resume from, and reseeds the batches so that a resumed run does not see its first ones again.
    """
    optimizer, first = MuonWithAdamW(model, learning_rate), 0
    if state_file.exists():
        state = load_state(state_file)
        if state.keys() != {"model", "optimizer", "step"}:
            raise CheckpointError(f"{state_file} is that of an earlier recipe; delete it, or pass another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        log(f"resumed at step {first}")
    step_loss = make_step(first)
    saved_at, sums, since = time.monotonic(), {}, time.monotonic()
    for step in range(first, steps):
        loss, figures = step_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.set_learning_rate(learning_rate * schedule(step / steps))
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {"loss": loss.item(), **figures}.items():
            sums[name] = sums.get(name, 0.0) + value / every
        if (step + 1) % every == 0:
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in sums.items())
            log(f"step {step + 1}/{steps}  {numbers}  {(time.monotonic() - since) / every:.2f} s/step")
            sums, since = {}, time.monotonic()
        if time.monotonic() - saved_at > 180 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(state_file, state)
            saved_at = time.monotonic()


def classify(model, reviews, labels, *, steps: int, size: int, width: int, learning_rate: float, seed: int,
             state_file: Path, device: torch.device, log) -> None:  # fmt: skip
    """Phase 1."""
    model.to(device).train()

    def make_step(first: int):
        batches = review_batches(reviews, labels, size, width, random.Random(seed + first), model.config.pad_token_id)

        def step_loss():
            batch, lengths, targets = (tensor.to(device) for tensor in next(batches))
            return prefix_loss(model, batch, lengths, targets), {}

        return step_loss

    train_steps(model, state_file, steps, learning_rate, make_step, log)


@torch.no_grad()
def leave_one_out(
    model, texts: list[list[int]], device: torch.device, slots: int = 32768, bf16: bool = True
) -> list[torch.Tensor]:
    """``|score(text) - score(text without token t)|`` for every t: one (len(text),) tensor per text."""
    importance, group, size = [], [], 0

    def flush() -> None:
        variants = [row for text in group for row in [text, *(text[:t] + text[t + 1 :] for t in range(len(text)))]]
        lengths = torch.tensor(list(map(len, variants)), device=device)
        batch = pad_rows(variants, model.config.pad_token_id).to(device)
        logits = prefix_logits(model, batch, bf16)[torch.arange(len(variants)), lengths - 1]
        scores, start = (logits[:, 1] - logits[:, 0]).cpu(), 0
        for text in group:
            whole, without = scores[start], scores[start + 1 : start + 1 + len(text)]
            importance.append((whole - without).abs())
            start += len(text) + 1
        group.clear()

    for text in texts:
        if group and (size + len(text)) * max(len(text), *map(len, group)) > slots:
            flush()
            size = 0
        group.append(text)
        size += len(text) + 1
    flush()
    return importance


def snippets(written: list[list[int]], reviews: list[list[int]], count: int, rng: random.Random) -> list[list[int]]:
    """Texts of 4 to 28 tokens, one in ten up to 48: half cut from what the policy wrote, half from reviews."""
    texts = []
    for _ in range(count):
        source = rng.choice(written if rng.random() < 0.5 else reviews)
        length = rng.randint(28, 48) if rng.random() < 0.1 else rng.randint(4, 28)
        start = 0 if rng.random() < 2 / 3 else rng.randrange(max(1, len(source) - length))
        texts.append(source[start : start + length])
    return [text for text in texts if len(text) >= 4]


def row_distance(row: torch.Tensor, importance: list[torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """``KL(target || row)`` with the normalised importance as target; 0 at a closing end-of-text token."""
    target = torch.zeros_like(row)
    for place, values in enumerate(importance):
        target[place, : len(values)] = values
    target = (target + 1e-4) * (torch.arange(row.shape[1], device=row.device) < lengths[:, None])
    target = target / target.sum(-1, keepdim=True)
    return F.kl_div(row.clamp(min=1e-9).log(), target, reduction="batchmean")


def uniform(model, texts: list[list[int]], device: torch.device, slots: int) -> list[torch.Tensor]:
    """The same importance for every token of a text, in place of `leave_one_out`."""
    return [torch.ones(len(text), device=device) for text in texts]


def align_row(model, teacher, reviews, labels, written: list[list[int]], *, target=leave_one_out, steps: int,
              size: int, width: int, learning_rate: float, row_coef: float, seed: int, state_file: Path,
              device: torch.device, log) -> None:  # fmt: skip
    """Phase 2. ``written`` are texts by the policy; ``target`` says what the row is matched to."""
    model.to(device).train()
    teacher.to(device).eval()
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    closed = [[*review, eos] for review in reviews]

    def make_step(first: int):
        rng = random.Random(seed + first)
        batches = review_batches(closed, labels, 16, width, rng, pad)

        def step_loss():
            texts = sorted(snippets(written, reviews, size, rng), key=len)  # similar lengths together: less padding
            importance = target(model, texts, device, slots=4096)
            with torch.no_grad():
                lengths = torch.tensor(list(map(len, texts)), device=device)
                wanted, _ = scores_and_row(teacher, pad_rows(texts, pad).to(device), lengths)
            texts = [[*text, eos] if rng.random() < 0.3 else text for text in texts]
            lengths = torch.tensor(list(map(len, texts)), device=device)
            score, row = scores_and_row(model, pad_rows(texts, pad).to(device), lengths)
            distance = row_distance(row, importance, lengths)
            distilled = F.smooth_l1_loss(score, wanted)
            loss, figures = row_coef * distance + distilled, {"row_kl": distance.item(), "distil": distilled.item()}
            if rng.random() < 1 / REVIEWS_EVERY:  # reviews cost three times as much as snippets and change less
                batch, lengths, targets = (tensor.to(device) for tensor in next(batches))
                loss = loss + prefix_loss(model, batch, lengths, targets)
            return loss, figures

        return step_loss

    train_steps(model, state_file, steps, learning_rate, make_step, log)
