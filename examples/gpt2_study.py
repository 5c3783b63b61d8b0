"""The study with the paper's own models, GPT-2 124M, and what it costs: seconds per update, tokens per second, memory.

python examples/gpt2_study.py --random-weights                         # a trial of 3 updates without any download
python examples/gpt2_study.py                                          # 60 runs with the models of the hub
python examples/gpt2_study.py --policy DIR --reward-models DIR --prompts DIR --methods sparse attention --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tokenmdp import cli
from tokenmdp.files import atomic_directory
from tokenmdp.models.hub import quiet
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.study.directory import Study, load_study

PLAN = Path(__file__).parent / "abc_study" / "gpt2.json"
HEAD_WIDTH = 64  # of GPT-2 in every size
GPT2 = GPT2Config()  # its defaults are those of GPT-2 124M
TRIAL = ["--prompts", "imdb-tiny", "--methods", "sparse", "attention", "--seeds", "1", "--updates", "3"]
TRIAL += ["--quality-texts", "0"]  # untrained attention carries no information

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    epilog="All other options are those of `tokenmdp ablate`, such as --policy, --reward-models, --prompts, --methods, "
    "--seeds, --updates, --jobs and --device.",
    allow_abbrev=False,
)
parser.add_argument("--random-weights", action="store_true", help="a short trial with untrained models, made in --out")
parser.add_argument("--out", type=Path, help="default runs/gpt2, or runs/gpt2_trial with --random-weights")
parser.add_argument("--layers", type=int, default=GPT2.n_layer, help="of the untrained models")
parser.add_argument("--width", type=int, default=GPT2.n_embd, help=f"of the same; a multiple of {HEAD_WIDTH}")


def main(arguments: list[str] | None = None) -> int:
    args, options = parser.parse_known_args(arguments)
    if args.random_weights:
        out = args.out or Path("runs/gpt2_trial")
        study, models = out / "study", make_models(out / "models", args.layers, args.width)
        chosen = [*models, *TRIAL]  # later arguments on the command line win
    else:
        study, chosen = args.out or Path("runs/gpt2"), []
    status = cli.main(["ablate", "--plan", str(PLAN), *chosen, "--out", str(study), *options])
    if status in (0, 1):  # 1: some runs failed
        Console().print(costs_table(load_study(study)))
    return status


def make_models(place: Path, layers: int, width: int) -> list[str]:
    """Write a policy and a reward model with random weights, unless they exist; returns the options that name them."""
    if layers < 1 or width < HEAD_WIDTH or width % HEAD_WIDTH:
        parser.error(f"--layers {layers} --width {width}: at least one layer, and a multiple of {HEAD_WIDTH} as width")
    options = []
    kinds: dict[str, type[PreTrainedModel]] = {
        "policy": GPT2LMHeadModel,
        "reward_model": GPT2ForSequenceClassification,
    }
    for seed, (kind, model_class) in enumerate(kinds.items()):
        directory = place / f"{kind}-{layers}x{width}"
        if not directory.exists():
            save_random_model(model_class, directory, layers, width, seed)
        options += ["--reward-models" if kind == "reward_model" else "--policy", str(directory)]
    return options


def save_random_model(kind: type[PreTrainedModel], place: Path, layers: int, width: int, seed: int) -> None:
    """Write an untrained model and its tokenizer as `from_pretrained` reads them."""
    tokenizer = wide_tokenizer()
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // HEAD_WIDTH, pad_token_id=tokenizer.pad_token_id, **ends
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    with atomic_directory(place) as directory, quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def wide_tokenizer() -> PreTrainedTokenizerFast:
    """The bundled tokenizer, filled up to GPT-2's vocabulary with tokens that no text has.

    A tokenizer smaller than the model would do, but log-probabilities would be of its tokens alone: that is faster and
    takes less memory than the 50257 columns of the real one.
    """
    bundled = load_tokenizer("imdb-tiny")
    record = json.loads(bundled.backend_tokenizer.to_str())
    vocabulary = record["model"]["vocab"]
    vocabulary |= {f"unused{index}": index for index in range(len(vocabulary), GPT2.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(record)),
        eos_token=bundled.eos_token,
        pad_token=bundled.pad_token,
    )


def costs_table(study: Study) -> Table:
    """One row per method and setting: medians over runs, and the highest peak of any."""
    table = Table(box=None, padding=(0, 2, 0, 0), caption_justify="left")
    for heading in ("setting", "method", "runs", "s/update", "response tokens/s", "peak memory"):
        table.add_column(heading, justify="left" if heading in ("setting", "method") else "right")
    machines = set()
    for (setting, method), results in study.select("gpt2").items():
        kept = [result for result in results if result.costs]
        if not kept:  # results of earlier versions have none
            continue
        costs = {name: [result.costs[name] for result in kept] for name in kept[0].costs}
        table.add_row(
            setting,
            method,
            str(len(kept)),
            f"{statistics.median(costs['update_seconds']):.3f}",
            f"{statistics.median(costs['tokens_per_second']):.0f}",
            f"{max(costs['peak_bytes']) / 2**30:.2f} GiB",
        )
        machines |= {f"{result.versions['device']}, {result.versions['dtype']}" for result in kept}
    table.caption = f"on {' and '.join(sorted(machines))}"
    return table


if __name__ == "__main__":
    sys.exit(main())
