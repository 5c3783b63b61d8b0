"""Comparisons of others: Hugging Face data sets, local files and directories, with or without token ids.

A row has ``chosen`` and ``rejected``, and ``prompt`` unless it is implicit; or ``prompt``, ``responses`` and ``ranks``,
or ratings in ``scores`` that rank them. Texts are strings, or chats: lists of ``{"role": ..., "content": ...}``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym

from tokenmdp.models.encoding import is_chat, start_ids
from tokenmdp.models.tokens import VocabularyMismatch, response_texts
from tokenmdp.preferences.errors import BadPreferences, DifferentPrompts, EmptyText, MissingColumns, NoChatTemplate
from tokenmdp.preferences.growing import check_finished
from tokenmdp.preferences.jsonl import (
    TEXTS,
    build_record,
    check_texts,
    columns_of,
    ids_in,
    read_file,
    record_from,
    rows_of,
)
from tokenmdp.preferences.records import Comparison, Preference, Ranking, check_vocabulary
from tokenmdp.text_files import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

End = Literal["append", "leave"]
Chat = list[dict[str, Any]]
SUFFIXES = (".jsonl", ".json", ".parquet")

logger = logging.getLogger(__name__)


def read_preferences(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, end: End = "append", split: str = "train"
) -> list[Preference]:
    """Comparisons and rankings of any source, with the token ids of a model.

    Where a row has token ids, they are taken exactly. Where it has texts, prompt and response are encoded one by one,
    the prompt behind what the tokenizer puts before every text, such as <s>, as the environments encode prompts. A chat
    is written by the tokenizer's template.

    Args:
        source: A ``.jsonl``, ``.json`` (a list of rows) or ``.parquet`` file; a directory with such files, those named
            after ``split`` if there are any; else the name of a data set on the hub.
        tokenizer: Of the model that is to learn from them.
        end: Whether a response that comes as a plain text gets an end-of-text token: "append" where it has none, or
            "leave". Chats end as their template says, and ids as they are.
        split: Of a directory or a data set.

    Raises:
        BadPreferences: a row that cannot be used, named by file and line; its classes say what is wrong.
        VocabularyMismatch: ids that another tokenizer wrote.
        gymnasium.error.DependencyNotInstalled: the source needs the extra ``datasets``.
        FileNotFoundError: nothing has this name.
    """
    if end not in ("append", "leave"):
        raise ValueError(f"end={end!r} is neither 'append' nor 'leave'")
    if end == "append" and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to append; pass end='leave'")
    reader = _Reader(tokenizer, end)
    records = [reader.record(row, where) for where, row in rows_from(source, split)]
    if not records:
        raise BadPreferences(f"{source} holds no comparisons; give at least one")
    rule = "with" if end == "append" else "without"
    logger.info(
        "%s: %d records, %d with token ids of their own; of %d responses that came as plain text %d got an end-of-text "
        "token (end=%r: text is read %s one)",
        source, len(records), reader.with_ids, reader.plain, reader.appended, end, rule,
    )  # fmt: skip
    return records


def rows_from(source: str | Path, split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the columns of every row of a source; see `read_preferences`."""
    if not str(source):
        raise MissingColumns("the source of the data is ''; give a file, a directory or a data-set name")
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and ".run" not in file.suffixes)
        named = [file for file in files if file.stem == split or file.name.startswith(f"{split}-")]
        if not (named or files):
            raise FileNotFoundError(f"{path} holds no {', '.join(SUFFIXES)} files")
        for file in named or files:
            yield from _rows_of_file(file)
    elif path.is_file():
        yield from _rows_of_file(path)
    elif path.suffix in SUFFIXES:
        raise FileNotFoundError(f"no file {path}; give one that exists, or the name of a data set")
    else:
        yield from _rows_of_data_set(str(source), split)


