"""Build the bundled tokenizer, policy, reward models and prompts from the IMDb reviews.

    python examples/build_imdb_assets.py --data stanfordnlp/imdb     # or a directory of {split}-*.parquet files
    python examples/build_imdb_assets.py --data DIR --gold           # only the gold reward model, for this bundle
    python examples/build_imdb_assets.py --data DIR --uniform        # only the one with a uniform row, for this bundle
    python examples/build_imdb_assets.py --data DIR --evaluate       # print the quality of what is bundled

A stage whose result lies in ``--work`` is skipped and the long ones resume in the middle, so an interrupted build is
continued by the same command. Set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=8589934592 for full speed on CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from imdb_recipe import corpus, gold, language_model, quality, reward_model
from transformers import (
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tokenmdp.files import atomic_directory, write_text

BUNDLE = Path(__file__).resolve().parents[1] / "tokenmdp" / "assets" / "imdb"
STUDY_MODELS = Path(__file__).resolve().parent / "abc_study" / "models"
CARD = Path(__file__).resolve().parent / "imdb_recipe" / "card.md"
PARTS = ("policy", "reward_model", "reward_model_plain", "reward_model_uniform", "reward_model_gold")
NOT_IN_THE_WHEEL = {"reward_model_plain": "imdb-plain", "reward_model_uniform": "imdb-uniform"}


class Build:
    """The stages in order; each is a method that returns early when its result exists."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work = arguments, arguments.work
        self.device = torch.device(arguments.device)
        self.work.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()

    def log(self, message: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.0f}s] {message}", flush=True)

    def run(self) -> None:
        """Every stage, or only those of further reward models for the existing bundle."""
        if self.arguments.gold or self.arguments.uniform:
            self.further_models(self.arguments.bundle)
            return
        torch.manual_seed(self.arguments.seed)
        tokenizer, reviews = self.tokenizer()
        policy = self.policy(tokenizer, reviews)
        prompts = self.prompts(tokenizer, policy)
        self.classifier(tokenizer, policy)
        self.aligned_classifier(tokenizer, policy, prompts)
        self.uniform_classifier(tokenizer, policy, prompts, self.work / "reward_model")
        self.gold_classifier(tokenizer)
        self.bundle(*PARTS)
        shutil.copy(self.work / "prompts.json", self.arguments.bundle / "prompts.json")

    def further_models(self, bundled: Path) -> None:
        """The gold reward model, or the one with a uniform row, or both."""
        tokenizer = AutoTokenizer.from_pretrained(bundled / "policy")
        if self.arguments.gold:
            self.gold_classifier(tokenizer)
            self.bundle("reward_model_gold")
        if self.arguments.uniform:
            policy = GPT2LMHeadModel.from_pretrained(bundled / "policy", dtype=torch.float32)
            prompts = corpus.encode(tokenizer, json.loads((bundled / "prompts.json").read_text())["prompts"])
            self.uniform_classifier(tokenizer, policy, prompts, bundled / "reward_model")
            self.bundle("reward_model_uniform")

    def texts(self, seed: int) -> list[str]:
        """All training reviews in an order of this seed."""
        held_out = set(corpus.read_split(self.arguments.data, "test")[0])  # a few test reviews stand in other splits
        texts = [text for part in ("train", "unsupervised") for text in corpus.read_split(self.arguments.data, part)[0]]
        texts = sorted(set(texts) - held_out)
        random.Random(seed).shuffle(texts)
        return texts

    def tokenizer(self):
        """The tokenizer, and all training reviews encoded with it."""
        texts, folder = self.texts(self.arguments.seed), self.work / "tokenizer"
        if not folder.exists():
            self.log(f"training the tokenizer on {len(texts)} reviews")
            with atomic_directory(folder) as target:
                corpus.train_tokenizer(texts, self.arguments.vocab_size).save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer, corpus.encode(tokenizer, texts)

    def policy(self, tokenizer, reviews: list[list[int]]) -> GPT2LMHeadModel:
        """The pretrained language model."""
        folder, arguments = self.work / "policy", self.arguments
        if not folder.exists():
            rows = corpus.language_model_rows(reviews, tokenizer.eos_token_id, 1024, random.Random(arguments.seed))
            self.log(f"pretraining the policy: {sum(map(len, rows)) / 1e6:.1f}M tokens an epoch")
            config = language_model.gpt2_config(tokenizer, arguments.width, arguments.layers, arguments.heads)
            checkpoint = self.work / "policy_checkpoint"
            language_model.pretrain(
                GPT2LMHeadModel(config), tokenizer, rows, tokens=int(arguments.policy_tokens), batch_tokens=8192,
                learning_rate=arguments.policy_learning_rate, seed=arguments.seed, checkpoint=checkpoint,
                device=self.device, log=self.log,
            )  # fmt: skip
            self.save(GPT2LMHeadModel.from_pretrained(checkpoint), tokenizer, folder)
        return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)

    def prompts(self, tokenizer, policy) -> list[list[int]]:
        """Openings the policy writes from nothing: no corpus text is bundled."""
        file = self.work / "prompts.json"
        if not file.exists():
            self.log("sampling prompts")
            eos, rng = tokenizer.eos_token_id, random.Random(self.arguments.seed)
            openings = quality.sample_responses(
                policy, [[eos]] * self.arguments.openings, 8, self.device, self.arguments.seed, temperature=0.8
            )
            texts = {}
            for opening in openings:
                text = tokenizer.decode(opening[: rng.randint(2, 8)])
                if text.isprintable() and text.strip() and len(tokenizer.encode(text)) <= 8:
                    texts[text] = None
            write_text(file, json.dumps({"prompts": list(texts)[:4096]}, ensure_ascii=False, indent=0) + "\n")
        return corpus.encode(tokenizer, json.loads(file.read_text())["prompts"])

    def labelled(self, tokenizer):
        """Encoded training reviews with their labels, without those that also stand in the test split."""
        texts, labels = corpus.read_split(self.arguments.data, "train")
        held_out = set(corpus.read_split(self.arguments.data, "test")[0])
        pairs = [(text, label) for text, label in zip(texts, labels, strict=True) if text not in held_out]
        return corpus.encode(tokenizer, [text for text, _ in pairs]), [label for _, label in pairs]

    def classifier(self, tokenizer, policy) -> None:
        """Phase 1 of the reward model."""
        folder, arguments = self.work / "reward_model_plain", self.arguments
        if not folder.exists():
            self.log("training the reward model, phase 1: sentiment")
            reviews, labels = self.labelled(tokenizer)
            model = reward_model.from_policy(policy)
            reward_model.classify(
                model, reviews, labels, steps=arguments.classify_steps, size=32, width=256,
                learning_rate=arguments.classify_learning_rate, seed=arguments.seed,
                state_file=self.work / "classify_state.safetensors", device=self.device, log=self.log,
            )  # fmt: skip
            self.save(model, tokenizer, folder)

    def aligned_classifier(self, tokenizer, policy, prompts: list[list[int]]) -> None:
        """Phase 2 of the reward model."""
        self.row_trained(
            self.work / "reward_model", self.work / "reward_model_plain", tokenizer, policy, prompts,
            target=reward_model.leave_one_out, steps=self.arguments.align_steps,
        )  # fmt: skip

    def uniform_classifier(self, tokenizer, policy, prompts: list[list[int]], faithful: Path) -> None:
        """The scores of the model in ``faithful``, and a row that is the same for all tokens."""
        self.row_trained(
            self.work / "reward_model_uniform", faithful, tokenizer, policy, prompts,
            target=reward_model.uniform, steps=self.arguments.uniform_steps,
        )  # fmt: skip

    def row_trained(
        self, folder: Path, start: Path, tokenizer, policy, prompts: list[list[int]], *, target, steps: int
    ) -> None:
        """Phase 2 on the model in ``start``, whose scores are to stay: its row is matched to ``target``."""
        arguments = self.arguments
        if folder.exists():
            return
        file = self.work / "written.json"
        if not file.exists():
            self.log("sampling texts of the policy")
            rng = random.Random(arguments.seed + 1)
            chosen = [rng.choice(prompts) for _ in range(arguments.written)]
            texts = quality.sample_responses(policy, chosen, 40, self.device, arguments.seed + 1)
            write_text(file, json.dumps([prompt + text for prompt, text in zip(chosen, texts, strict=True)]))
        reviews, labels = self.labelled(tokenizer)
        self.log(f"training {folder.name}, phase 2: attention row")
        model, teacher = (GPT2ForSequenceClassification.from_pretrained(start, dtype=torch.float32) for _ in range(2))
        reward_model.align_row(
            model, teacher, reviews, labels, json.loads(file.read_text()), target=target, steps=steps, size=40,
            width=256, learning_rate=arguments.align_learning_rate, row_coef=arguments.row_coef, seed=arguments.seed,
            state_file=self.work / f"{folder.name}_state.safetensors", device=self.device, log=self.log,
        )  # fmt: skip
        self.save(model, tokenizer, folder)

    def gold_classifier(self, tokenizer) -> None:
        """The second reward model: a language model of its own, then phase 1 with another seed."""
        folder, arguments, seed = self.work / "reward_model_gold", self.arguments, self.arguments.gold_seed
        if folder.exists():
            return
        torch.manual_seed(seed)
        config = gold.llama_config(tokenizer, arguments.gold_width, arguments.gold_layers, arguments.gold_heads)
        if not (self.work / "gold_language_model").exists():
            checkpoint = self.work / "gold_language_model_checkpoint"
            texts = corpus.encode(tokenizer, self.texts(seed)[: arguments.gold_reviews])
            rows = corpus.language_model_rows(texts, tokenizer.eos_token_id, 256, random.Random(seed))
            self.log(f"pretraining the gold model: {sum(map(len, rows)) / 1e6:.1f}M tokens an epoch")
            language_model.pretrain(
                LlamaForCausalLM(config), tokenizer, rows, tokens=int(arguments.gold_tokens), batch_tokens=4096,
                learning_rate=arguments.policy_learning_rate, seed=seed, checkpoint=checkpoint, device=self.device,
                log=self.log,
            )  # fmt: skip
            self.save(LlamaForCausalLM.from_pretrained(checkpoint), tokenizer, self.work / "gold_language_model")
        model = LlamaForCausalLM.from_pretrained(self.work / "gold_language_model", dtype=torch.float32)
        self.log("training the gold model: sentiment")
        classifier = gold.from_language_model(model)
        reviews, labels = self.labelled(tokenizer)
        reward_model.classify(
            classifier, reviews, labels, steps=arguments.gold_steps, size=32, width=256,
            learning_rate=arguments.gold_learning_rate, seed=seed,
            state_file=self.work / "gold_classify_state.safetensors", device=self.device, log=self.log,
        )  # fmt: skip
        self.save(classifier, tokenizer, folder)

    def save(self, model, tokenizer, folder: Path) -> None:
        """Write model and tokenizer, bf16, as one complete directory."""
        with atomic_directory(folder) as target:
            model.to("cpu", torch.bfloat16).save_pretrained(target)
            tokenizer.padding_side = "left" if folder.name == "policy" else "right"  # a policy generates behind it
            tokenizer.save_pretrained(target)
            file = target / "tokenizer.json"  # on one line, with merges as "a b", it is less than half as large
            content = json.loads(file.read_text())
            content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # no token has a space
            write_text(file, json.dumps(content, ensure_ascii=False, separators=(",", ":")))

    def place(self, part: str) -> Path:
        """Where the package looks for a part."""
        name = NOT_IN_THE_WHEEL.get(part)
        return self.arguments.bundle / part if name is None else self.arguments.study_models / name

    def bundle(self, *parts: str) -> None:
        """Copy the finished parts to their places."""
        for part in parts:
            with atomic_directory(self.place(part)) as target:
                shutil.copytree(self.work / part, target, dirs_exist_ok=True)
            self.log(f"{part} is in {self.place(part)}")

    def evaluate(self) -> None:
        """Print the quality of the bundle on the test split and write it, with the model card, beside the weights."""
        bundle, device = self.arguments.bundle, self.device
        tokenizer = AutoTokenizer.from_pretrained(bundle / "policy")
        policy = GPT2LMHeadModel.from_pretrained(bundle / "policy", dtype=torch.float32)
        model = GPT2ForSequenceClassification.from_pretrained(bundle / "reward_model", dtype=torch.float32)
        plain = GPT2ForSequenceClassification.from_pretrained(self.place("reward_model_plain"), dtype=torch.float32)
        even = GPT2ForSequenceClassification.from_pretrained(self.place("reward_model_uniform"), dtype=torch.float32)
        judge = LlamaForSequenceClassification.from_pretrained(bundle / "reward_model_gold", dtype=torch.float32)
        texts, labels = corpus.read_split(self.arguments.data, "test")
        rng = random.Random(0)
        if self.arguments.limit < len(texts):
            chosen = rng.sample(range(len(texts)), self.arguments.limit)
            texts, labels = [texts[index] for index in chosen], [labels[index] for index in chosen]
        reviews = corpus.encode(tokenizer, texts)
        prompts = corpus.encode(tokenizer, json.loads((bundle / "prompts.json").read_text())["prompts"])
        prompts = rng.sample(prompts, min(500, len(prompts)))
        responses = quality.sample_responses(policy, prompts, 16, device, seed=0)
        for prompt, response in list(zip(prompts, responses, strict=True))[:8]:
            print(repr(tokenizer.decode(prompt) + "|" + tokenizer.decode(response)))
        sampled = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        openings, windows = ([review[:length] for review in reviews] for length in (24, 256))
        figures = {
            "test_reviews": len(texts),
            "policy_parameters": policy.num_parameters(),
            "reward_model_parameters": model.num_parameters(),
            "row_texts": len(prompts),
            **quality.row_faithfulness(model, prompts, responses, device),
            "accuracy_24": quality.accuracy(model, openings, labels, device),
            "accuracy_256": quality.accuracy(model, windows, labels, device),
            "bits_per_byte": quality.bits_per_byte(policy, tokenizer, texts, device),
            "plain": {
                "accuracy_24": quality.accuracy(plain, openings, labels, device),
                "accuracy_256": quality.accuracy(plain, windows, labels, device),
                **quality.row_faithfulness(plain, prompts, responses, device),
                **quality.agreement(model, plain, sampled, device),
            },
            "uniform": {
                "accuracy_24": quality.accuracy(even, openings, labels, device),
                "accuracy_256": quality.accuracy(even, windows, labels, device),
                **quality.row_faithfulness(even, prompts, responses, device),
                **quality.agreement(model, even, sampled, device),
            },
            "gold": {
                "parameters": judge.num_parameters(),
                "accuracy_24": quality.accuracy(judge, openings, labels, device),
                "accuracy_256": quality.accuracy(judge, windows, labels, device),
                **quality.agreement(model, judge, sampled, device),
            },
        }
        print(json.dumps(figures, indent=2))
        write_text(bundle / "quality.json", json.dumps(figures, indent=2) + "\n")
        write_text(bundle / "README.md", CARD.read_text().format(**figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="hub name or local directory of the IMDb data set")
    add("--gold", action="store_true", help="build the gold reward model only, with the bundle's tokenizer")
    add("--uniform", action="store_true", help="build the model with a uniform row only, from the bundle's own")
    add("--evaluate", action="store_true", help="print the quality of the bundle and rewrite its card")
    add("--limit", type=int, default=10**9, help="--evaluate: use this many test reviews")
    add("--work", type=Path, default=Path("runs/imdb-assets"), help="where unfinished stages are kept")
    add("--bundle", type=Path, default=BUNDLE, help="where the finished bundle goes")
    add("--study-models", type=Path, default=STUDY_MODELS, help="where imdb-plain and imdb-uniform go")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=1)
    add("--vocab-size", type=int, default=4096)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--policy-tokens", type=float, default=17e6)
    add("--policy-learning-rate", type=float, default=3e-3)
    add("--openings", type=int, default=8000, help="that the policy writes, for the prompts")
    add("--classify-steps", type=int, default=1300)
    add("--classify-learning-rate", type=float, default=5e-4)
    add("--written", type=int, default=5000, help="texts that the policy writes for phase 2")
    add("--align-steps", type=int, default=800)
    add("--align-learning-rate", type=float, default=1e-3)
    add("--uniform-steps", type=int, default=300)
    add("--row-coef", type=float, default=2.0)
    add("--gold-seed", type=int, default=1001)
    add("--gold-width", type=int, default=160)
    add("--gold-layers", type=int, default=2)
    add("--gold-heads", type=int, default=5)
    add("--gold-reviews", type=int, default=25_000, help="for its language model")
    add("--gold-tokens", type=float, default=4e6)
    add("--gold-steps", type=int, default=1000)
    add("--gold-learning-rate", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    build = Build(parse())
    build.evaluate() if build.arguments.evaluate else build.run()
