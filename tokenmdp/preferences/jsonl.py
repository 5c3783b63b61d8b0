"""Groups, comparisons and rankings as JSON lines: text and token ids together, one record per line.

    comparison  prompt, chosen, rejected, prompt_token_ids, chosen_token_ids, rejected_token_ids; and where they are
                known score_chosen, score_rejected, margin, probability, annotator, annotated_at, kind
    ranking     prompt, responses, prompt_token_ids, responses_token_ids, ranks; and where they are known scores,
                annotator, annotated_at, kind
    group       as a ranking, without ranks

The ids are not called chosen_ids and rejected_ids: TRL's reward trainer takes these for whole texts in tokens, prompt
included, and would train on responses without their prompts. It takes the texts of these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmdp.files import write_text
from tokenmdp.models.tokens import check_text
from tokenmdp.preferences.errors import BadPreferences, Interrupted, MissingColumns
from tokenmdp.preferences.records import Comparison, Group, Preference, Ranking
from tokenmdp.text_files import lines_of, parse_json, read_text

IDS = "_token_ids"
TEXTS = ("prompt", "chosen", "rejected")
NUMBERS = ("score_chosen", "score_rejected", "margin", "probability")
FACTS = ("annotator", "annotated_at", "kind")


def as_row(record: Preference | Group) -> dict[str, Any]:
    """A record as one line's columns; what is not known is left out.

    >>> pair = Comparison(
    ...     prompt="a", chosen=" good", rejected=" bad", prompt_ids=(1,), chosen_ids=(19,), rejected_ids=(24,)
    ... )
    >>> as_row(pair)["chosen_token_ids"], "annotator" in as_row(pair)
    ([19], False)
    """
    if isinstance(record, Comparison):
        row: dict[str, Any] = {name: getattr(record, name) for name in TEXTS}
        row |= {f"{name}{IDS}": list(getattr(record, f"{name}_ids")) for name in TEXTS}
        row |= {name: getattr(record, name) for name in NUMBERS if getattr(record, name) is not None}
    else:
        row = {
            "prompt": record.prompt,
            "responses": list(record.responses),
            f"prompt{IDS}": list(record.prompt_ids),
            f"responses{IDS}": [list(ids) for ids in record.responses_ids],
        }
        if isinstance(record, Ranking):
            row["ranks"] = list(record.ranks)
        if record.scores:
            row["scores"] = list(record.scores)
    return row | {name: value for name in FACTS if (value := getattr(record, name, None))}


def text_of(records: Iterable[Preference | Group]) -> str:
    """One line per record, each with its line break."""
    # allow_nan would write NaN, which is not JSON; records refuse it already.
    return "".join(json.dumps(as_row(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def write_records(path: str | Path, records: Iterable[Preference | Group]) -> None:
    """Write a file in one step: a reader sees the old one or the new one."""
    write_text(path, text_of(records))


def rows_of(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, such as "pairs.jsonl:3", and its columns; empty lines are left out.

    Raises:
        Interrupted: the last line has no end and is not JSON, so its writer was stopped.
        MissingColumns: a line is not a JSON object, or the file is not text.
    """
    text = read_file(path)
    lines = lines_of(text)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = parse_json(line.removeprefix("\ufeff"), place)
        except ValueError as error:
            if number == len(lines) and not text.endswith(("\n", "\r")):
                raise Interrupted(
                    f"{place} ends in the middle of a line: what wrote it was interrupted; run the same command to go "
                    "on, or delete the line"
                ) from error
            raise MissingColumns(f"{error}; each line is one JSON object") from error
        if not isinstance(row, dict):
            raise MissingColumns(f"{place} is {type(row).__name__}; each line is one JSON object")
        yield place, row


def read_file(path: str | Path) -> str:
    """The text of a file.

    Raises:
        MissingColumns: it is binary, or in an encoding that nothing tells.
    """
    try:
        return read_text(Path(path))
    except ValueError as error:
        raise MissingColumns(str(error)) from error


def columns_of(row: Mapping[str, Any]) -> str:
    """The names of the columns that hold something, for messages."""
    return ", ".join(str(name) for name, value in row.items() if value is not None) or "none"


