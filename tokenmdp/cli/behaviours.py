"""``tokenmdp behaviours``: sets of questions that a model writes, what models answer, and how training changes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from tokenmdp.cli.checks import check_directory, check_file, check_numbers
from tokenmdp.cli.options import parse
from tokenmdp.evaluation.behaviours import Questions
from tokenmdp.files import write_text
from tokenmdp.report import behaviours_page
from tokenmdp.report.behaviours_page import Comparison, Policy, shown
from tokenmdp.runs import behaviours
from tokenmdp.runs.behaviour_comparison import POSITIVITY, REPETITION, answer_all, compare, settings_for, sources_of
from tokenmdp.runs.directory import refuse_strangers
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.opening import open_source


@dataclass(frozen=True)
class WriteOptions:
    """Write a set of questions about a behaviour: a policy completes stems, a judge labels and filters them.

    The statements are kept beside the set, so another --confidence or number of --questions takes no time.
    """

    stems: Path | None = None
    """The stem file."""
    policy: str = "imdb-tiny"
    """Who writes: a run directory, or the bundled name, directory or hub name of a causal language model."""
    judge: str = "imdb-tiny"
    """Who labels: bundled name, directory or hub name of a sequence classifier."""
    second_judge: str = "imdb-gold"
    """Another one, to see how far the labels can be trusted."""
    candidates: int = 400
    """How many different statements the policy writes."""
    questions: int = 100
    """How many questions are made of them, half for each side."""
    confidence: float = 0.8
    """Statements are kept of which the judge is at least so sure: sigmoid(|score|); 0.5 keeps all."""
    max_new_tokens: int = 24
    """Longest completion in tokens; completions that do not end their sentence within it are left out."""
    sampling_temperature: float = 0.8
    """Of the policy: below 1 sharpens its distribution."""
    ask: int = 0
    """Also write a page on which a person labels so many of the statements."""
    labels: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Answers downloaded from the page of --out: write their agreement into the card. May be repeated, for several
    people."""
    seed: int = 1
    """Seeds stems and sampling."""
    device: str = "auto"
    """Where policy and judges run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path = Path("runs/behaviours/set.jsonl")
    """The file of questions; card, statements, page and task file lie beside it."""


@dataclass(frozen=True)
class AnswerOptions:
    """The probability that a model gives the answers that show a behaviour."""

    sets: tyro.conf.Positional[tuple[Path, ...]]
    """Files of questions, of this command or of others."""
    policy: str = "imdb-tiny"
    """Who answers: a run directory, or the bundled name, directory or hub name of a causal language model."""
    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path | None = None
    """Also write the log-likelihood of every answer as JSON lines."""


@dataclass(frozen=True)
class CompareOptions:
    """Compare the behaviour of policies: their answers, how positive their texts are, and how they repeat each other.

    Run the same command again to go on after an interruption, or with more sources and sets.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Runs, pipelines of `tokenmdp rlhf`, models, or directories of these; LABEL=SOURCE names the line in the
    figures."""
    set: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A file of questions; may be repeated."""
    start: str = "imdb-tiny"
    """The policy that all were trained from: the KL is measured to it, and changes are taken from it."""
    judge: str = "imdb-gold"
    """Bundled name, directory or hub name of a sequence classifier, which says how positive a text is."""
    align: Literal["offsets"] | None = None
    """offsets: the judge reads the text with its own tokenizer."""
    samples: int = 256
    """Responses of each policy to the same held-out prompts."""
    max_new_tokens: int = 16
    """Longest response in tokens."""
    device: str = "auto"
    """Where policies and judge run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path = Path("runs/behaviours/compared")
    """Directory of measurements and page."""


KINDS = {"write": WriteOptions, "answer": AnswerOptions, "compare": CompareOptions}


def main(arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit status.

    Args:
        arguments: write, answer or compare, then options.
    """
    what, *rest = [*arguments] or ["--help"]
    if what in ("--help", "-h"):
        print("usage: tokenmdp behaviours {write,answer,compare} ...\n")
        print("Sets of questions that a model writes, what models answer, and how training changes it.")
        print("\n`tokenmdp behaviours write --help` shows the options of one.")
        return 0
    if what not in KINDS:
        raise ValueError(f"tokenmdp behaviours {what!r} is none of {', '.join(KINDS)}")
    options: Any = parse(KINDS[what], f"behaviours {what}", rest)
    actions: dict[str, Callable[[Any], int]] = {"write": _write, "answer": _answer, "compare": _compare}
    return actions[what](options)


