"""Tokens: the piece of text that each adds, the toy vocabulary, and the error where two vocabularies differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOY_WORDS = [
    "the", "a", "this", "it", "i", "movie", "film", "story", "plot", "actor", "is", "was", "and", "but", "so", "very",
    "not", ".", ",", "good", "great", "fun", "lovely", "brilliant", "bad", "dull", "poor", "boring", "awful",
]  # fmt: skip


class VocabularyMismatch(ValueError):
    """A model would read different words than the policy wrote."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of some ids, special tokens and blanks included.

    >>> decoded(toy_tokenizer(), [1, 20, 6])
    'a great film'
    """
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt_ids: Sequence[int] = ()
) -> tuple[str, list[str]]:
    """The text of the prompt and the piece of text that each token of ``ids`` adds to it.

    ``prompt + "".join(pieces)`` is the decoded whole: decoding token by token would lose blanks between words and
    break characters whose bytes are spread over several tokens. Such a character appears at its last token; the
    tokens before it have an empty piece.
    """
    # A character cut in two by the prompt's end belongs to the token that completes it.
    shown = prompt = decoded(tokenizer, prompt_ids).rstrip("�") if len(prompt_ids) else ""
    pieces = []
    for count in range(1, len(ids) + 1):
        whole = decoded(tokenizer, [*prompt_ids, *ids[:count]])
        unfinished = whole.endswith("�") and count < len(ids)  # the rest of this character's bytes may follow
        pieces.append("" if unfinished or not whole.startswith(shown) else whole[len(shown) :])
        shown += pieces[-1]
    return prompt, pieces


def growing_texts(decode: Callable[[Sequence[int]], str], ids: Sequence[int], first: int) -> list[str]:
    """``[decode(ids[:count]) for count in range(first, len(ids) + 1)]``, for T tokens with O(T) tokens decoded.

    Only the latest tokens are decoded again: behind a whole character the text goes on in the same way whatever came
    before. Where that is not so, as the last text shows, all are decoded in full.

    >>> tokenizer = toy_tokenizer()
    >>> growing_texts(tokenizer.decode, [1, 20, 6], first=1)
    ['a', 'a great', 'a great film']
    """
    texts = [decode(ids[:first])]
    left, right, known = 0, first, texts[0]  # the text of ids[:right] is known and whole; ids[left:] is decoded again
    shown = known
    for count in range(first + 1, len(ids) + 1):
        whole = decode(ids[left:count])
        if shown.endswith("\ufffd") or not whole.startswith(shown):
            break
        texts.append(known + whole[len(shown) :])
        if not whole.endswith("\ufffd"):
            left, right, known = right, count, texts[-1]
            shown = decode(ids[left:right])
    else:
        if texts[-1] == decode(ids):
            return texts
    return [decode(ids[:count]) for count in range(first, len(ids) + 1)]


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """The share of the n-grams of all texts together that are different from one another.

        distinct_n = |set of n-grams| / number of n-grams

    Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", NAACL 2016. No n-gram reaches
    over the end of a text. It falls with the number of texts, so compare it at equal numbers. 0 where no
    text has n tokens.

    >>> distinct_n([[5, 6, 5, 6], [5, 6]], 1), distinct_n([[5, 6, 5, 6], [5, 6]], 2)   # 5 6, 6 5, 5 6 and 5 6
    (0.3333333333333333, 0.5)
    """
    ngrams = [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def check_text(text: str, place: str) -> None:
    """Refuse a text that is not Unicode: half of a surrogate pair, or a byte that was not UTF-8 where it came from.

    Raises:
        ValueError: with ``place``, which says where the text is from.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, which no "
            "tokenizer reads; write the whole character, or leave it out"
        ) from error


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], responses_ids: Sequence[Sequence[int]]
) -> tuple[str, list[str]]:
    """The text of a prompt, and the text that each response adds to it, without the end-of-text token at its end.

    Prompt + response is the decoded whole, unless a character of several bytes is cut in two by the prompt's end.

    >>> response_texts(toy_tokenizer(), [1, 20], [[6, 30], [7]])
    ('a great', [' film', ' story'])
    """
    prompt = decoded(tokenizer, prompt_ids)
    texts = []
    for ids in responses_ids:
        written = list(ids[:-1]) if len(ids) and ids[-1] == tokenizer.eos_token_id else list(ids)
        whole = decoded(tokenizer, [*prompt_ids, *written])
        texts.append(whole[len(prompt) :] if whole.startswith(prompt) else decoded(tokenizer, written))
    return prompt, texts


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """32 symbols for TextGen-Toy-v0: 29 words separated by blanks, then <unk>, <eos> and <pad>.

    >>> tokenizer = toy_tokenizer()
    >>> len(tokenizer), tokenizer.eos_token_id, tokenizer("a great film")["input_ids"]
    (32, 30, [1, 20, 6])
    >>> tokenizer.decode([1, 20, 6])
    'a great film'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*TOY_WORDS, "<unk>", "<eos>", "<pad>"]
    words = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
