"""Comparisons of a policy's responses: sampled in its environment, compared by a model, written as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenmdp.models.loading import load_tokenizer
from tokenmdp.preferences import (
    Annotator,
    Group,
    GrowingFile,
    Preference,
    ceiling,
    chances_of,
    model_scores,
    pairs_of,
    query_values,
    read_records,
)
from tokenmdp.preferences.queries import Rule
from tokenmdp.reward_models import EnsembleRewardModel, load_reward_model, readable_by
from tokenmdp.reward_models.retokenized import PLAIN
from tokenmdp.reward_models.scores import read_score
from tokenmdp.rollouts.groups import sample_groups
from tokenmdp.runs.display import LOG_SECONDS
from tokenmdp.runs.environments import ROWS, make_envs, resolve_device, split_prompts
from tokenmdp.runs.opening import load_policy, open_source
from tokenmdp.runs.settings import RunSettings, absolute_name
from tokenmdp.types import lay_out
from tokenmdp.wording import count

SAMPLING = (
    "env", "policy", "tokenizer", "prompts", "eval_prompts", "max_new_tokens", "min_new_tokens", "horizon_range",
    "max_prompt_tokens", "truncate_prompt",
)  # fmt: skip
CHOSEN = 2**62  # added to the seed of pairs that are chosen among many
Judge = Callable[[list[Group], int], tuple[Sequence[Preference | Group], dict[str, int]]]


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """What is sampled and who compares; the fields are the options of `tokenmdp prefer`."""

    policy: str
    out: Path
    judge: str = "imdb-gold"
    score: str | None = None
    pairs: int = 1024
    responses: int = 2
    temperature: float = 1.0
    error_rate: float = 0.0
    align: str | None = None
    ask_by: Rule = "random"
    ask_model: str | None = None
    candidates: int = 4
    seed: int = 1
    prompts: str | None = None
    max_prompt_tokens: int | None = None
    truncate_prompt: str | None = None
    max_new_tokens: int | None = None
    sampling_temperature: float = 1.0
    top_k: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.ask_by == "random") != (self.ask_model is None):
            raise ValueError(
                f"--ask-by {self.ask_by} --ask-model {self.ask_model}: asking where an ensemble disagrees needs both, "
                "the rule and the directory of the ensemble"
            )
        if self.ask_by == "random" and self.candidates != type(self).candidates:
            raise ValueError(f"--candidates {self.candidates} is for --ask-by disagreement or label-variance; pass one")
        if self.ask_by != "random" and (self.responses != 2 or self.candidates < 2):
            raise ValueError(
                f"--ask-by {self.ask_by} chooses among pairs: --responses is {self.responses} (2), --candidates "
                f"{self.candidates} (at least 2)"
            )


def settings_of(asked: Comparing) -> tuple[str, RunSettings]:
    """The policy's name, and the settings of its environment."""
    name, settings = open_source(asked.policy)
    given = {
        key: value
        for key in ("max_prompt_tokens", "truncate_prompt", "max_new_tokens")
        if (value := getattr(asked, key)) is not None
    }
    if asked.prompts is not None:
        given |= {"prompts": absolute_name(asked.prompts), "eval_prompts": None}
    policy, tokenizer = absolute_name(name) or name, absolute_name(settings.tokenizer) or settings.tokenizer
    device = resolve_device(asked.device)
    # The environment only has the texts written: a word list scores them, which costs nothing. The judge reads later.
    plain: dict[str, Any] = {
        "reward_model": f"lexicon:{tokenizer}",
        "credit": "sparse",
        "credit_options": {},
        "align": None,
    }
    return policy, replace(
        settings, policy=policy, tokenizer=tokenizer, device=device, reward_template=None, **plain, **given
    )


def record_of_sampling(asked: Comparing, settings: RunSettings) -> dict[str, Any]:
    """What decides which responses there are, as JSON values."""
    record = {key: value for key, value in asdict(settings).items() if key in SAMPLING}
    record |= {key: getattr(asked, key) for key in ("seed", "responses", "sampling_temperature", "top_k")}
    if record["horizon_range"] is not None:
        record["horizon_range"] = list(record["horizon_range"])  # as JSON gives it back
    if asked.ask_by != "random":
        record |= {"ask_by": asked.ask_by, "ask_model": absolute_name(asked.ask_model), "candidates": asked.candidates}
    return record


