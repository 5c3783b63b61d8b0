"""Models and comparisons there and back: what TRL trained, read here, and what was trained here, read by TRL.

python benchmarks/exchange_with_trl.py --out runs/exchange     (prints two tables; a minute or two on one core)

Needs TRL 1.16 beside this package, in an environment of its own: pip install -c constraints.txt -e . "trl==1.16.*"

For each of SFT, DPO and reward model, TRL's trainer loads a checkpoint that was trained here and is compared with our
reading of it, on the texts of our file as TRL tokenizes them and on the file's own token ids. It trains on these ids
for two steps and saves; what it saved is read here, compared again and given to our commands. The same from the bundled
policy. All in float32 and eval mode. A difference above 1e-5 ends the program.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.utils import logging
from trl import DPOConfig as TheirDPOConfig
from trl import DPOTrainer, RewardConfig, RewardTrainer, SFTTrainer
from trl import SFTConfig as TheirSFTConfig

from tokenmdp import cli
from tokenmdp.agents.dpo import DPO, DPOConfig
from tokenmdp.agents.reward_model import RewardModelConfig, RewardModelLearner
from tokenmdp.agents.sft import SFT, SFTConfig
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.models.names import resolve
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.preferences import (
    Annotator,
    Comparison,
    Demonstration,
    model_scores,
    pairs_of,
    read_preferences,
    write_records,
)
from tokenmdp.reward_models import load_reward_model
from tokenmdp.rollouts.groups import sample_groups
from tokenmdp.types import lay_out
from tokenmdp.wrappers import vector

POLICY, BETA, STEPS, BATCH = "imdb-tiny", 0.1, 2, 8
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # as TRL calls them
OURS = {"dtype": "float32", "device": "cpu", "batch_size": BATCH, "total_updates": STEPS}
SMALL = ["--device", "cpu", "--max-new-tokens", "4"]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, required=True, help="a new directory for data and models")
parser.add_argument("--pairs", type=int, default=32, help="comparisons to learn from")


class Side(NamedTuple):
    """One kind of model on both sides."""

    train: Callable[[list[Comparison]], Any]  # a learner of ours
    trainer: Callable[[str, Path, Dataset], Any]  # TRL's, with a start, its directory and comparisons
    row: Callable[[Comparison], dict[str, list[int]]]  # what TRL's trainer makes of a comparison, with our ids
    compare: Callable[[str, Any], dict[str, float]]  # a directory read here and TRL's trainer: largest differences
    commands: Callable[[str], list[list[str]]]  # of ours, that read a directory


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    args.out.mkdir(parents=True)
    file = args.out / "pairs.jsonl"
    write_records(file, comparisons(args.pairs))
    table, pairs = texts_of(file), pairs_of(read_preferences(file, load_tokenizer(POLICY)))
    print("| responses of our file | same token ids |\n|---|---|")
    for words, (same, number) in same_ids(file, table, args.out).items():
        print(f"| {words} | {same} of {number} |", flush=True)
    print("\n| model | start | when | largest difference between the two sides |\n|---|---|---|---|")
    for name, side in SIDES.items():
        learner = side.train(pairs).learn(STEPS)
        learner.save(args.out / f"ours-{name}")
        starts = {"ours": str(args.out / f"ours-{name}"), "bundled": resolve("policy", POLICY)}
        for start, directory in starts.items():
            there = args.out / f"trl-{name}-from-{start}"
            trainer = side.trainer(directory, there, table)
            both_have_it = start == "ours" or name != "reward-model"  # whose head would be a new one on both sides
            if both_have_it:
                line(name, start, "loaded by TRL, its own reading of the texts", side.compare(directory, trainer))
            trainer.train_dataset = Dataset.from_list([side.row(pair) for pair in pairs])
            if both_have_it:
                line(name, start, "loaded by TRL, our token ids", side.compare(directory, trainer))
            before = {key: weight.clone() for key, weight in trainer.model.state_dict().items()}
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.save_model(str(there))
            changed = sum(not torch.equal(weight, before[key]) for key, weight in trainer.model.state_dict().items())
            words = f"loaded here after {STEPS} steps of TRL, which moved {changed} of {len(before)} tensors"
            line(name, start, words, side.compare(str(there), trainer))
            for number, command in enumerate(side.commands(str(there))):
                out = ["--out", str(args.out / f"command-{name}-{start}-{number}")] if command[0] != "score" else []
                if status := quietly(command + out):
                    raise SystemExit(f"tokenmdp {' '.join(command)} ended with {status}")


def line(name: str, start: str, when: str, found: dict[str, float]) -> None:
    numbers = ", ".join(f"{number:.1e} ({words})" for words, number in found.items())
    print(f"| {name} | {start} | {when} | {numbers} |", flush=True)
    if wrong := {words: number for words, number in found.items() if not number < 1e-5}:
        raise SystemExit(f"the two sides differ: {wrong}")


def quietly(command: list[str]) -> int:
    """The exit status of a command whose output nobody needs."""
    print(f"tokenmdp {' '.join(command)}", file=sys.stderr)
    kept = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        try:
            return cli.main(command)
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def comparisons(number: int) -> list[Comparison]:
    """Pairs of responses of the bundled policy, the one first that `imdb-gold` prefers; some end before the horizon."""
    plain = gym.make_vec("tokenmdp:TextGen-IMDb-v0", num_envs=2 * number, autoreset_mode="Disabled", max_new_tokens=16)
    envs = vector.SparseReward(plain)
    tokenizer = envs.unwrapped.task.tokenizer
    policy = CausalLMPolicy.for_task(POLICY, envs.unwrapped.task)
    groups = [group for group in sample_groups(envs, policy, 2, seed=1, batch=0) if group is not None]
    scores = model_scores(load_reward_model("imdb-gold"), tokenizer, 2 * number)
    return pairs_of(Annotator("imdb-gold", scores, temperature=math.inf).judge(groups, seed=1).records)


def texts_of(file: Path) -> Dataset:
    """The columns of our file that TRL reads."""
    return Dataset.from_json(str(file), cache_dir=str(file.with_name("cache"))).select_columns(
        ["prompt", "chosen", "rejected"]
    )


def same_ids(file: Path, table: Dataset, out: Path) -> dict[str, tuple[int, int]]:
    """Of how many responses TRL's trainers read the ids that our file has, and those that we read from its texts."""
    tokenizer = load_tokenizer(POLICY)
    end = tokenizer.eos_token_id
    sampled = pairs_of(read_preferences(file, tokenizer))
    table.to_json(out / "texts.jsonl")
    read = pairs_of(read_preferences(out / "texts.jsonl", tokenizer))
    dpo = dpo_trainer(resolve("policy", POLICY), out / "ids-dpo", table).train_dataset
    reward = reward_trainer(resolve("policy", POLICY), out / "ids-reward", table).train_dataset
    names = IDS[1:]

    def ended(ids: tuple[int, ...]) -> list[int]:
        return [*ids] if ids[-1] == end else [*ids, end]

    found = {
        "sampled ids, an end-of-text token behind each, and TRL's DPO trainer": [
            ([*pair.prompt_ids], ended(getattr(pair, name))) == (row["prompt_ids"], row[name])
            for pair, row in zip(sampled, dpo, strict=True) for name in names
        ],
        "ids that we read from the texts alone, and TRL's DPO trainer": [
            ([*pair.prompt_ids], [*getattr(pair, name)]) == (row["prompt_ids"], row[name])
            for pair, row in zip(read, dpo, strict=True) for name in names
        ],
        "the same, and TRL's reward trainer": [
            [*pair.prompt_ids, *getattr(pair, name)] == row[name]
            for pair, row in zip(read, reward, strict=True) for name in names
        ],
    }  # fmt: skip
    return {words: (sum(equal), len(equal)) for words, equal in found.items()}


