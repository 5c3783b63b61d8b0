"""Demonstrations, what supervised fine-tuning learns from: responses to imitate, of files and data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmdp.models.encoding import continuing_ids, opening_ids, plain_ids, start_ids
from tokenmdp.preferences.errors import EmptyText, MissingColumns
from tokenmdp.preferences.jsonl import check_texts, columns_of, ids_in, read_file
from tokenmdp.preferences.records import Ids, check_ids
from tokenmdp.preferences.tables import End, check_reading, rows_from
from tokenmdp.text_files import lines_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = "text; prompt and completion; prompt and response; prompt and chosen"


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt and the response to imitate, in tokens.

    Raises:
        EmptyText: one has no tokens.
    """

    prompt_ids: Ids
    response_ids: Ids

    def __post_init__(self) -> None:
        check_ids("the prompt", self.prompt_ids)
        check_ids("the response", self.response_ids)


def read_demonstrations(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end: End = "append",
    split: str = "train",
    max_tokens: int = 128,
) -> list[Demonstration]:
    """Demonstrations of any source: rows with text, with prompt and completion, or with comparisons' better half.

    Token ids (``prompt_token_ids``, ``chosen_token_ids``) are taken exactly. A text without a prompt is a response to
    the start-of-text token, or to its own first token where the tokenizer has none; it is cut into pieces of
    ``max_tokens``, so that nothing of it is lost.

    Args:
        source: A file, directory or data set, as in `tokenmdp.preferences.read_preferences`, or a ``.txt`` file with
            one text per line.
        tokenizer: Of the model that is to learn from them.
        end: Whether a response that comes as a plain text gets an end-of-text token.
        split: Of a directory or a data set.
        max_tokens: The longest response; longer ones with a prompt are cut there, and teach no end.

    Raises:
        BadPreferences: a row that cannot be used, named by file and line.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; a text needs at least 2")
    found: list[Demonstration] = []
    for where, row in _rows(source, split):
        found += _demonstrations(row, where, tokenizer, end, max_tokens)
    if not found:
        raise EmptyText(f"{source} holds no texts; give at least one")
    return found


def _rows(source: str | Path, split: str) -> Any:
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        lines = lines_of(read_file(path))
        return ((f"{path}, line {number}", {"text": line}) for number, line in enumerate(lines, start=1) if line)
    return rows_from(source, split)


def _demonstrations(
    row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, end: End, max_tokens: int
) -> list[Demonstration]:
    eos = tokenizer.eos_token_id
    ending = () if end == "leave" or eos is None else (eos,)
    answer = next((name for name in ("completion", "response", "chosen") if row.get(name) is not None), None)
    if answer is not None and row.get("prompt") is not None:
        known, texts = ids_in(row, ("prompt", answer), where), (row["prompt"], row[answer])
        if len(known) == 2:
            prompt, response = known["prompt"], known[answer]
            check_texts(texts, where)
            check_reading(tokenizer, texts, (prompt, response), where)
        else:
            if not all(isinstance(text, str) and text for text in texts):
                raise EmptyText(
                    f"{where}: prompt and {answer} are texts that are not empty; leave this row out, or write chats as "
                    "texts with the tokenizer's template first"
                )
            check_texts(texts, where)
            prompt = tuple(opening_ids(tokenizer, texts[0], start_ids(tokenizer)))
            response = (*continuing_ids(tokenizer, texts[1]), *ending)
        return [Demonstration(prompt_ids=prompt, response_ids=response[:max_tokens])]
    if not isinstance(text := row.get("text"), str):
        raise MissingColumns(f"{where} has the columns {columns_of(row)}; a demonstration has {FORMS}")
    check_texts([text], where)
    ids = [*plain_ids(tokenizer, text), *ending]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if len(ids) < 2:
        return []
    # The last token of a piece is the prompt of the next one: every token is predicted once.
    return [
        Demonstration(prompt_ids=(ids[start],), response_ids=tuple(ids[start + 1 : start + 1 + max_tokens]))
        for start in range(0, len(ids) - 1, max_tokens)
    ]
