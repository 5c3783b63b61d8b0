"""``tokenmdp prefer``: responses of a policy, compared by a model or a person, as JSON lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenmdp.cli.checks import check_directory, check_numbers
from tokenmdp.cli.options import ScoreChoice, parse
from tokenmdp.cli.sample import load_policy, open_source
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.preferences import (
    Annotator,
    Answers,
    Group,
    GrowingFile,
    OtherPairs,
    OtherSettings,
    Preference,
    Questionnaire,
    ceiling,
    chances_of,
    join,
    model_scores,
    page,
    pairs_of,
    read_answers,
    read_groups,
    read_records,
    terminal,
    write_records,
)
from tokenmdp.preferences.growing import check_finished, read_progress, record_of
from tokenmdp.reward_models import load_reward_model, readable_by
from tokenmdp.reward_models.retokenized import PLAIN
from tokenmdp.reward_models.scores import read_score
from tokenmdp.rollouts.groups import sample_groups
from tokenmdp.runs.display import LOG_SECONDS, make_console
from tokenmdp.runs.environments import ROWS, make_envs, resolve_device, split_prompts
from tokenmdp.runs.settings import RunSettings, absolute_name
from tokenmdp.wording import count

PEOPLE = ("page", "terminal")
SAMPLING = (
    "env", "policy", "tokenizer", "prompts", "eval_prompts", "max_new_tokens", "min_new_tokens", "horizon_range",
    "max_prompt_tokens", "truncate_prompt",
)  # fmt: skip
Judge = Callable[[list[Group], int], tuple[Sequence[Preference | Group], dict[str, int]]]


@dataclass(frozen=True)
class Prefer:
    """Sample responses to each prompt, ask which is better, and write the comparisons as JSON lines.

    Run the same command again to go on after an interruption.
    """

    policy: str = "imdb-tiny"
    """Who writes: a run directory, or the bundled name, directory or hub name of a causal language model."""
    judge: str = "imdb-gold"
    """Who compares: bundled name, directory or hub name of a sequence classifier; page: a person, on a page that is
    written beside --out; terminal: a person, here."""
    score: ScoreChoice = None
    """Default: by its labels."""
    pairs: int = 1024
    """How many prompts get responses: pairs, or with --responses above 2 rankings. Raise it to go on further."""
    responses: int = 2
    """Responses to each prompt."""
    temperature: float = 1.0
    """T: a model prefers a to b with probability sigmoid(T (score a - score b)); inf is always the higher score."""
    error_rate: float = 0.0
    """The share of a model's answers that are coin flips instead."""
    align: Literal["offsets"] | None = None
    """offsets: the judge reads the text with its own tokenizer."""
    seed: int = 1
    """Seeds prompts, sampling, the judge's noise and the sides of the page."""
    prompts: str | None = None
    """File, directory or data-set name; without a fifth of them, which evaluations use. Default: the run's, or bundled
    ones."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens. Default: the run's, or the environment's."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Which side a longer prompt loses. Default: the run's choice, or such prompts are refused."""
    max_new_tokens: int | None = None
    """Longest response in tokens. Default: the run's, or 16."""
    sampling_temperature: float = 1.0
    """Of the policy: below 1 sharpens its distribution."""
    top_k: int = 0
    """The policy samples among the k likeliest tokens, 0 is all."""
    ask_twice: int = 0
    """How many pairs a person is asked about a second time, to see how far the answers agree."""
    annotator: str = "anonymous"
    """The name of the person who compares; on the page it can be changed."""
    labels: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Answers downloaded from the page of --out: join them to its pairs. May be repeated, for several people."""
    device: str = "auto"
    """Where policy and judge run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path = Path("runs/pairs.jsonl")
    """The file of comparisons."""


def main(arguments: Sequence[str]) -> int:
    """Parse, sample, ask and write; returns the exit status."""
    return prefer(parse(Prefer, "prefer", arguments))


