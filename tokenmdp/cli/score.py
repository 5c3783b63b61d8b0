"""``tokenmdp score``: the credit of every token of a text, by one method or by all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmdp.cli.checks import check_page
from tokenmdp.cli.options import AllOrOne, ScoreChoice, parse
from tokenmdp.credit import CREDIT_METHODS, CreditMethod
from tokenmdp.envs.rendering import SEPARATOR
from tokenmdp.evaluation.credit_quality import Counted, PolicyAccess, run_counted
from tokenmdp.evaluation.credit_quality.tables import cost_of
from tokenmdp.evaluation.credit_quality.texts import encode, episodes_of
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import token_pieces
from tokenmdp.report import comparison, heatmap
from tokenmdp.report.comparison import refusals
from tokenmdp.report.samples import Sample
from tokenmdp.reward_models import RewardModel, load_reward_model
from tokenmdp.reward_models.scores import read_score
from tokenmdp.runs.credit_options import credit_method, credit_methods, declared, grouped_options, policy_access
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.settings import parse_options
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ALL = "all"


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
    score: ScoreChoice = None
    """Default: by its labels."""
    tokenizer: str | None = None
    """Bundled name, directory or hub name. Default: the reward model's."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    html: Path | None = None
    """Also write a page with the numbers to this file."""


class Scored(NamedTuple):
    """One text with what credit methods need to read it."""

    episode: Episode  # N = 1
    prompt: str
    tokens: list[str]
    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    access: PolicyAccess

    def run(self, method: CreditMethod) -> Counted:
        """The credit of its tokens, (1, T)."""
        return run_counted(method, self.episode, self.model, self.tokenizer, self.access)


def main(arguments: Sequence[str]) -> int:
    """Parse and score; returns the exit status."""
    return score(parse(Score, "score", arguments))


def score(arguments: Score) -> int:
    """Score a text and show the credit of each of its tokens."""
    console = make_console()
    check_page(arguments.html)
    device = resolve_device(arguments.device)
    given = parse_options(arguments.credit_option, "--credit-option")
    if arguments.credit == ALL:
        options = grouped_options(given, "--credit-option")
        methods, missing = credit_methods(tuple(CREDIT_METHODS), options, arguments.credit_beta, "--credit-option")
        scored = _read(arguments, device, frozenset().union(*(method.needs for method in methods.values())))
        return _score_all(console, arguments, scored, methods, missing)
    method = credit_method(arguments.credit, {"credit_beta": arguments.credit_beta, **given})
    scored = _read(arguments, device, method.needs)
    counted = scored.run(method)
    credits = counted.credit.token_rewards[0].tolist()
    item = Sample(scored.prompt, scored.tokens, credits, counted.score.item())
    _print_text(console, scored, credits)
    console.print(token_table(item))
    relation = " = sum of the credits" if method.conserves_return else "; the credits sum to"
    console.print(f"score {item.score:+.4f}{relation} {sum(credits):+.4f}", highlight=False)
    if scored.model.meaning:
        console.print(f"the score is {scored.model.meaning}", style="dim", highlight=False)
    report = counted.credit.report
    if "attention_mass" in report:
        # A share of one row only where the method reads one: abc-d averages columns, heads="max" takes maxima.
        rest = " (the rest is on the prompt)" if arguments.prompt else ""
        share = f" of the row{rest}" if "attention" in method.needs else ""
        mass = report["attention_mass"].item()
        console.print(f"attention mass on the text: {mass:.3f}{share}", highlight=False)
        if report["credit_fallback"].item():
            console.print("that is below the floor, so the credit is uniform", style="bold")
        console.print("attention credit has the score's sign: how much a token mattered, not which way", style="dim")
    if arguments.html is not None:
        title = f"Token credit: {arguments.credit}"
        page = heatmap.html({arguments.reward_model: [item]}, arguments.html, title=title)
        console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return 0


