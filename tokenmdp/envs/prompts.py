"""Prompt sources: the bundle, a list, a file, or a data set of texts.

Given prompts (a list, a file, the bundle) are used whole. Data-set sources hold texts such as reviews: a prompt is the
first k tokens of one of them, k uniform in ``prompt_tokens``, as in Chan et al. (ICML 2024), section 5.1.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from tokenmdp.envs.text_rows import FILE_SUFFIXES, Prompts, read_rows
from tokenmdp.envs.text_sets import rows_of_name, rows_of_object
from tokenmdp.models.encoding import chat_ids, is_chat, opening_ids, vocab_size
from tokenmdp.models.names import resolve
from tokenmdp.models.tokens import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TEXT_CHARACTERS = 200  # shorter reviews give openings that already end; the paper drops them too
LINE_BREAKS = re.compile(r"(?:<br\s*/?>\s*)+")

Truncate = Literal["left", "right"]


class NoPrompt(TypeError, ValueError):
    """A prompt is neither a text nor a list of token ids."""


class PromptSource(Protocol):
    """Draws prompts as token ids."""

    def draw(self, rng: np.random.Generator) -> list[int]:
        """One prompt; consumes the same random numbers whatever it returns."""
        ...


@dataclass(frozen=True)
class Encoder:
    """Turns one prompt into token ids that fit the prompt slots.

    A text gets the ``start`` tokens in front, a chat what the tokenizer's chat template says, ids are taken as they
    are.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_prompt_tokens: int
    truncate: Truncate | None = None
    start: tuple[int, ...] = ()  # what the tokenizer puts before every text
    chat: bool = False  # a text is the message of a user

    def __call__(self, prompt: str | Sequence[Any], name: str = "the prompt") -> list[int]:
        """Token ids of ``prompt``: a text, a chat (a list of dicts with "role" and "content"), or ids already.

        Raises:
            ValueError: the prompt is empty, or longer than its slots and ``truncate`` is None, or holds ids beyond the
                vocabulary, or the tokenizer has no chat template.
            NoPrompt: the prompt is neither a text, a chat nor a sequence of ids.
        """
        if isinstance(prompt, str):
            check_text(prompt, name)
        if isinstance(prompt, str) and self.chat:
            ids = chat_ids(self.tokenizer, [{"role": "user", "content": prompt}], name)
        elif isinstance(prompt, str):
            ids = opening_ids(self.tokenizer, prompt, self.start)
        elif is_chat(prompt):
            ids = chat_ids(self.tokenizer, prompt, name)  # type: ignore[arg-type]
        else:
            ids = self._ids(prompt, name)  # type: ignore[arg-type]
        self._check(ids, name)
        if not ids:
            raise ValueError(
                f"{name} is empty ({prompt!r} has no tokens); give at least one token, "
                "for example the tokenizer's beginning-of-text"
            )
        if len(ids) <= self.max_prompt_tokens:
            return ids
        if self.truncate == "left":
            kept = len(self.start) if ids[: len(self.start)] == list(self.start) else 0
            kept = min(kept, self.max_prompt_tokens - 1)  # the start tokens stay in front
            return ids[:kept] + ids[len(ids) - (self.max_prompt_tokens - kept) :]
        if self.truncate == "right":
            return ids[: self.max_prompt_tokens]
        shown = prompt if isinstance(prompt, str) else str(self.tokenizer.decode(ids))
        raise ValueError(
            f"{name} has {len(ids)} tokens and max_prompt_tokens is {self.max_prompt_tokens}: {shorten(shown)!r}; "
            "raise max_prompt_tokens, or pass truncate_prompt='left' (drops the start) or 'right' (drops the end); in "
            "the command, --max-prompt-tokens and --truncate-prompt"
        )

    def _ids(self, prompt: Sequence[int], name: str) -> list[int]:
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise NoPrompt(
                f"{name} is {shorten(repr(prompt))}; a prompt is a text, a chat or a list of token ids"
            ) from error
        return ids

    def _check(self, ids: list[int], name: str) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                grown = vocab_size(self.tokenizer)
                raise ValueError(
                    f"{name} holds the token id {token}, which is not in [0, {self.vocab_size})"
                    + (
                        f": tokens were added to the tokenizer, which now has {grown}, after the environment was made; "
                        "make a new environment, and resize the policy's embeddings"
                        if grown > self.vocab_size
                        else ""
                    )
                )


@dataclass(frozen=True)
class GivenPrompts:
    """Prompts used whole, each as likely as the others."""

    encoded: list[list[int]]

    def draw(self, rng: np.random.Generator) -> list[int]:
        """A prompt drawn uniformly."""
        return list(self.encoded[rng.integers(len(self.encoded))])


@dataclass(frozen=True)
class Openings:
    """The first k tokens of a text drawn uniformly, k uniform in ``prompt_tokens`` (both ends included)."""

    texts: list[str]
    encoder: Encoder
    prompt_tokens: tuple[int, int]

    def draw(self, rng: np.random.Generator) -> list[int]:
        """The opening of a random text."""
        index, k = rng.integers(len(self.texts)), rng.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1)
        encoder, text = self.encoder, self.texts[index]
        ids = opening_ids(encoder.tokenizer, text, encoder.start)[: k + len(encoder.start)]
        return encoder(ids, name=f"the opening of text {index}")


