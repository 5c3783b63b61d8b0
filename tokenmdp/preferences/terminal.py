"""A person compares pairs in the terminal; every answer is on the disk at once, so stopping loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tokenmdp.preferences.errors import OtherPairs
from tokenmdp.preferences.people import Answer, Answers, Questionnaire, read_answers
from tokenmdp.report.heatmap import printable

KEYS = {"a": "A", "b": "B", "t": "tie", "s": "skip"}
HELP = "a: A is better · b: B is better · t: tie · s: skip · u: undo · q: stop for now"


def ask(
    questionnaire: Questionnaire,
    path: Path,
    annotator: str,
    console: Console,
    read: Callable[[str], str] = input,
) -> Answers:
    """Ask all questions that are still open, and keep the answers in a file.

    Args:
        questionnaire: What to ask.
        path: Of the answers; those in it are not asked again.
        annotator: Who answers.
        console: Shows the texts, control characters as visible marks.
        read: Shows its argument and gives a line back; `EOFError` stops, as q does.

    Raises:
        OtherPairs: the file holds answers to other pairs, or another person's.
    """
    given: list[Answer] = []
    if path.exists():
        known = read_answers(path, questionnaire)
        if known.annotator != annotator:
            raise OtherPairs(
                f"{path} holds the answers of {known.annotator!r}, not of {annotator!r}; choose another --out"
            )
        given = list(known.answers)
    total = len(questionnaire.questions)
    console.print(HELP, style="dim")
    while True:
        answered = {answer.question for answer in given}
        place = next((place for place in range(total) if place not in answered), None)
        if place is not None:
            _show(console, questionnaire, place, len(given))
        try:
            key = read("> " if place is not None else "all answered; Enter ends, u undoes > ").strip().lower()
        except EOFError:
            break
        if key == "q" or (key == "" and place is None):
            break
        if key == "u" and given:
            given.pop()
        elif key in KEYS and place is not None:
            given.append(Answer(place, KEYS[key], now()))
        else:
            console.print(HELP, style="dim")
            continue
        Answers(questionnaire.digest, annotator, tuple(given)).save(path)
    return Answers(questionnaire.digest, annotator, tuple(given))


def now() -> str:
    """The time in UTC, to the second, as in ``2026-01-31T12:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _show(console: Console, questionnaire: Questionnaire, place: int, answered: int) -> None:
    prompt, left, right = map(printable, questionnaire.shown(place))
    console.print(f"\n{answered + 1} of {len(questionnaire.questions)}", style="bold", highlight=False)
    for name, text in (("", prompt), ("A", left), ("B", right)):
        console.print(Text.assemble((f"{name:<3}", "bold"), text), soft_wrap=True)
