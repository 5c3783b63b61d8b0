"""Worlds to measure credit in: texts, a reward model, and what each token is worth.

In two of them the worth is known, because a rule made it. In the third a real reward model scores real texts, and
leaving tokens out is the reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenmdp.evaluation.credit_quality.texts import Text, encode, episodes_of, text_of
from tokenmdp.reward_models import RewardModel
from tokenmdp.reward_models.lexicon import SENTIMENT_WEIGHTS, WORD, LexiconRewardModel
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODIFIERS = {"not": -1.0, "very": 2.0, "slightly": 0.5}
OPENINGS = ("I watched it last night.", "Here is what I think:", "A short review.")
SUBJECTS = ("the film", "the plot", "the acting", "the music", "the ending", "this story", "the cast")
ADJECTIVES = (
    "good", "great", "lovely", "funny", "brilliant", "wonderful", "touching", "perfect",
    "bad", "dull", "boring", "awful", "stupid", "terrible", "annoying", "weak",
)  # fmt: skip
JOINTS = (" and ", " but ", ", ", " while ")
KEYWORDS = {"superb": 3.0, "awful": -3.0}
LEAST_TOKENS = 6


@dataclass(frozen=True)
class World:
    """N texts with their reward model."""

    name: str
    description: str
    reference: str  # what the credit is compared with
    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    episodes: Episode
    known: torch.Tensor | None = None  # (N, H) float64: each token's worth; None: leave-one-out is the reference


class NegationLexicon(LexiconRewardModel):
    """A word list in which modifiers change the word that follows them.

    A listed word is worth its weight. A modifier directly before it, or before another modifier of it, multiplies what
    follows, and is worth the change that it makes: in "not very good", with good 1, very * 2 and not * -1, the words
    are worth 1, then +1 (now 2), then -4 (now -2), and the score is -2. A modifier without a word is worth 0. So the
    worths sum to the score, with signs; they are those of one order of reading, from the word outwards, and neither
    leave-one-out nor Shapley values agree with them everywhere ("good" without "not" is worth 1 and not -1).

    The attention row is that of `LexiconRewardModel` over these worths, so it is as informative as a row without signs
    can be.

    >>> from tokenmdp.models.loading import load_tokenizer
    >>> tokenizer = load_tokenizer("imdb-tiny")
    >>> model = NegationLexicon(tokenizer, {"good": 1.0})
    >>> model.token_credit(tokenizer.encode(" not very good")).tolist()
    [-4.0, 1.0, 1.0]
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        weights: Mapping[str, float],
        modifiers: Mapping[str, float] = MODIFIERS,
    ) -> None:
        super().__init__(tokenizer, weights)
        self.modifiers = dict(modifiers)

    def _words(self, text: str) -> list[tuple[int, int, float]]:
        """Words and modifiers with their worth: start, end, worth."""
        found, value, follows = [], 0.0, len(text)
        for match in reversed(list(WORD.finditer(text))):
            word = match[0].lower()
            adjacent = text[match.end() : follows].isspace()
            if word in self.modifiers and adjacent and value:
                worth = (self.modifiers[word] - 1.0) * value
            else:
                worth, value = self.weights.get(word, 0.0), 0.0
            value += worth
            follows = match.start()
            if worth:
                found.append((match.start(), match.end(), worth))
        return found[::-1]


def negation_world(tokenizer: PreTrainedTokenizerBase, num: int, seed: int = 0) -> World:
    """Sentences of one to three clauses, such as "the plot was not very good, the cast was dull", with known worth."""
    rng = np.random.default_rng(seed)
    model = NegationLexicon(tokenizer, {word: SENTIMENT_WEIGHTS[word] for word in ADJECTIVES})

    def clause() -> str:
        modifiers = [word for word, chance in (("not", 0.35), (str(rng.choice(["very", "slightly"])), 0.4))
                     if rng.random() < chance]  # fmt: skip
        return " ".join([str(rng.choice(SUBJECTS)), "was", *modifiers, str(rng.choice(ADJECTIVES))])

    texts = []
    for _ in range(num):
        sentence = clause()
        for _ in range(int(rng.integers(0, 3))):
            sentence += str(rng.choice(JOINTS)) + clause()
        texts.append(encode(tokenizer, sentence + ".", str(rng.choice(OPENINGS))))
    return World(
        "negation",
        "a word list in which not, very and slightly change the word after them; sentences of a small grammar; the "
        "attention row is each token's share of the absolute worths",
        "known worth: a word its weight, a modifier the change it makes",
        model,
        tokenizer,
        *_with_known(model, texts),
    )


def keyword_world(tokenizer: PreTrainedTokenizerBase, num: int, max_new_tokens: int = 16, seed: int = 0) -> World:
    """Random words of the vocabulary, and one keyword among them that alone decides the score.

    Raises:
        ValueError: ``max_new_tokens`` leaves no room for a text.
    """
    if max_new_tokens < LEAST_TOKENS:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; the keyword world needs at least {LEAST_TOKENS}")
    rng = np.random.default_rng(seed)
    model = LexiconRewardModel(tokenizer, KEYWORDS)
    vocabulary = [
        index for index in range(len(tokenizer)) if re.fullmatch(r" [a-z]{3,}", str(tokenizer.decode([index])))
    ]
    if not vocabulary:
        raise ValueError(
            f"no token of {type(tokenizer).__name__} is a whole word with a blank before it, which the keyword world "
            "is made of; use a tokenizer such as imdb-tiny or GPT-2's"
        )
    keywords = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in KEYWORDS]
    vocabulary = [index for index in vocabulary if [index] not in keywords]
    texts = []
    for _ in range(num):
        keyword = keywords[int(rng.integers(len(keywords)))]
        length = int(rng.integers(LEAST_TOKENS, max_new_tokens + 1))
        ids = [int(index) for index in rng.choice(vocabulary, max(length - len(keyword), 1))]
        place = int(rng.integers(len(ids) + 1))
        prompt = [int(index) for index in rng.choice(vocabulary, 3)]
        texts.append(Text(prompt, ids[:place] + keyword + ids[place:]))
    return World(
        "keyword",
        "random words of the vocabulary with one keyword that alone decides the score; the attention row is on it",
        "known worth: the keyword has all of the score",
        model,
        tokenizer,
        *_with_known(model, texts),
    )


def model_world(model: RewardModel, tokenizer: PreTrainedTokenizerBase, episodes: Episode, texts: str) -> World:
    """Any reward model on given episodes, with leave-one-out as the reference; ``texts`` says where they come from."""
    return World("model", f"{model} on {texts}", "leave-one-out: the score minus the score without the token",
                 model, tokenizer, episodes)  # fmt: skip


def _with_known(model: LexiconRewardModel, texts: list[Text]) -> tuple[Episode, torch.Tensor]:
    episodes = episodes_of(texts)
    known = torch.zeros(episodes.response_mask.shape, dtype=torch.float64)
    for row, (worths, mask) in enumerate(zip(known, episodes.response_mask, strict=True)):
        worths[mask] = model.token_credit(text_of(episodes, row).ids)
    return episodes, known
