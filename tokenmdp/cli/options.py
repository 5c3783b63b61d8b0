"""What each command may be told. Nothing here needs torch, so that ``tokenmdp --help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

# The names of `tokenmdp.credit.CREDIT_METHODS`, written out because reading them there would import torch.
CreditName = Literal[
    "sparse",
    "uniform",
    "attention",
    "abc-d",
    "abc-d2",
    "red",
    "integrated-gradients",
    "deeplift",
    "shapley",
    "owen",
    "fine-grained",
    "rto",
]
AllOrOne = Literal["all", CreditName]  # one Literal: of a union of two the parser would list the names unordered


@dataclass(frozen=True)
class Train:
    """Train a policy with PPO against a reward model, then show what changed.

    Run the same command again to go on with an interrupted run.
    """

    preset: Literal["quick", "smoke"] = "quick"
    """quick: the bundled movie-review model, minutes on two cores; smoke: an untrained toy model, under a minute."""
    credit: CreditName | None = None
    """How the score is spread over the tokens; default: the preset's, red in quick and attention in smoke."""
    credit_beta: float | None = None
    """The dense share of the credit, for methods that have one; 0 is sparse. None takes the method's."""
    credit_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the credit method, such as --credit-option budget=64; may be repeated."""
    seed: int = 1
    """Seeds sampling, minibatches and prompts."""
    updates: int | None = None
    """PPO updates in all; None takes the preset's. Raise it to train a finished run further."""
    num_envs: int | None = None
    """Episodes an update; None takes the preset's."""
    policy: str | None = None
    """Bundled name, directory or hub name of a causal language model; None takes the preset's."""
    tokenizer: str | None = None
    """Bundled name, directory or hub name; None takes the policy's."""
    reward_model: str | None = None
    """Bundled name, directory or hub name of a sequence classifier; None takes the preset's."""
    align: Literal["offsets"] | None = None
    """offsets: the reward model reads with its own tokenizer and credit moves to the policy's tokens."""
    reward_template: str | None = None
    """With --align offsets, the text that the reward model reads, such as "Q: {prompt} A: {response}"."""
    prompts: str | None = None
    """File, directory or data-set name; None takes the preset's."""
    eval_prompts: str | None = None
    """Prompts for the evaluation before and after; None keeps a fifth of the prompts out of training."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; None takes the environment's."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Which side a longer prompt loses; None refuses it."""
    max_new_tokens: int | None = None
    """Longest response in tokens; None takes the preset's."""
    ppo: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of PPOConfig, such as --ppo kl_coef=0.1; may be repeated."""
    lora_rank: int | None = None
    """Train adapters of this rank beside frozen weights; needs tokenmdp[lora]. None trains all weights."""
    eval_samples: int | None = None
    """Responses before and after training; None takes the preset's."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""
    out: Path | None = None
    """Run directory; None is runs/PRESET-CREDIT-seedSEED, with loraRANK after the credit where adapters learn."""
    resume: bool = True
    """Go on from the run directory's checkpoint if it has one."""
    reexec: bool = True
    """Let the command execute itself once more with glibc's allocator told to keep its memory (faster on CPU)."""