def prefer(arguments: Prefer) -> int:
    """Write comparisons, or what a person needs to make them."""
    console = make_console()
    if arguments.out.suffix != ".jsonl":
        raise ValueError(f"--out is {arguments.out}; comparisons are JSON lines: give a name that ends in .jsonl")
    if arguments.labels:
        return _join(console, arguments)
    check_numbers(arguments, pairs=1, responses=2, ask_twice=0, max_prompt_tokens=1, max_new_tokens=1, top_k=0)
    check_directory(arguments.out.parent)
    if arguments.judge in PEOPLE and (arguments.responses != 2 or arguments.ask_twice > arguments.pairs):
        raise ValueError(
            f"--judge {arguments.judge} compares two responses, and asks at most all pairs twice: --responses is "
            f"{arguments.responses}, --ask-twice {arguments.ask_twice} of --pairs {arguments.pairs}"
        )
    name, settings = _settings(arguments)
    record = {key: value for key, value in asdict(settings).items() if key in SAMPLING}
    record |= {key: getattr(arguments, key) for key in ("seed", "responses", "sampling_temperature", "top_k")}
    if record["horizon_range"] is not None:
        record["horizon_range"] = list(record["horizon_range"])  # as JSON gives it back
    if arguments.judge in PEOPLE:
        return _ask_people(console, arguments, name, settings, record)
    return _ask_model(console, arguments, name, settings, record)


def _settings(arguments: Prefer) -> tuple[str, RunSettings]:
    """The policy's name, and the settings of its environment."""
    name, settings = open_source(arguments.policy)
    given = {
        key: value
        for key in ("max_prompt_tokens", "truncate_prompt", "max_new_tokens")
        if (value := getattr(arguments, key)) is not None
    }
    if arguments.prompts is not None:
        given |= {"prompts": absolute_name(arguments.prompts), "eval_prompts": None}
    policy, tokenizer = absolute_name(name) or name, absolute_name(settings.tokenizer) or settings.tokenizer
    device = resolve_device(arguments.device)
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


