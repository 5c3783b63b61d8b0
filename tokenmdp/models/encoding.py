"""Texts as the ids that a tokenizer means: start tokens, the seam of prompt and response, chats, ends of text.

A prompt begins a text, so it gets the tokens that its tokenizer puts before every text (<s>, [CLS]). A response goes
on, so nothing stands before it, not even the blank with which SentencePiece begins.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmdp.models.tokens import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"  # the tokenizer's own chat template
BLANK = "\u2581"  # how SentencePiece shows a blank
BEFORE = ("\n", ".", "a", "0")  # what may stand before a text that goes on; the first that stays a token of its own
MARKS = ("\ue000", "\ue001")  # private characters, in the places of prompt and response
logger = logging.getLogger(__name__)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of ``text``, nothing added."""
    # Not verbose: transformers would warn of texts beyond the model's positions, which are refused elsewhere.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer's own encoding puts before every text, such as that of <s>; often none.

    >>> from tokenmdp.models.tokens import toy_tokenizer
    >>> start_ids(toy_tokenizer())
    []
    """
    inner, whole = plain_ids(tokenizer, "a"), list(tokenizer.encode("a", verbose=False))
    for first in range(len(whole) - len(inner) + 1):
        if inner and whole[first : first + len(inner)] == inner:
            return whole[:first]
    return []


def opening_ids(tokenizer: PreTrainedTokenizerBase, text: str, start: Sequence[int]) -> list[int]:
    """The ids of a text that begins an episode, behind ``start`` unless it is spelled out in ``text`` already."""
    ids = plain_ids(tokenizer, text)
    return ids if ids[: len(start)] == list(start) else [*start, *ids]


def continuing_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of ``text`` where it goes on after another text: SentencePiece adds no blank there.

    Raises:
        ValueError: the tokenizer does not tell what it adds.
    """
    ids = plain_ids(tokenizer, text)
    if not ids or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(BLANK):
        return ids
    for before in BEFORE:
        known = plain_ids(tokenizer, before)
        whole = plain_ids(tokenizer, before + text)
        rest = whole[len(known) :]
        if known and rest and whole[: len(known)] == known and decoded(tokenizer, whole) == before + text:
            return rest
    raise ValueError(
        f"{text!r} cannot be encoded as the continuation of a text: {type(tokenizer).__name__} puts a blank before "
        "every text; give token ids"
    )


def is_chat(prompt: Any) -> bool:
    """Whether ``prompt`` is a list of messages, dicts with "role" and "content"."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    )


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], name: str = "the prompt"
) -> list[int]:
    """The ids of a chat up to where the assistant writes on, by the tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has no template, or the template refuses the messages.
    """
    return plain_ids(tokenizer, _render(tokenizer, messages, name=name))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    ended: bool = False,
    name: str = "the text",
) -> str:
    goes_on = messages[-1]["role"] == "assistant" and not ended
    if not tokenizer.chat_template:
        raise ValueError(
            f"{name} is a chat and {type(tokenizer).__name__} has no chat template; pass texts, or set "
            "tokenizer.chat_template to the one that the model was trained with"
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not goes_on and not ended,
            continue_final_message=goes_on,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages {list(messages)!r}: {error}") from error
    return str(text)


def chat_frame(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> tuple[str, str] | None:
    """The text before and after a user's message in a chat prompt, decoded without the ``special`` ids.

    None: the tokenizer has no chat template, or cannot spell a private character.
    """
    if not tokenizer.chat_template:
        return None
    try:
        ids = chat_ids(tokenizer, [{"role": "user", "content": MARKS[0]}])
    except ValueError:
        return None
    head, mark, tail = decoded(tokenizer, [index for index in ids if index not in special]).partition(MARKS[0])
    return (head, tail) if mark else None


def chat_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template as a format string with ``{prompt}``, the user's message, and ``{response}``.

    Raises:
        ValueError: the tokenizer has no template, or it changes what the messages say.
    """
    messages = [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": MARKS[1]}]
    text = _render(tokenizer, messages, ended=True)
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"the tokenizer's chat template does not show each message once: {text!r}; pass a template")
    text = text.replace("{", "{{").replace("}", "}}")
    return text.replace(MARKS[0], "{prompt}").replace(MARKS[1], "{response}")


def ends_of_text(tokenizer: PreTrainedTokenizerBase, directory: Path | None) -> list[int]:
    """The ids that end a text: the tokenizer's, and those that the model's files beside it list.

    Models that chat often end a turn with another token than a document; ``generation_config.json`` and ``config.json``
    list both.

    Raises:
        ValueError: a file names something that is not an id.
    """
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for file in ("generation_config.json", "config.json"):
        if directory is None or not (directory / file).is_file():
            continue
        try:
            listed = json.loads((directory / file).read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            continue  # reading the model says what is wrong with it
        if isinstance(listed, list):
            if not all(isinstance(index, int) for index in listed):
                raise ValueError(f"{directory / file} has eos_token_id {listed!r}; pass eos_token_id=ID or [ID, ID]")
            new = [index for index in listed if index not in found]
            if new and found:
                logger.info("texts end with the ids %s too, as %s says", new, directory / file)
            found += new
    return found


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """V: one more than the highest id, which is more than the number of tokens where ids have gaps.

    >>> from tokenmdp.models.tokens import toy_tokenizer
    >>> vocab_size(toy_tokenizer())
    32
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1