def _rows_of_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        check_finished(path)
        yield from rows_of(path)
    elif path.suffix == ".json":
        try:
            rows = parse_json(read_file(path), str(path))
        except ValueError as error:
            raise MissingColumns(f"{error}; a .json file holds a list of rows") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise MissingColumns(f"{path} is not a list of rows; JSON lines belong in a .jsonl file")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    elif path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise _needs_extra(path) from error
        try:
            rows = parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise MissingColumns(f"{path} is not a parquet file, or a damaged one ({error})") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        raise MissingColumns(f"{path} is not a file that comparisons are read from: {', '.join(SUFFIXES)}")


def _rows_of_data_set(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise _needs_extra(name) from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many unrelated types
        raise FileNotFoundError(
            f"no file or directory {name!r}, and the data set of that name (split {split!r}) could not be loaded "
            f"({type(error).__name__}: {error!s:.200}); download it with `hf download {name} --repo-type dataset "
            "--local-dir DIR` and pass DIR"
        ) from error
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(table, start=1))


def _needs_extra(source: object) -> gym.error.DependencyNotInstalled:
    return gym.error.DependencyNotInstalled(f"reading {str(source)!r} needs: pip install 'tokenmdp[datasets]'")


def check_reading(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ids: Sequence[tuple[int, ...]], where: str
) -> None:
    """Refuse ids beyond the vocabulary, and ids that this tokenizer reads as another text.

    Args:
        tokenizer: Of the model that is to learn from them.
        texts: A prompt and its responses.
        ids: Of each of them.
        where: The place, for messages.

    Raises:
        UnknownTokenIds, VocabularyMismatch: with the place.
    """
    for one in ids:
        check_vocabulary(one, len(tokenizer), where)
    prompt, read = response_texts(tokenizer, ids[0], ids[1:])
    for text, other, one in zip(texts, (prompt, *read), ids, strict=True):
        if text == other:  # as sampled texts are
            continue
        again = tuple(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        if again not in (one, one[:-1] if one[-1:] == (tokenizer.eos_token_id,) else one):  # as texts of others are
            raise VocabularyMismatch(
                f"{where}: this tokenizer reads the token ids of {text!r:.80} as {other!r:.80}, so another one wrote "
                "them; pass that one, or a file without token ids"
            )


class _Reader:
    """From rows to records with one tokenizer; counts what it did."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: End) -> None:
        self.tokenizer, self.end, self.start = tokenizer, end, tuple(start_ids(tokenizer))
        self.with_ids = self.plain = self.appended = 0

    def record(self, row: Mapping[str, Any], where: str) -> Preference:
        names = ("prompt", "responses") if row.get("responses") is not None else TEXTS
        if names == TEXTS and (missing := [name for name in TEXTS[1:] if row.get(name) is None]):
            raise MissingColumns(
                f"{where} has no column {' and no column '.join(missing)}; it has {columns_of(row)}. A comparison "
                "needs chosen and rejected (and prompt, unless it is their shared start), a ranking prompt, responses "
                "and ranks"
            )
        if names != TEXTS and not isinstance(row["responses"], list):
            raise MissingColumns(f"{where}: responses is {row['responses']!r:.80}; it is a list of texts")
        if names != TEXTS and row.get("ranks") is None and row.get("scores"):
            if not isinstance(row["scores"], list) or not all(isinstance(one, (int, float)) for one in row["scores"]):
                raise MissingColumns(f"{where}: scores is {row['scores']!r:.80}; it is a list of numbers")
            row = {**row, "ranks": [1 + sum(other > one for other in row["scores"]) for one in row["scores"]]}
        ids = ids_in(row, names, where)
        if set(ids) == set(names):
            self.with_ids += 1
            record = record_from(row, where)
            if isinstance(record, Comparison):
                texts, known = [record.chosen, record.rejected], [record.chosen_ids, record.rejected_ids]
            else:
                texts, known = list(record.responses), list(record.responses_ids)
            check_reading(self.tokenizer, [record.prompt, *texts], [record.prompt_ids, *known], where)
        else:
            if names != TEXTS and row.get("prompt") is None:
                raise MissingColumns(f"{where} has responses and no column prompt; it has {columns_of(row)}")
            record = self._encoded(row, where)
        if not isinstance(record, Comparison | Ranking):
            raise MissingColumns(f"{where} has responses and no column ranks; it has {columns_of(row)}")
        return record

    def _encoded(self, row: Mapping[str, Any], where: str) -> Any:
        many = row.get("responses") is not None
        answers = list(row["responses"]) if many else [row["chosen"], row["rejected"]]
        chat = any(not isinstance(answer, str) for answer in answers)
        split = self._split_chats if chat else _split_texts
        prompt, texts = split(row.get("prompt"), answers, where)
        check_texts((prompt, *texts), where)
        prompt_ids, *ids = [self._ids(text, where) for text in (prompt, *texts)]
        if not chat:
            if prompt_ids[: len(self.start)] != self.start:
                prompt_ids = (*self.start, *prompt_ids)
            ids = [self._ended(one) for one in ids]
        parts: tuple[dict[str, Any], dict[str, Any]]
        if many:
            parts = {"prompt": prompt, "responses": texts}, {"prompt": prompt_ids, "responses": ids}
        else:
            parts = (dict(zip(TEXTS, (prompt, *texts), strict=True)), dict(zip(TEXTS, (prompt_ids, *ids), strict=True)))
        return build_record(row, *parts, where)

    def _ids(self, text: str, where: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        if not ids:
            raise EmptyText(f"{where}: a prompt or a response is empty ({text!r} has no tokens); leave this row out")
        return ids

    def _ended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        self.plain += 1
        eos = self.tokenizer.eos_token_id
        if self.end == "leave" or ids[-1] == eos:
            return ids
        self.appended += 1
        return (*ids, eos)

    def _split_chats(self, prompt: Any, answers: list[Any], where: str) -> tuple[str, list[str]]:
        """Chats as texts. The prompt is given, or the first messages that all answers share."""
        if not all(map(is_chat, answers)) or (isinstance(prompt, list) and not is_chat(prompt)):
            raise EmptyText(
                f"{where}: a chat is a list of messages with role and content, and one is empty or "
                "something else; leave this row out"
            )
        if not self.tokenizer.chat_template:
            raise NoChatTemplate(
                f"{where} holds chat messages, and the tokenizer has no chat template; set tokenizer.chat_template, or "
                "pass prompts and responses as texts"
            )
        start: Chat = prompt if isinstance(prompt, list) else _shared(answers)
        if not start:
            raise DifferentPrompts(f"{where}: the chats share no first message, so there is no prompt; add one")
        given = isinstance(prompt, list) and any(answer[: len(start)] != start for answer in answers)
        chats = [[*start, *answer] if given else answer for answer in answers]
        from jinja2 import TemplateError

        try:
            written = str(self.tokenizer.apply_chat_template(start, tokenize=False, add_generation_prompt=True))
            texts = [str(self.tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise NoChatTemplate(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error
        for text in texts:
            if not text.startswith(written):
                raise NoChatTemplate(
                    f"{where}: the chat template writes the prompt alone as {written!r:.120} and before its answer as "
                    f"{text[: len(written)]!r:.120}; use a template that begins both the same way"
                )
        return written, [text[len(written) :] for text in texts]


def _shared(chats: list[Chat]) -> Chat:
    start = []
    for messages in zip(*chats, strict=False):
        if any(message != messages[0] for message in messages):
            break
        start.append(messages[0])
    # Where one chat is the start of another, its last message is its answer.
    return start[: min(map(len, chats)) - 1]


def _split_texts(prompt: Any, answers: list[str], where: str) -> tuple[str, list[str]]:
    """Prompt and responses. An implicit prompt is the longest shared start, less a blank at its end, as in TRL."""
    if prompt is not None:
        if not isinstance(prompt, str):
            raise MissingColumns(f"{where}: the prompt is {type(prompt).__name__} and the responses are texts")
        return prompt, answers
    length = 0
    for one, *others in zip(*answers, strict=False):
        if any(other != one for other in others):
            break
        length += 1
    start = answers[0][:length]
    start = start.removesuffix(" ")  # which belongs to the words that follow
    if not start:
        raise DifferentPrompts(
            f"{where} has no column prompt, and chosen and rejected share no start; add the column, with the text that "
            "both answer"
        )
    return start, [answer[len(start) :] for answer in answers]