def prompt_source(source: Any, encoder: Encoder, prompt_tokens: tuple[int, int]) -> PromptSource:
    """The source behind ``source``: a list, a table, a file, the bundled alias, or a data set.

    Args:
        source: texts or lists of token ids, as a list, a NumPy array, a pandas Series or a column of a
            `datasets.Dataset`; a Dataset, DatasetDict (its "train") or DataFrame; the path of a ``.txt`` (one prompt
            per line), ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, ``FILE:COLUMN`` for a column of its own; a
            directory that ``save_to_disk`` wrote or that holds files of splits (``train.parquet``, ``train-*.parquet``,
            ``train.jsonl``); or the name of a data set on the hub. ``NAME:SPLIT`` and ``NAME:SPLIT:COLUMN`` choose.
        encoder: turns prompts into ids and checks that they fit.
        prompt_tokens: how many tokens of a text make a prompt (least, most).

    A column ``prompt``, or one that is named, holds prompts, which are used whole. A column ``text`` holds texts: a
    prompt is the opening of one of those longer than `MIN_TEXT_CHARACTERS`. If none is, they are prompts, and a warning
    says so.

    Raises:
        PromptsNotFound: nothing has that name.
        ValueError: an empty source, or a row that is no text or does not fit; the message names the row.
    """
    if not 1 <= prompt_tokens[0] <= prompt_tokens[1]:
        raise ValueError(f"prompt_tokens is {prompt_tokens}; give (least, most) with 1 <= least <= most")
    rows, where = read_prompts(source)
    if not rows:
        raise ValueError(f"{where} holds no prompts; give at least one")
    if rows.openings:
        return _openings(rows, encoder, prompt_tokens, where)
    return GivenPrompts([encoder(prompt, name=place) for prompt, place in zip(rows, rows.places, strict=True)])


def read_prompts(source: Any) -> tuple[Prompts, str]:
    """All rows of a prompt source, see `prompt_source`, and what to call it.

    Raises:
        PromptsNotFound: nothing has that name.
        ValueError: a row is no text.
    """
    if isinstance(source, Path):
        source = str(source)
    if not isinstance(source, str):
        rows = rows_of_object(source)
        return rows, "the list" if isinstance(source, list) else f"the {type(source).__name__}"
    file, column = prompt_file(source)
    if file is None:
        return rows_of_name(source), source
    return read_rows(file, column), str(file)


def prompt_file(source: str) -> tuple[Path | None, str | None]:
    """The file that a name means and the column that it names after a colon; (None, None): it names a data set."""
    path = Path(resolve("prompts", source))
    if path.suffix in FILE_SUFFIXES or path.is_file():
        return path, None
    name, colon, column = source.rpartition(":")
    if colon and name and not Path(source).exists():
        path = Path(resolve("prompts", name))
        if path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir()):
            return path, column
    return None, None


def _openings(rows: Prompts, encoder: Encoder, prompt_tokens: tuple[int, int], where: str) -> PromptSource:
    texts = [clean_text(text) for text in rows if len(text) > MIN_TEXT_CHARACTERS]
    if not texts:
        warnings.warn(
            f"no text of {where} is longer than {MIN_TEXT_CHARACTERS} characters, so each of the {len(rows)} is a "
            "prompt as it is; call the column 'prompt' if that is meant",
            stacklevel=2,
        )
        return GivenPrompts([encoder(prompt, name=place) for prompt, place in zip(rows, rows.places, strict=True)])
    least, most = prompt_tokens
    if encoder.chat:
        raise ValueError(
            f"{where} is a data set, of whose texts the beginnings are prompts, and prompt_template='chat' "
            "wants whole messages; pass a list or a file of them"
        )
    if most + len(encoder.start) > encoder.max_prompt_tokens and encoder.truncate is None:
        raise ValueError(
            f"prompt_tokens {prompt_tokens} does not fit max_prompt_tokens={encoder.max_prompt_tokens}; raise "
            "max_prompt_tokens, lower prompt_tokens, or choose truncate_prompt='left' or 'right'"
        )
    return Openings(texts, encoder, (least, most))


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The parts of ``text`` that the vocabulary lacks, so that the model reads its unknown token in their places.

    >>> from tokenmdp.models.loading import load_tokenizer
    >>> unknown_words(load_tokenizer("toy"), "the submarine was great")
    ['submarine']
    """
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:  # slow tokenizers do not give character offsets
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    parts = [text[start:end] for token, (start, end) in places if token == tokenizer.unk_token_id]
    return [part for part in parts if part != tokenizer.unk_token]


def clean_text(text: str) -> str:
    r"""Runs of HTML line breaks become one newline.

    >>> clean_text("Good.<br /><br />Very good.")
    'Good.\nVery good.'
    """
    return LINE_BREAKS.sub("\n", text)


def shorten(text: str, limit: int = 80) -> str:
    """At most ``limit`` characters, for an error message.

    >>> shorten("abcdef", limit=5)
    'ab...'
    """
    return text if len(text) <= limit else text[: limit - 3] + "..."