def _read(arguments: Score, device: str, needs: frozenset[str]) -> Scored:
    """The text in tokens, the reward model and the policies that ``needs`` name.

    Raises:
        ValueError: the text has no tokens, or the reward model no tokenizer.
    """
    name = arguments.reward_model
    model = load_reward_model(name, device=device, score=read_score(arguments.score))
    tokenizer = model.tokenizer if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    if tokenizer is None:
        raise ValueError(f"the reward model {name!r} has no tokenizer files; pass --tokenizer")
    text = encode(tokenizer, arguments.text, arguments.prompt)
    episode = episodes_of([text])
    access = policy_access(arguments.policy, tokenizer, episode.prompt_slots, len(text.ids), device, needs)
    prompt, tokens = token_pieces(tokenizer, text.ids, text.prompt_ids)
    return Scored(episode, prompt, tokens, model, tokenizer, access)


def _score_all(
    console: Console,
    arguments: Score,
    scored: Scored,
    methods: Mapping[str, CreditMethod],
    missing: dict[str, str],
) -> int:
    columns, rows = {}, []
    score = scored.run(methods["sparse"]).score.item()  # which every reward model can give
    for name, method in methods.items():
        try:
            counted = scored.run(method)
        except ValueError as error:  # MissingResource, or what the reward model does not provide
            missing[name] = str(error)
            continue
        columns[name] = counted.credit.token_rewards[0].tolist()
        facts = declared(name, cost_of(counted.reward_forwards, counted.policy_forwards))
        rows.append(comparison.MethodRow(name, columns[name], facts))
    _print_text(console, scored, None)
    for table in method_tables(scored.tokens, columns, console.width):
        console.print(table)
    console.print(f"score {score:+.4f}; colours by the largest |credit| of each column", highlight=False)
    for line in refusals(missing):
        console.print(line, highlight=False)
    if arguments.html is not None:
        text = comparison.Comparison(scored.prompt, scored.tokens, score, rows, missing=missing)
        note = f"Reward model {arguments.reward_model}; cost in reward-model forwards, counted."
        page = comparison.html([text], arguments.html, title="Credit methods, token by token", note=note)
        console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return 0


def _print_text(console: Console, scored: Scored, credits: Sequence[float] | None) -> None:
    prompt = scored.prompt and scored.prompt + SEPARATOR
    if credits is None:
        console.print(Text(heatmap.printable(prompt + "".join(scored.tokens))), soft_wrap=True)
    else:
        console.print(heatmap.terminal(scored.tokens, credits, prompt=prompt), soft_wrap=True)


def token_table(item: Sample) -> Table:
    """Token, credit and share of the score, one row per token."""
    table = Table()
    table.add_column("#", justify="right")
    table.add_column("token")
    table.add_column("credit", justify="right")
    table.add_column("share", justify="right")
    scale = heatmap.credit_scale([item.credits])
    shares: Sequence[str] = [f"{credit / item.score:.1%}" if item.score else "-" for credit in item.credits]
    for place, (piece, credit, share) in enumerate(zip(item.tokens, item.credits, shares, strict=True), start=1):
        table.add_row(
            str(place), heatmap.terminal([piece], [credit], scale=scale), f"{round(credit, 4) + 0.0:+.4f}", share
        )
    return table


def method_tables(tokens: Sequence[str], columns: Mapping[str, Sequence[float]], width: int) -> list[Table]:
    """A row per token and a column per method, in as many tables as ``width`` characters need."""
    first = 7 + max(max(len(heatmap.printable(token)) for token in tokens), len("token"))
    groups: list[list[str]] = []
    room = 0
    for name in columns:
        needed = 3 + max(7, *(len(part) + 1 for part in name.split("-")))
        if not groups or needed > room:
            groups.append([])
            room = width - first - 2
        groups[-1].append(name)
        room -= needed
    tables = []
    for names in groups:
        table = Table()
        table.add_column("#", justify="right")
        table.add_column("token", no_wrap=True)
        for name in names:
            table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
        scales = [heatmap.credit_scale([columns[name]]) for name in names]
        for place, token in enumerate(tokens):
            cells = [
                heatmap.terminal([f"{round(columns[name][place], 2) + 0.0:+.2f}"], [columns[name][place]], scale=scale)
                for name, scale in zip(names, scales, strict=True)
            ]
            table.add_row(str(place + 1), heatmap.printable(token), *cells)
        tables.append(table)
    return tables