def sft_row(pair: Comparison) -> dict[str, list[int]]:
    prompt, chosen = [*pair.prompt_ids], [*pair.chosen_ids]
    return {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}


def dpo_row(pair: Comparison) -> dict[str, list[int]]:
    return {name: [*getattr(pair, name)] for name in IDS}


def reward_row(pair: Comparison) -> dict[str, list[int]]:
    return {name: [*pair.prompt_ids, *getattr(pair, name)] for name in IDS[1:]}  # whole texts


def options(kind: Any, directory: Path, **own: Any) -> Any:
    return kind(
        str(directory), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-4, use_cpu=True,
        bf16=False, save_strategy="no", report_to="none", disable_tqdm=True, seed=1, **own,
    )  # fmt: skip


def sft_trainer(start: str, directory: Path, table: Dataset) -> SFTTrainer:
    demonstrations = table.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    return SFTTrainer(start, args=options(TheirSFTConfig, directory), train_dataset=demonstrations)


def dpo_trainer(start: str, directory: Path, table: Dataset) -> DPOTrainer:
    reference = load_causal_lm(POLICY)
    return DPOTrainer(start, reference, args=options(TheirDPOConfig, directory, beta=BETA), train_dataset=table)


def reward_trainer(start: str, directory: Path, table: Dataset) -> RewardTrainer:
    return RewardTrainer(start, args=options(RewardConfig, directory), train_dataset=table)


def batch_of(trainer: Any) -> tuple[list[dict[str, Any]], Any, Any]:
    """The first rows, the batch that TRL makes of them, and the model in eval mode."""
    rows = [trainer.train_dataset[place] for place in range(BATCH)]
    return rows, trainer.data_collator(rows), trainer.model.eval()


