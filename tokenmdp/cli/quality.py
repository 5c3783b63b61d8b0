"""``tokenmdp quality``: where the credit methods put their credit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tokenmdp.cli.checks import check_directory, check_numbers
from tokenmdp.cli.options import CreditName, ScoreChoice, parse
from tokenmdp.credit import CREDIT_METHODS
from tokenmdp.envs.text_rows import read_rows
from tokenmdp.evaluation.credit_quality import (
    MethodQuality,
    World,
    WorldQuality,
    keyword_world,
    measure,
    model_world,
    negation_world,
    tables,
)
from tokenmdp.evaluation.credit_quality.texts import Text as Tokens
from tokenmdp.evaluation.credit_quality.texts import encode, episodes_of, text_of
from tokenmdp.files import write_text
from tokenmdp.models.encoding import is_chat
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import token_pieces
from tokenmdp.report import comparison
from tokenmdp.reward_models import load_reward_model, readable_by
from tokenmdp.reward_models.scores import read_score
from tokenmdp.rollouts import collect
from tokenmdp.runs.credit_options import credit_methods, declared, grouped_options, needs_of, policy_access
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import make_envs, resolve_device, split_prompts
from tokenmdp.runs.opening import load_policy
from tokenmdp.runs.settings import PRESETS, parse_options
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ROWS = 64  # episodes at a time
BUDGET = {"budget": 128}  # not the methods' own 1024, with which only an eighth of the texts would be affordable
DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {"shapley": BUDGET, "owen": BUDGET}


@dataclass(frozen=True)
class Quality:
    """Measure where credit lands: every method against known or leave-one-out credit, with intervals and costs."""

    reward_model: str = "imdb-tiny"
    """For the world "model": bundled name, directory or hub name of a sequence classifier."""
    score: ScoreChoice = None
    """Default: by its labels."""
    world: Literal["negation", "keyword", "model", "all"] = "model"
    """negation: a word list with "not" and "very"; keyword: one word decides; model: the reward model."""
    texts: Path | None = None
    """For the world "model": a .txt (one text per line), .json, .jsonl, .csv or .parquet file. Default: texts
    by the policy."""
    num: int = 500
    """Texts in each world."""
    max_new_tokens: int = 16
    """Longest response in tokens, where responses are sampled or made of random words."""
    methods: tuple[CreditName, ...] = ()
    """Which methods. Default: all of them."""
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
    """Where policy and reward model run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path | None = None
    """Also write quality.json, quality.md and texts.html, a page of the first texts, into this directory."""


def main(arguments: Sequence[str]) -> int:
    """Parse and measure; returns the exit status."""
    return measure_quality(parse(Quality, "quality", arguments))


def measure_quality(arguments: Quality) -> int:
    """Measure credit methods in the worlds asked for; print the tables and write them."""
    console = make_console()
    results: list[WorldQuality] = []
    labels: dict[str, str] = {}
    for result, labels in measured(arguments, console):
        results.append(result)
        _show(console, result, labels)
    console.print(" ".join(tables.LEGEND), style="dim", highlight=False)
    if arguments.out is not None:
        _write(arguments, arguments.out, results, labels)
        console.print(f"written: {arguments.out}/quality.json, quality.md, texts.html", highlight=False, soft_wrap=True)
    return 0


def measured(arguments: Quality, console: Console) -> Iterator[tuple[WorldQuality, dict[str, str]]]:
    """Each world that ``arguments`` ask for, and what its methods are called with their options.

    Raises:
        ValueError: arguments that do not fit.
    """
    check_numbers(arguments, num=2, max_new_tokens=1, max_forwards=1)  # an interval needs two texts
    check_directory(arguments.out)
    device = resolve_device(arguments.device)
    options = {name: dict(given) for name, given in DEFAULT_OPTIONS.items()}
    for name, given in grouped_options(parse_options(arguments.option, "--option"), "--option").items():
        options.setdefault(name, {}).update(given)
    if arguments.tuned is not None:
        options.setdefault("rto", {})["tuned"] = str(arguments.tuned)
    names: Sequence[str] = arguments.methods or tuple(CREDIT_METHODS)
    methods, refused = credit_methods(names, options, arguments.credit_beta, "--option")
    labels = {name: tables.label(name, options.get(name, {})) for name in methods}
    for world in _worlds(arguments, device):
        access = policy_access(
            arguments.policy,
            world.tokenizer,
            world.episodes.prompt_slots,
            world.episodes.response_mask.shape[1],
            device,
            frozenset().union(*(method.needs for method in methods.values())),
        )
        with _progress(console) as progress:
            bar = progress.add_task(f"{world.name} world", total=len(world.episodes.input_ids))
            result = measure(
                world,
                methods,
                access=access,
                max_forwards=arguments.max_forwards,
                seed=arguments.seed,
                progress=partial(_advance, progress, bar),
            )
        result.methods.extend(MethodQuality(name, needs_of(name), reason) for name, reason in refused.items())
        yield result, labels


