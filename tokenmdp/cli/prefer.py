"""``tokenmdp prefer``: responses of a policy, compared by a model or a person, as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from tokenmdp.cli.checks import check_directory, check_numbers
from tokenmdp.cli.options import ScoreChoice, parse
from tokenmdp.preferences import (
    Answers,
    GrowingFile,
    OtherPairs,
    OtherSettings,
    Questionnaire,
    join,
    page,
    read_answers,
    read_groups,
    terminal,
    write_records,
)
from tokenmdp.preferences.growing import check_finished, read_progress, record_of
from tokenmdp.preferences.queries import Rule
from tokenmdp.runs.comparisons import Comparing, ask_model, print_sampled, record_of_sampling, sample, settings_of
from tokenmdp.runs.display import make_console
from tokenmdp.wording import count

PEOPLE = ("page", "terminal")


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
    ask_by: Rule = "random"
    """Which pairs to ask about: as they come, or of --candidates times as many those on which the members of
    --ask-model disagree most, by the variance of their predictions or of their labels."""
    ask_model: str | None = None
    """The ensemble for --ask-by, a directory of `tokenmdp train reward-model --members`."""
    candidates: int = 4
    """With --ask-by, how many pairs are sampled for each that is asked about."""
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
    asked = Comparing(**{one.name: getattr(arguments, one.name) for one in fields(Comparing)})
    if arguments.judge in PEOPLE:
        return _ask_people(console, arguments, asked)
    ask_model(console, asked)
    return 0


def _ask_people(console: Console, arguments: Prefer, asked: Comparing) -> int:
    if record_of(arguments.out).exists():
        raise OtherSettings(f"{arguments.out} holds the comparisons of a model; choose another --out")
    name, settings = settings_of(asked)
    record = record_of_sampling(asked, settings) | {"pairs": arguments.pairs, "ask_twice": arguments.ask_twice}
    file = GrowingFile(_beside(arguments.out, ".groups.jsonl"), record, arguments.pairs)
    sample(console, asked, name, settings, file, lambda groups, first: (groups, {}))
    print_sampled(console, file)
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


def _beside(out: Path, ending: str) -> Path:
    return out.with_suffix(ending)
