"""The reviews: reading, cleaning, tokenizing, and batches of about equal cost."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"  # two ids: with pad == eos a review ending in eos would be pooled one too early
BREAKS = re.compile(r"\s*(?:<br\s*/?>\s*)+")


def clean(text: str) -> str:
    r"""Turn each run of ``<br />`` into one newline.

    >>> clean("Good.<br /><br />Bad.")
    'Good.\nBad.'
    """
    return BREAKS.sub("\n", text).strip()


@functools.cache
def read_split(data: str, split: str) -> tuple[list[str], list[int]]:
    """Texts and labels of one split from a hub name or a local directory of ``{split}-*.parquet`` files."""
    from datasets import load_dataset

    if Path(data).is_dir():
        files = sorted(str(file) for file in Path(data).rglob(f"{split}-*.parquet"))
        if not files:
            raise FileNotFoundError(f"{data} holds no {split}-*.parquet; point --data at the IMDb data set's directory")
        dataset = load_dataset("parquet", data_files={split: files}, split=split)
    else:
        dataset = load_dataset(data, split=split)
    return [clean(text) for text in dataset["text"]], list(dataset["label"])


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 has it: every string round-trips, nothing is added on encode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False,
        model_max_length=1024, padding_side="right",
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def language_model_rows(reviews: list[list[int]], eos: int, positions: int, rng: random.Random) -> list[list[int]]:
    """One row per review, ending in eos; longer ones continue in further rows.

    Three rows in ten start with eos, so that the model can open a review from nothing; the others start with the
    review's own first token, as every prompt of the environment does.
    """
    rows = []
    for review in reviews:
        tokens = ([eos] if rng.random() < 0.3 else []) + review + [eos]
        rows += [tokens[start : start + positions] for start in range(0, len(tokens), positions)]
    return [row for row in rows if len(row) > 8]


def token_batches(lengths: Sequence[int], tokens: int, rng: random.Random) -> list[list[int]]:
    """Batches of rows, by number, of at most ``tokens`` slots each; similar lengths go together, order is random."""
    order, found = list(range(len(lengths))), []
    rng.shuffle(order)
    for start in range(0, len(order), 4096):  # sort within pools, or the batches would repeat every epoch
        pool = sorted(order[start : start + 4096], key=lambda row: lengths[row])
        batches, current = [], []
        for row in pool:
            if current and lengths[row] * (len(current) + 1) > tokens:
                batches.append(current)
                current = []
            current.append(row)
        batches.append(current)
        rng.shuffle(batches)
        found += batches
    return found


def pad_rows(rows: list[list[int]], pad: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # (N, T)