def ask_model(console: Console, asked: Comparing) -> list[Preference]:
    """Sample ``asked.pairs`` groups into ``asked.out``, compared by a reward model; returns all records of the file."""
    name, settings = settings_of(asked)
    record = record_of_sampling(asked, settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    model = load_reward_model(asked.judge, device=settings.device, score=read_score(asked.score))
    if asked.align is not None:
        model = readable_by(model, tokenizer, PLAIN)
    annotator = Annotator(asked.judge, model_scores(model, tokenizer, ROWS), asked.temperature, asked.error_rate)
    record |= {key: getattr(asked, key) for key in ("temperature", "error_rate", "align")}
    record["judge"] = absolute_name(asked.judge)
    if asked.score is not None:
        record["score"] = asked.score

    def judge(groups: list[Group], first: int) -> tuple[Sequence[Preference | Group], dict[str, int]]:
        judged = annotator.judge(groups, asked.seed, first)
        return judged.records, {"tied": judged.tied, "compared": judged.pairs}

    file = GrowingFile(asked.out, record, asked.pairs)
    sample(console, asked, name, settings, file, judge)
    records = read_records(asked.out)
    pairs, counts = pairs_of(records), file.counts
    print_sampled(console, file)
    console.print(
        f"{counts['tied']} of {count(counts['compared'], 'pair')} tied and dropped "
        f"({counts['tied'] / max(counts['compared'], 1):.1%}); {count(len(records), 'line')} in {asked.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if pairs:
        agree = sum((pair.score_chosen or 0.0) > (pair.score_rejected or 0.0) for pair in pairs)
        console.print(
            f"accuracy's ceiling: {ceiling(chances_of(pairs, annotator)):.3f} of labels are expected to agree with the "
            f"judge's own order (temperature {asked.temperature:g}, error rate {asked.error_rate:g}); of these "
            f"{len(pairs)} pairs {agree / len(pairs):.3f} do",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return records


def sample(
    console: Console, asked: Comparing, name: str, settings: RunSettings, file: GrowingFile, judge: Judge
) -> None:
    """Sample and judge until the file has all groups; every batch depends on the seed and its own number only."""
    with file.open() as known:
        if known:
            console.print(f"{file.path} has {file.done} of {asked.pairs}", highlight=False, soft_wrap=True)
        if file.done >= asked.pairs:
            return
        batch_size = max(1, ROWS // asked.responses)  # groups
        split = split_prompts(settings)
        envs = make_envs(settings, batch_size * asked.responses, split.training)
        options = settings.config | {"temperature": asked.sampling_temperature, "top_k": asked.top_k}
        policy = load_policy(name, envs, options, settings.device)
        console.print(split.note, highlight=False, soft_wrap=True)

        # Other pairs than random ones with this seed, which the ensemble may have learned from.
        seed = asked.seed if asked.ask_by == "random" else asked.seed + CHOSEN

        def sampled_batch(number: int) -> list[Group | None]:
            return sample_groups(envs, policy, asked.responses, seed=seed, batch=number)

        choose = sampled_batch if asked.ask_by == "random" else chooser(asked, settings, sampled_batch)
        with _progress(console, file.done, asked.pairs) as show:
            while file.done < asked.pairs:
                batch, used = divmod(file.done, batch_size)
                sampled = choose(batch)
                taken = sampled[used : used + asked.pairs - file.done]
                groups = [group for group in taken if group is not None]
                # The noise of a group is seeded with its place among those that differ, so that it is the same however
                # the sampling was cut.
                records, counts = judge(groups, file.done - file.counts["identical"])
                file.append(records, file.done + len(taken), {"identical": len(taken) - len(groups), **counts})
                show(file.done)
        envs.close()


@contextmanager
def _progress(console: Console, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A live bar on a terminal, a line now and then in a file."""
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, logged = progress.add_task("", total=total, completed=done), time.monotonic()

        def show(now: int) -> None:
            nonlocal logged
            progress.update(bar, completed=now)
            if not console.is_terminal and time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                console.print(f"{now} of {total}", highlight=False)

        yield show


def print_sampled(console: Console, file: GrowingFile) -> None:
    """How many prompts there are, and how many of them had one response only."""
    identical = file.counts["identical"]
    note = f", {identical} of them with the same response throughout, left out" if identical else ""
    console.print(f"{count(file.done, 'prompt')}{note}", highlight=False)


def chooser(
    asked: Comparing, settings: RunSettings, sampled: Callable[[int], list[Group | None]]
) -> Callable[[int], list[Group | None]]:
    """A function from the number of a batch to the pairs to ask about: of ``candidates`` batches, those worth most."""
    model = load_reward_model(str(asked.ask_model), device=settings.device)
    if not isinstance(model, EnsembleRewardModel):
        raise ValueError(
            f"--ask-model {asked.ask_model} is one reward model, which disagrees with nobody; train several with "
            "tokenmdp train reward-model --members 5"
        )

    model.check_tokenizer(load_tokenizer(settings.tokenizer))

    def choose(batch: int) -> list[Group | None]:
        parts = [sampled(batch * asked.candidates + place) for place in range(asked.candidates)]
        groups = [group for part in parts for group in part if group is not None]
        prompts = [group.prompt_ids for group in groups for _ in group.responses_ids]
        responses = [ids for group in groups for ids in group.responses_ids]
        scores = model.member_scores(lay_out(prompts, responses)).view(len(model.members), -1, 2)
        best = query_values(scores, asked.ask_by).argsort(descending=True, stable=True)[: len(parts[0])]
        chosen: list[Group | None] = [groups[place] for place in best.tolist()]
        return chosen + [None] * (len(parts[0]) - len(chosen))

    return choose