def _ask_model(console: Console, arguments: Prefer, name: str, settings: RunSettings, record: dict[str, Any]) -> int:
    tokenizer = load_tokenizer(settings.tokenizer)
    model = load_reward_model(arguments.judge, device=settings.device, score=read_score(arguments.score))
    if arguments.align is not None:
        model = readable_by(model, tokenizer, PLAIN)
    annotator = Annotator(
        arguments.judge, model_scores(model, tokenizer, ROWS), arguments.temperature, arguments.error_rate
    )
    record |= {key: getattr(arguments, key) for key in ("temperature", "error_rate", "align")}
    record["judge"] = absolute_name(arguments.judge)
    if arguments.score is not None:
        record["score"] = arguments.score

    def judge(groups: list[Group], first: int) -> tuple[Sequence[Preference | Group], dict[str, int]]:
        judged = annotator.judge(groups, arguments.seed, first)
        return judged.records, {"tied": judged.tied, "compared": judged.pairs}

    file = GrowingFile(arguments.out, record, arguments.pairs)
    _sample(console, arguments, name, settings, file, judge)
    records = read_records(arguments.out)
    pairs, counts = pairs_of(records), file.counts
    _print_sampled(console, file)
    console.print(
        f"{counts['tied']} of {count(counts['compared'], 'pair')} tied and dropped "
        f"({counts['tied'] / max(counts['compared'], 1):.1%}); {count(len(records), 'line')} in {arguments.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if pairs:
        agree = sum((pair.score_chosen or 0.0) > (pair.score_rejected or 0.0) for pair in pairs)
        console.print(
            f"accuracy's ceiling: {ceiling(chances_of(pairs, annotator)):.3f} of labels are expected to agree with the "
            f"judge's own order (temperature {arguments.temperature:g}, error rate {arguments.error_rate:g}); of these "
            f"{len(pairs)} pairs {agree / len(pairs):.3f} do",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return 0


def _ask_people(console: Console, arguments: Prefer, name: str, settings: RunSettings, record: dict[str, Any]) -> int:
    if record_of(arguments.out).exists():
        raise OtherSettings(f"{arguments.out} holds the comparisons of a model; choose another --out")
    record |= {"pairs": arguments.pairs, "ask_twice": arguments.ask_twice}
    file = GrowingFile(_beside(arguments.out, ".groups.jsonl"), record, arguments.pairs)
    _sample(console, arguments, name, settings, file, lambda groups, first: (groups, {}))
    _print_sampled(console, file)
    questionnaire = _questionnaire(arguments.out)
    if arguments.judge == "terminal":
        answers = terminal.ask(
            questionnaire, _beside(arguments.out, ".answers.json"), arguments.annotator, console, console.input
        )
        return _write_joined(console, arguments.out, questionnaire, [answers]) if answers.answers else 0
    path = page.html(questionnaire, _beside(arguments.out, ".html"), annotator=arguments.annotator)
    console.print(
        f"page: {path} ({count(len(questionnaire.questions), 'question')})\nopen it in a browser, download them, then: "
        f"tokenmdp prefer --labels FILE --out {arguments.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _join(console: Console, arguments: Prefer) -> int:
    questionnaire = _questionnaire(arguments.out)
    people = [read_answers(path, questionnaire) for path in arguments.labels]
    return _write_joined(console, arguments.out, questionnaire, people)


def _questionnaire(out: Path) -> Questionnaire:
    """What people were asked, from the groups beside ``out``.

    Raises:
        OtherPairs: there are none.
        Interrupted: they are not all sampled yet.
    """
    path = _beside(out, ".groups.jsonl")
    if not path.exists():
        raise OtherPairs(f"there are no pairs {path} to ask about; pass the --out of the command that wrote the page")
    check_finished(path)
    groups = read_groups(path)
    settings = read_progress(record_of(path))["settings"]
    return Questionnaire.draw(groups, settings["seed"], min(settings["ask_twice"], len(groups)))


def _write_joined(console: Console, out: Path, questionnaire: Questionnaire, people: Sequence[Answers]) -> int:
    joined = join(questionnaire, people)
    write_records(out, joined.comparisons)
    answered = len(joined.comparisons) + joined.ties
    console.print(
        f"{joined.ties} of {count(answered, 'answered pair')} tied and dropped ({joined.ties / answered:.1%}), "
        f"{joined.skipped} skipped; {count(len(joined.comparisons), 'comparison')} in {out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for what, agreement in (("asked twice, the same person", joined.with_oneself), ("people", joined.with_others)):
        if agreement.pairs:
            console.print(f"{what} agreed on {agreement} pairs", highlight=False)
    return 0


def _sample(
    console: Console, arguments: Prefer, name: str, settings: RunSettings, file: GrowingFile, judge: Judge
) -> None:
    """Sample and judge until the file has all groups; every batch depends on the seed and its own number only."""
    with file.open() as known:
        if known:
            console.print(f"{file.path} has {file.done} of {arguments.pairs}", highlight=False, soft_wrap=True)
        if file.done >= arguments.pairs:
            return
        batch_size = max(1, ROWS // arguments.responses)  # groups
        split = split_prompts(settings)
        envs = make_envs(settings, batch_size * arguments.responses, split.training)
        options = settings.config | {"temperature": arguments.sampling_temperature, "top_k": arguments.top_k}
        policy = load_policy(name, envs, options, settings.device)
        console.print(split.note, highlight=False, soft_wrap=True)
        with _progress(console, file.done, arguments.pairs) as show:
            while file.done < arguments.pairs:
                batch, used = divmod(file.done, batch_size)
                sampled = sample_groups(envs, policy, arguments.responses, seed=arguments.seed, batch=batch)
                taken = sampled[used : used + arguments.pairs - file.done]
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


def _print_sampled(console: Console, file: GrowingFile) -> None:
    identical = file.counts["identical"]
    note = f", {identical} of them with the same response throughout, left out" if identical else ""
    console.print(f"{count(file.done, 'prompt')}{note}", highlight=False)


def _beside(out: Path, ending: str) -> Path:
    return out.with_suffix(ending)
