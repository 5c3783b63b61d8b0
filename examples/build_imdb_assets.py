"""Build the bundled tokenizer, policy and reward model from the IMDb reviews.

    python examples/build_imdb_assets.py --data stanfordnlp/imdb            # or a directory of {split}-*.parquet
    python examples/build_imdb_assets.py --data DIR --evaluate              # print the quality of what is bundled

Every stage is skipped when its result lies in ``--work``; the long ones resume in the middle.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch

from imdb_recipe import corpus, language_model
from tokenmdp.checkpoints import atomic_directory


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def log(message: str) -> None:
        print(f"[{time.monotonic() - started:6.0f}s] {message}", flush=True)

    tokenizer, reviews = stage_tokenizer(arguments, log)
    stage_policy(arguments, tokenizer, reviews, device, log)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="hub name or local directory of the IMDb data set")
    parser.add_argument("--work", type=Path, default=Path("runs/imdb-assets"), help="where unfinished stages are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--policy-tokens", type=float, default=32e6)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


def stage_tokenizer(arguments, log):
    from transformers import AutoTokenizer

    held_out = set(corpus.read_split(arguments.data, "test")[0])  # a few test reviews also stand in the other splits
    texts = [text for split in ("train", "unsupervised") for text in corpus.read_split(arguments.data, split)[0]]
    texts = sorted(set(texts) - held_out)
    random.Random(arguments.seed).shuffle(texts)
    folder = arguments.work / "tokenizer"
    if not folder.exists():
        log(f"training the tokenizer on {len(texts)} reviews")
        with atomic_directory(folder) as target:
            corpus.train_tokenizer(texts, arguments.vocab_size).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, corpus.encode(tokenizer, texts)


def stage_policy(arguments, tokenizer, reviews, device, log):
    from transformers import GPT2LMHeadModel

    folder = arguments.work / "policy"
    if folder.exists():
        return
    rng = random.Random(arguments.seed)
    rows = corpus.language_model_rows(reviews, tokenizer.eos_token_id, 1024, rng)
    log(f"pretraining the policy: {sum(map(len, rows)) / 1e6:.1f}M tokens an epoch")
    config = language_model.gpt2_config(tokenizer, arguments.width, arguments.layers, arguments.heads)
    model = GPT2LMHeadModel(config)
    language_model.pretrain(
        model, rows, tokens=int(arguments.policy_tokens), batch_tokens=8192, learning_rate=arguments.learning_rate,
        seed=arguments.seed, state_file=arguments.work / "policy_state.safetensors", device=device, log=log,
    )  # fmt: skip
    with atomic_directory(folder) as target:
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main()