def _write(options: WriteOptions) -> int:
    console = make_console()
    check_directory(options.out.parent)
    if options.labels:
        behaviours.join_labels(options.out, options.labels, console)
        return 0
    if options.stems is None:
        raise ValueError("--stems is missing: pass a stem file, or --labels with answers to the page of --out")
    check_numbers(options, candidates=2, questions=2, max_new_tokens=1, ask=0)
    given = {one.name: getattr(options, one.name) for one in fields(behaviours.Writing)}
    behaviours.write(behaviours.Writing(**given), console)
    return 0


def _answer(options: AnswerOptions) -> int:
    console = make_console()
    if not options.sets:
        raise ValueError("tokenmdp behaviours answer needs at least one file of questions")
    check_file(options.out, "--out", "answers.jsonl")
    sets = [Questions.load(path) for path in options.sets]
    policy, _ = open_source(options.policy)
    answered = answer_all(policy, sets, resolve_device(options.device))
    table = Table(
        title=f"answers of {options.policy}",
        caption="mean P(match), and the share of questions whose likeliest answer matches [95% intervals]; constant: "
        "the share of the best answer that is always the same",
    )
    table.add_column("set")
    for heading in ("questions", "P(match)", "chosen", "constant"):
        table.add_column(heading, justify="right", no_wrap=True)
    for questions, one in zip(sets, answered, strict=True):
        constant = questions.constant_score
        shown_constant = "" if constant is None else f"{constant:.2f}"
        table.add_row(one.name, str(len(questions)), str(one.score), str(one.chosen), shown_constant)
    console.print(table)
    if options.out is not None:
        lines = [
            {"set": one.name, "question": item.question, "answers": item.answers, "logprobs": values}
            for questions, one in zip(sets, answered, strict=True)
            for item, values in zip(questions.items, one.logprobs, strict=True)
        ]
        write_text(options.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        console.print(f"log-likelihoods: {options.out}", highlight=False, soft_wrap=True)
    return 0


def _compare(options: CompareOptions) -> int:
    console = make_console()
    if not options.sources:
        raise ValueError(
            "tokenmdp behaviours compare needs at least one source: a run, a pipeline, a model or a directory"
        )
    check_numbers(options, samples=2, max_new_tokens=1)
    check_directory(options.out)
    refuse_strangers(options.out / "measured", "a comparison")
    sets = [Questions.load(path) for path in options.set]
    names = [POSITIVITY, REPETITION, *(one.name for one in sets)]
    if len(set(names)) < len(names):
        raise ValueError(f"two measures have one name ({', '.join(names)}); rename the file of a set")
    sources = sources_of(options.sources)
    start, _ = open_source(options.start)
    settings = settings_for(
        options.start, options.judge, options.align, options.max_new_tokens, resolve_device(options.device)
    )
    policies = compare(sources, sets, start, settings, options.samples, options.out, console)
    console.print(_table(policies, names))
    captions = {
        POSITIVITY: f"Mean probability, by {options.judge}, that a response to a held-out prompt is positive.",
        REPETITION: f"Mean share of a response's three-token sequences that another of the {options.samples} has too.",
    }
    captions |= {
        one.name: f"Mean P(match) over the {len(one)} questions of {one.name}; dotted: no preference." for one in sets
    }
    levels = {one.name: sum(1 / len(item.answers) for item in one.items) / len(one) for one in sets}
    note = f"{options.samples} responses per policy, start {options.start}; bars are 95% intervals."
    captions = {name: f"{text} Bars are 95% intervals." for name, text in captions.items()}
    page = behaviours_page.write_page(
        options.out, Comparison("Behaviour over training", note, policies, captions, levels)
    )
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return 0


def _table(policies: Sequence[Policy], names: Sequence[str]) -> Table:
    table = Table(
        title="behaviour over training", caption="means [95% intervals]; KL to the start in nats per sequence"
    )
    table.add_column("", no_wrap=True)
    for heading in ("KL", *names):
        table.add_column(heading, justify="right", overflow="fold")
    for one in policies:
        table.add_row(shown(one), str(one.kl), *(str(measure.value) for measure in one.measures))
    return table