def compare_sft(directory: str, trainer: Any) -> dict[str, float]:
    rows, batch, model = batch_of(trainer)
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch))
    texts = []
    for row in rows:
        start = next(place for place, label in enumerate(row["labels"]) if label != -100)
        texts.append(Demonstration(prompt_ids=row["input_ids"][:start], response_ids=row["input_ids"][start:]))
    learner = SFT(directory, texts, SFTConfig(**OURS))
    ours = learner.losses(everything(learner), learner.lay_out(learner.examples))["loss"]
    ids = torch.tensor([[*texts[0].prompt_ids, *texts[0].response_ids]])
    with torch.no_grad():
        logprobs = [lm(ids).logits.log_softmax(-1)[0, :-1] for lm in (learner.policy.lm, model)]  # (T-1, V)
    difference = (logprobs[0] - logprobs[1]).gather(-1, ids[0, 1:, None])
    return {
        "log-probability of a token": difference.abs().max().item(),
        "loss": abs(ours.item() - theirs.item()),
    }


def compare_dpo(directory: str, trainer: Any) -> dict[str, float]:
    rows, batch, model = batch_of(trainer)
    records = [
        Comparison(prompt="", chosen="", rejected="", **{name: tuple(row[name]) for name in IDS}) for row in rows
    ]
    with torch.no_grad():
        theirs = trainer._compute_loss(model, dict(batch), False)
        logprobs = torch.stack(trainer.compute_ref_log_probs(model, dict(batch)), dim=1)  # (n, 2)
    learner = DPO(directory, records, DPOConfig(**OURS, dpo_beta=BETA), reference=POLICY)
    episodes = learner.lay_out(learner.examples)
    with torch.no_grad():
        ours = learner.losses(everything(learner), episodes)["loss"]
        own = learner.logprobs(learner.policy, episodes).sum(-1).view(-1, 2)
    per_token = (own - logprobs).abs() / episodes.response_mask.sum(-1).view(-1, 2)
    return {"log-probability per token": float(per_token.max()), "loss": abs(ours.item() - theirs.item())}


def compare_reward_model(directory: str, trainer: Any) -> dict[str, float]:
    rows, batch, model = batch_of(trainer)
    with torch.no_grad():
        theirs, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    texts = [row[name] for name in IDS[1:] for row in rows]
    reader = load_reward_model(directory)
    reading = getattr(reader.model.config, "tokenmdp", None) or {"shift": 0.0, "scale": 1.0}
    score = reader(lay_out([ids[:1] for ids in texts], [ids[1:] for ids in texts])).score
    records = [
        Comparison(
            prompt="", chosen="", rejected="", prompt_ids=(row["chosen_ids"][0],),
            chosen_ids=tuple(row["chosen_ids"][1:]), rejected_ids=tuple(row["rejected_ids"][1:]),
        )
        for row in rows
    ]  # fmt: skip
    learner = RewardModelLearner(directory, records, RewardModelConfig(**OURS))
    ours = learner.losses(everything(learner), learner.lay_out(learner.examples))["loss"]
    logits = score / reading["scale"] + reading["shift"]
    difference = (logits - outputs.logits[:, 0]).abs().max()
    return {"logits": float(difference), "loss": abs(ours.item() - theirs.item())}


def everything(learner: Any) -> Any:
    return torch.arange(len(learner.examples)).numpy()


def demonstrations_of(pairs: list[Comparison]) -> list[Demonstration]:
    return [Demonstration(prompt_ids=pair.prompt_ids, response_ids=pair.chosen_ids) for pair in pairs]


def policy_commands(directory: str) -> list[list[str]]:
    run = ["--policy", directory, *SMALL]
    return [
        ["train", *run, "--updates", "1", "--num-envs", "8", "--eval-samples", "4"],
        ["quality", *run, "--num", "4", "--methods", "sparse", "abc-d"],
    ]


def reward_model_commands(directory: str) -> list[list[str]]:
    run = ["--reward-model", directory, *SMALL]
    return [
        ["train", *run, "--updates", "1", "--num-envs", "8", "--eval-samples", "4"],
        ["quality", *run, "--num", "4", "--methods", "sparse", "attention"],
        ["score", " a wonderful film.", "--prompt", "This is", *run[:4]],
    ]


SIDES = {
    "sft": Side(
        lambda pairs: SFT(POLICY, demonstrations_of(pairs), SFTConfig(**OURS)),
        sft_trainer, sft_row, compare_sft, policy_commands,
    ),
    "dpo": Side(
        lambda pairs: DPO(POLICY, pairs, DPOConfig(**OURS, dpo_beta=BETA)),
        dpo_trainer, dpo_row, compare_dpo, policy_commands,
    ),
    "reward-model": Side(
        lambda pairs: RewardModelLearner(POLICY, pairs, RewardModelConfig(**OURS)),
        reward_trainer, reward_row, compare_reward_model, reward_model_commands,
    ),
}  # fmt: skip

if __name__ == "__main__":
    main()