def check_texts(texts: Iterable[Any], where: str) -> None:
    """Refuse what no tokenizer reads: something else than texts, and halves of surrogate pairs.

    Raises:
        MissingColumns: with the place.
    """
    for text in texts:
        if not isinstance(text, str):
            raise MissingColumns(f"{where}: {text!r:.80} stands where a text is needed; give a text, or leave it out")
        try:
            check_text(text, where)
        except ValueError as error:
            raise MissingColumns(str(error)) from error


def read_records(path: str | Path) -> list[Preference]:
    """Comparisons and rankings with their token ids, exactly as they were written.

    Files without ids need a tokenizer: `tokenmdp.preferences.read_preferences`.

    Raises:
        BadPreferences: a line that is none, named by file and line; its classes say what is wrong.
    """
    records: list[Preference] = []
    for where, row in rows_of(path):
        record = record_from(row, where)
        if not isinstance(record, Comparison | Ranking):
            raise MissingColumns(f"{where} has no ranks, so nothing is compared yet; judge the groups first")
        records.append(record)
    return records


def read_groups(path: str | Path) -> list[Group]:
    """Groups with their token ids; ranks, where a line has some, are kept.

    Raises:
        BadPreferences: as for `read_records`.
    """
    groups: list[Group] = []
    for where, row in rows_of(path):
        record = record_from(row, where)
        if isinstance(record, Comparison):
            raise MissingColumns(f"{where} is a comparison, a group has the columns prompt and responses")
        groups.append(record)
    return groups


def record_from(row: Mapping[str, Any], where: str) -> Preference | Group:
    """The record of one row that has token ids.

    Args:
        row: The columns.
        where: The place, for messages.
    """
    names = ("prompt", "responses") if "responses" in row else TEXTS
    ids = ids_in(row, names, where)
    if missing := [name for name in names if name not in row or name not in ids]:
        columns = ", ".join([*missing, *(f"{name}{IDS}" for name in missing)])
        raise MissingColumns(f"{where} lacks some of the columns {columns}; it has {', '.join(row)}")
    return build_record(row, {name: row[name] for name in names}, ids, where)


def ids_in(row: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """The token ids that a row has for ``names``, as tuples; ``*_ids`` counts too, if the prompt has its own.

    Raises:
        MissingColumns: a column of ids that holds something else.
    """
    endings = (IDS, "_ids") if "prompt_ids" in row else (IDS,)
    found = {}
    for name in names:
        column = next((f"{name}{ending}" for ending in endings if row.get(f"{name}{ending}") is not None), None)
        if column is not None:
            value = row[column]
            nested = name == "responses" and isinstance(value, list)
            found[name] = tuple(_ids(one, where, column) for one in value) if nested else _ids(value, where, column)
    return found


def _ids(value: Any, where: str, column: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or any(isinstance(one, bool) or not isinstance(one, int) for one in value):
        raise MissingColumns(f"{where}: {column} is {value!r:.80}; it is a list of token ids")
    return tuple(value)


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MissingColumns(f"{column} is {value!r:.80}; give one number, or leave the column out")
    try:
        return float(value)
    except OverflowError as error:
        raise MissingColumns(f"{column} is too large: {value!r:.20}...") from error


def build_record(row: Mapping[str, Any], texts: Mapping[str, Any], ids: Mapping[str, Any], where: str) -> Any:
    """A record of given texts and ids, with the other columns of its row; errors name the place."""
    check_texts([one for value in texts.values() for one in (value if isinstance(value, list) else [value])], where)
    try:
        facts: dict[str, Any] = {name: row[name] for name in FACTS if row.get(name)}
        if "responses" not in texts:
            numbers: dict[str, Any] = {name: _number(row[name], name) for name in NUMBERS if row.get(name) is not None}
            return Comparison(**texts, **{f"{name}_ids": value for name, value in ids.items()}, **numbers, **facts)
        whole: dict[str, Any] = {
            "prompt": texts["prompt"],
            "responses": tuple(texts["responses"]),
            "prompt_ids": ids["prompt"],
            "responses_ids": tuple(ids["responses"]),
            "scores": tuple(float(score) for score in row.get("scores") or ()),
        }
        if row.get("ranks") is None:
            return Group(**whole, kind=facts.get("kind", ""))
        return Ranking(**whole, ranks=tuple(row["ranks"]), **facts)
    except BadPreferences as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise MissingColumns(f"{where}: a column holds something of another kind ({error})") from error
