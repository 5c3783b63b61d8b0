"""Prompt sources: the bundle, a list, a file, or a data set of texts.

Given prompts (a list, a file, the bundle) are used whole. Data-set sources hold texts such as reviews: a prompt is the
first k tokens of one of them, k uniform in ``prompt_tokens``, as in Chan et al. (ICML 2024), section 5.1.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import gymnasium as gym
import numpy as np

from tokenmdp.models.encoding import chat_ids, is_chat, opening_ids, vocab_size
from tokenmdp.models.loading import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TEXT_CHARACTERS = 200  # shorter reviews give openings that already end; the paper drops them too
LINE_BREAKS = re.compile(r"(?:<br\s*/?>\s*)+")
FILE_SUFFIXES = (".txt", ".json", ".jsonl")

Truncate = Literal["left", "right"]


class PromptsNotFound(gym.error.Error, OSError):
    """A prompt source that names no file, data set or bundled list."""


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
            TypeError: the prompt is none of these.
        """
        if isinstance(prompt, str) and self.chat:
            ids = chat_ids(self.tokenizer, [{"role": "user", "content": prompt}])
        elif isinstance(prompt, str):
            ids = opening_ids(self.tokenizer, prompt, self.start)
        elif is_chat(prompt):
            ids = chat_ids(self.tokenizer, prompt)  # type: ignore[arg-type]
        else:
            ids = self._ids(prompt)  # type: ignore[arg-type]
        self._check(ids)
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

    def _ids(self, prompt: Sequence[int]) -> list[int]:
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise TypeError(f"a prompt is a text or a list of token ids, not {prompt!r}") from error
        return ids

    def _check(self, ids: list[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                grown = vocab_size(self.tokenizer)
                raise ValueError(
                    f"token id {token} in a prompt is not in [0, {self.vocab_size})"
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


def prompt_source(source: str | Sequence[Any], encoder: Encoder, prompt_tokens: tuple[int, int]) -> PromptSource:
    """The source behind ``source``: a list, a file, the bundled alias, or a data set ``name[:split]``.

    Args:
        source: texts (or lists of token ids); a ``.txt`` (one prompt per line), ``.json`` or ``.jsonl`` file; a
            directory with ``{split}-*.parquet`` files; or the name of a data set on the hub. Data sets need a ``text``
            column.
        encoder: turns prompts into ids and checks that they fit.
        prompt_tokens: how many tokens of a data-set text make a prompt (least, most).

    Raises:
        PromptsNotFound: nothing has that name.
        ValueError: an empty source, or a prompt that does not fit.
    """
    if not isinstance(source, str):
        if not isinstance(source, Sequence):
            raise TypeError(f"prompts is a list of texts or a name, not {source!r}")
        return _given(source, encoder, "the list")
    path = Path(resolve("prompts", source))
    if path.suffix in FILE_SUFFIXES or path.is_file():
        if not path.is_file():
            raise PromptsNotFound(
                f"prompts {source!r}: no file {path}; give an existing {', '.join(FILE_SUFFIXES)} file"
            )
        return _given(read_prompt_file(path), encoder, str(path))
    least, most = prompt_tokens
    if not 1 <= least <= most:
        raise ValueError(f"prompt_tokens is {prompt_tokens}; give (least, most) with 1 <= least <= most")
    if encoder.chat:
        raise ValueError(
            f"prompts {source!r} is a data set, of whose texts the beginnings are prompts, and prompt_template='chat' "
            "wants whole messages; pass a list or a file of them"
        )
    if most + len(encoder.start) > encoder.max_prompt_tokens and encoder.truncate is None:
        raise ValueError(
            f"prompt_tokens {prompt_tokens} does not fit max_prompt_tokens={encoder.max_prompt_tokens}; raise "
            "max_prompt_tokens, lower prompt_tokens, or choose truncate_prompt='left' or 'right'"
        )
    texts = [clean_text(text) for text in _dataset_texts(source) if len(text) > MIN_TEXT_CHARACTERS]
    if not texts:
        raise ValueError(f"prompts {source!r} holds no text longer than {MIN_TEXT_CHARACTERS} characters")
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


def read_prompt_file(path: Path) -> list[Any]:
    """The prompts of a ``.txt``, ``.json`` or ``.jsonl`` file.

    JSON holds a list, or ``{"prompts": [...]}``; each line of a JSONL file a string or ``{"prompt": ...}``.

    Raises:
        ValueError: another kind of file, or another structure.
    """
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path} is a file, but only {', '.join(FILE_SUFFIXES)} files are read as prompts or texts")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return [row["prompt"] if isinstance(row, dict) else row for row in rows]
        content = json.loads(text)
        prompts = content["prompts"] if isinstance(content, dict) else content
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a prompt file ({error!r}): JSON needs a list or {{'prompts': [...]}}, "
            "JSONL a string or {'prompt': ...} a line"
        ) from error
    if not isinstance(prompts, list):
        raise ValueError(f"{path} holds {type(prompts).__name__}; a list of prompts is needed")
    return prompts


def _given(prompts: Sequence[Any], encoder: Encoder, where: str) -> GivenPrompts:
    if not prompts:
        raise ValueError(f"{where} holds no prompts; give at least one")
    return GivenPrompts([encoder(prompt, name=f"prompt {index}") for index, prompt in enumerate(prompts)])


def _dataset_texts(source: str) -> list[str]:
    """The ``text`` column of a local data-set directory or of a data set on the hub."""
    try:
        import datasets
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(
            f"prompts {source!r} names a data set: run `pip install 'tokenmdp[datasets]'`"
        ) from error

    name, split = _name_and_split(source)
    if Path(name).is_dir():
        files = sorted(str(path) for path in Path(name).rglob(f"{split}-*.parquet"))
        if not files:
            raise PromptsNotFound(
                f"prompts {source!r}: no {split}-*.parquet below {name}; add ':SPLIT' for another split"
            )
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    else:
        try:
            table = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub client raises many unrelated types when offline or when a name is wrong
            raise PromptsNotFound(
                f"prompts {source!r}: no file or directory of that name, and the data set {name!r} (split {split!r}) "
                f"could not be loaded ({type(error).__name__}: {shorten(str(error), 200)}); download it with "
                f"`hf download {name} --repo-type dataset --local-dir DIR` and pass DIR, or give a list of texts"
            ) from error
    if "text" not in table.column_names:
        raise ValueError(f"prompts {source!r} has the columns {table.column_names}; a 'text' column is needed")
    return list(table["text"])


def _name_and_split(source: str) -> tuple[str, str]:
    """``name:split``, by default the split ``train``; a path that exists is never taken apart.

    >>> _name_and_split("stanfordnlp/imdb:test"), _name_and_split("stanfordnlp/imdb")
    (('stanfordnlp/imdb', 'test'), ('stanfordnlp/imdb', 'train'))
    """
    name, colon, split = source.rpartition(":")
    return (name, split) if colon and not Path(source).exists() else (source, "train")
