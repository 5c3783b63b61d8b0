"""The piece of text that each token adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt_ids: Sequence[int] = ()
) -> tuple[str, list[str]]:
    """The text of the prompt and the piece of text that each token of ``ids`` adds to it.

    ``prompt + "".join(pieces)`` is the decoded whole: decoding token by token would lose blanks between words and
    break characters whose bytes are spread over several tokens. Such a character appears at its last token; the
    tokens before it have an empty piece.
    """

    def decode(row: Sequence[int]) -> str:
        return str(tokenizer.decode(list(row), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # A character cut in two by the prompt's end belongs to the token that completes it.
    shown = prompt = decode(prompt_ids).rstrip("�") if len(prompt_ids) else ""
    pieces = []
    for count in range(1, len(ids) + 1):
        whole = decode([*prompt_ids, *ids[:count]])
        unfinished = whole.endswith("�") and count < len(ids)  # the rest of this character's bytes may follow
        pieces.append("" if unfinished or not whole.startswith(shown) else whole[len(shown) :])
        shown += pieces[-1]
    return prompt, pieces