def _worlds(arguments: Quality, device: str) -> list[World]:
    wanted = ("negation", "keyword", "model") if arguments.world == "all" else (arguments.world,)
    tokenizer = load_tokenizer(arguments.policy)
    worlds = []
    if "negation" in wanted:
        worlds.append(negation_world(tokenizer, arguments.num, arguments.seed))
    if "keyword" in wanted:
        worlds.append(keyword_world(tokenizer, arguments.num, arguments.max_new_tokens, arguments.seed))
    if "model" in wanted:
        texts, where = _texts(arguments, tokenizer, device)
        model = load_reward_model(arguments.reward_model, device=device, score=read_score(arguments.score))
        worlds.append(model_world(model, tokenizer, episodes_of(texts), where))
    return worlds


def _texts(arguments: Quality, tokenizer: PreTrainedTokenizerBase, device: str) -> tuple[list[Tokens], str]:
    """The texts of a file, or the policy's responses to prompts held out of training; and what to call them."""
    if arguments.texts is not None:
        rows = read_rows(arguments.texts)
        for row, place in zip(rows, rows.places, strict=True):
            if not isinstance(row, str):
                raise ValueError(f"{place} is {'a chat' if is_chat(row) else 'a list of ids'}; give one text")
        rows = rows.part(range(min(arguments.num, len(rows))))
        given = [encode(tokenizer, text, place=place) for text, place in zip(rows, rows.places, strict=True)]
        if len(given) < 2:
            raise ValueError(f"{arguments.texts} holds {len(given)} texts; an interval needs at least 2")
        return given, f"the texts of {arguments.texts.name}"
    settings = replace(
        PRESETS["quick"].settings,
        policy=arguments.policy,
        tokenizer=arguments.policy,
        reward_model=f"lexicon:{arguments.policy}",  # loads at once and reads any tokens; its scores are not used here
        credit="sparse",
        max_new_tokens=arguments.max_new_tokens,
        device=device,
    )
    split = split_prompts(settings)
    envs = make_envs(settings, min(ROWS, arguments.num), split.held_out)
    policy = load_policy(arguments.policy, envs, {}, device)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    texts: list[Tokens] = []
    while len(texts) < arguments.num:
        rollout, _ = collect(envs, policy, None, generator, seed=arguments.seed * 1_000_003 + len(texts))
        episodes = Episode(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
        texts += [text_of(episodes, row) for row in range(len(rollout.scores))]
    envs.close()
    return texts[: arguments.num], f"responses of {arguments.policy} to {split.label}"


def _advance(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _show(console: Console, result: WorldQuality, labels: dict[str, str]) -> None:
    for table in tables.quality_tables(result, labels, console.width):
        console.print(table)
    for note in tables.notes(result):
        console.print(note, highlight=False)
    console.print()


def _write(arguments: Quality, out: Path, results: Sequence[WorldQuality], labels: dict[str, str]) -> None:
    given = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(arguments).items()}
    text = json.dumps(tables.record(results, given), indent=1)
    write_text(out / "quality.json", text + "\n")
    write_text(out / "quality.md", tables.markdown(results, labels, _command(arguments)))
    texts = [item for result in results for item in _comparisons(result)]
    note = "The first texts of every world. The first row is the reference that the others are measured against."
    comparison.html(texts, out / "texts.html", title="Credit methods, token by token", note=note)


def _command(arguments: Quality) -> str:
    """The shell command that reproduces these tables."""
    words = ["tokenmdp", "quality"]
    for field in fields(arguments):
        value, flag = getattr(arguments, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "option":
            words += [word for option in value for word in (flag, option)]
        elif value != field.default and field.name not in ("out", "device"):
            words += [flag, *value] if isinstance(value, tuple) else [flag, str(value)]
    return shlex.join(words)


def _comparisons(result: WorldQuality) -> list[comparison.Comparison]:
    """The first texts of a world, with the reference and every method that ran."""
    world, texts = result.world, []
    credits = {name: credit for name, credit in result.examples.items() if name != "random"}
    costs = {method.name: tables.cost(method) for method in result.methods}
    scores = readable_by(world.model, world.tokenizer)(_first(world.episodes, len(credits["reference"]))).score
    for row, score in enumerate(scores.tolist()):
        text, mask = text_of(world.episodes, row), world.episodes.response_mask[row]
        prompt, pieces = token_pieces(world.tokenizer, text.ids, text.prompt_ids)
        rows = [
            comparison.MethodRow(name, credit[row][mask].tolist(), declared(name, costs[name]))
            for name, credit in credits.items()
            if row < len(credit)
        ]
        texts.append(comparison.Comparison(prompt, pieces, score, rows, f"{world.name} {row + 1}"))
    return texts


def _first(episodes: Episode, count: int) -> Episode:
    return Episode(*(part[:count] for part in episodes))