@dataclass(frozen=True)
class Sample:
    """Write texts with a trained policy and tint each token by its credit."""

    source: tyro.conf.Positional[str]
    """A run directory, or the name or directory of a model."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An opening to continue; may be repeated. None: held-out prompts of the run, or bundled ones."""
    num: int = 8
    """How many texts (for each prompt that is given)."""
    credit: CreditName | None = None
    """How the score is spread over the tokens; None takes the run's, or attention."""
    credit_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the credit method, such as --credit-option budget=64; may be repeated."""
    reward_model: str | None = None
    """Bundled name, directory or hub name of a sequence classifier; None takes the run's, or the bundled one."""
    align: Literal["offsets"] | None = None
    """offsets: the reward model reads with its own tokenizer; None takes the run's."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; None takes the run's, or the environment's."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Which side a longer prompt loses; None takes the run's, or refuses it."""
    max_new_tokens: int | None = None
    """Longest response in tokens; None takes the run's, or 16."""
    temperature: float | None = None
    """Below 1 sharpens the distribution, towards the likeliest token at every step; None takes the run's, or 1."""
    top_k: int | None = None
    """Sample among the k likeliest tokens, 0 is all; None takes the run's, or 0."""
    seed: int = 0
    """Seeds the sampling."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""
    html: Path | None = None
    """Also write a page with the numbers to this file."""


@dataclass(frozen=True)
class Score:
    """Score a text and show the credit of each of its tokens."""

    text: tyro.conf.Positional[str]
    """The response to score."""
    prompt: str = ""
    """Text before it, which is scored too but gets no credit."""
    credit: AllOrOne = "attention"
    """How the score is spread over the tokens; all compares every method that can run here."""
    credit_beta: float = 1.0
    """The dense share of the credit, for methods that have one; 1 shows the method alone."""
    credit_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the method, such as --credit-option budget=64 (with all: shapley.budget=64); may be repeated."""
    policy: str = "imdb-tiny"
    """The policy whose attention abc-d and abc-d2 follow: bundled name, directory or hub name."""
    reward_model: str = "imdb-tiny"
    """Bundled name, directory or hub name of a sequence classifier."""
    tokenizer: str | None = None
    """Bundled name, directory or hub name; None takes the reward model's."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""
    html: Path | None = None
    """Also write a page with the numbers to this file."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a run's policy on its held-out prompts again, against the policy before training."""

    run: tyro.conf.Positional[Path]
    """A run directory."""
    samples: int = 256
    """Responses from each policy."""
    seed: int = 0
    """Seeds prompts and sampling; 0 is what training used for its own evaluation."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""


@dataclass(frozen=True)
class Credits:
    """List the credit methods: what each does, what it declares and what it needs."""


@dataclass(frozen=True)
class Quality:
    """Measure where credit lands: every method against known or leave-one-out credit, with intervals and costs."""

    reward_model: str = "imdb-tiny"
    """For the world "model": bundled name, directory or hub name of a sequence classifier."""
    world: Literal["negation", "keyword", "model", "all"] = "model"
    """negation: a word list with "not" and "very"; keyword: one word decides; model: the reward model."""
    texts: Path | None = None
    """For the world "model": a .txt (a text per line), .json, .jsonl, .csv or .parquet file; None samples responses of
    the policy."""
    num: int = 500
    """Texts in each world."""
    max_new_tokens: int = 16
    """Longest response in tokens, where responses are sampled or made of random words."""
    methods: tuple[CreditName, ...] = ()
    """Which methods; none is all of them."""
    option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of a method, such as --option shapley.budget=64; may be repeated."""
    tuned: Path | None = None
    """Directory of a preference-tuned policy, for rto."""
    credit_beta: float = 1.0
    """The dense share of the credit, for methods that have one; 1 measures the method alone."""
    policy: str = "imdb-tiny"
    """Writes the texts; its attention is what abc-d and abc-d2 follow; its tokens are what credit goes to."""
    max_forwards: int = 65_000
    """Reward-model forwards after which a method gets no further texts."""
    seed: int = 0
    """Seeds texts, resampling and the random control."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""
    out: Path | None = None
    """Also write quality.json, quality.md and texts.html, a page of the first texts, into this directory."""


@dataclass(frozen=True)
class Ablate:
    """Compare credit methods: many training runs side by side, with statistics, verdicts and a report.

    Run the same command again to go on: finished runs are kept. Several presets may share a directory; the report is
    about all of them.
    """

    preset: Literal["quick", "imdb", "beta", "length", "kl", "faithful", "tune", "gpt2", "custom", "smoke"] = "quick"
    """quick: minutes on two CPU cores; imdb: the paper's main figure; beta, length, kl: its sweeps; faithful: three
    reward models; tune: learning rates; gpt2: the paper's own models, on GPUs; custom: the methods you name; smoke: an
    untrained toy model, seconds."""
    out: Path | None = None
    """Directory of the study; None is runs/PRESET."""
    methods: tuple[str, ...] = ()
    """Credit methods, with options as in attention:credit_beta=0.4 or shapley:budget=64, or module.Class for one of
    your own; none takes the preset's."""
    seeds: tuple[int, ...] = ()
    """None takes the preset's."""
    lengths: tuple[str, ...] = ()
    """Response lengths such as 8-16, which are 8 to 15 tokens, or 16; none takes the preset's."""
    credit_betas: tuple[float, ...] = ()
    """Dense shares to try in every method that has one; none takes the preset's, or each method's own."""
    kl_coefs: tuple[float, ...] = ()
    """Fixed KL coefficients to try; none takes the preset's."""
    reward_models: tuple[str, ...] = ()
    """Bundled names, directories or hub names of sequence classifiers to try; none takes the preset's."""
    policy: str | None = None
    """Bundled name, directory or hub name of a causal language model, with its tokenizer; None takes the preset's."""
    gold: str | None = None
    """A second reward model that no policy is trained on, or "none"; None takes the preset's, or none with --policy."""
    align: Literal["offsets"] | None = None
    """offsets: the reward model reads with its own tokenizer and credit moves to the policy's tokens."""
    prompts: str | None = None
    """File, directory or data-set name; None takes the preset's."""
    updates: int | None = None
    """PPO updates of each run; None takes the preset's."""
    num_envs: int | None = None
    """Episodes an update; None takes the preset's."""
    eval_every: int | None = None
    """Updates between evaluations on held-out prompts; None takes the preset's."""
    eval_samples: int | None = None
    """Responses in an evaluation; None takes the preset's."""
    ppo: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of PPOConfig, such as --ppo kl_target=3; may be repeated."""
    learning_rates: Path | None = None
    """A JSON file of methods and learning rates, such as the learning_rates.json that the preset tune writes."""
    device: str = "auto"
    """cpu, cuda for all GPUs, or one such as cuda:1; auto takes cuda if there is one."""
    jobs: int | None = None
    """Runs at a time; None is the number of cores, or of GPUs."""
    shard: str | None = None
    """I/N: only every Nth run, from the Ith on, so that N commands share a study; the last to end reports."""
    quality_texts: int = 100
    """Texts on which each reward model's credit is compared with leave-one-out importance after the runs; 0 leaves it
    out, which a large model on a CPU takes many minutes for."""
    report_only: bool = False
    """Run nothing: write the report of what is there."""
