"""Who prefers what: judges that score responses, and the noise between scores and what is said.

    P(a preferred to b) = e / 2 + (1 - e) sigmoid(T (score_a - score_b))

T says how sure the annotator is (infinite: the higher score always wins), e how often it answers at random. Christiano
et al., "Deep Reinforcement Learning from Human Preferences", 2017, write the same with T = 1 and e = .1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenmdp.preferences.errors import BadPreferences, NonFiniteNumber
from tokenmdp.preferences.records import Comparison, Group, Preference, Ranking, compared
from tokenmdp.types import lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.reward_models import RewardModel

Scores = Callable[[Sequence[Group]], list[tuple[float, ...]]]
TEXTS_PER_FORWARD = 64


class Judged(NamedTuple):
    """What an annotator said about some groups."""

    records: list[Preference]  # without the groups in which all scores are equal
    tied: int  # pairs whose scores are equal
    pairs: int  # all pairs


@dataclass(frozen=True)
class Annotator:
    """Scores, and the noise on what they say.

    Raises:
        ValueError: ``temperature`` is not above 0, or ``error_rate`` is not in [0, 1].
    """

    name: str
    scores: Scores  # of the responses of each group, higher is better
    temperature: float = math.inf  # T, which multiplies differences of scores
    error_rate: float = 0.0  # e, the share of answers that are coin flips

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; score differences are multiplied by it: above 0")
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"error_rate is {self.error_rate}; it is the share of random answers, in [0, 1]")

    def probability(self, first: float, second: float) -> float:
        """P = e / 2 + (1 - e) sigmoid(T (first - second)); one half of equal scores.

        >>> annotator = Annotator("anyone", lambda groups: [], temperature=1.0, error_rate=0.1)
        >>> round(annotator.probability(2.0, 0.0), 4), annotator.probability(1.0, 1.0)
        (0.8427, 0.5)
        """
        gap = 0.0 if first == second else self.temperature * (first - second)
        sure = 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0
        return self.error_rate / 2 + (1 - self.error_rate) * sure

    def ranks(self, scores: Sequence[float], rng: np.random.Generator) -> tuple[int, ...]:
        """An order of K responses, drawn so that each pair of different scores has `probability`.

        With probability 1 - e the order of T * score + Gumbel noise (Plackett and Luce's), otherwise any order. Equal
        scores stay equal: they share their noise, and a rank.

        Args:
            scores: (K,).
            rng: draws the same amount of random numbers whatever the scores are.

        Returns:
            (K,) ranks, 1 is the best.
        """
        values = np.asarray(scores, dtype=np.float64)
        noise, guess, at_random = rng.gumbel(size=len(values)), rng.random(len(values)), rng.random()
        kinds, kind = np.unique(values, return_inverse=True)  # ascending; the kind of each response
        if at_random < self.error_rate:
            heights = guess[: len(kinds)]
        elif math.isinf(self.temperature):
            heights = kinds
        else:
            heights = self.temperature * kinds + noise[: len(kinds)]
        height = heights[kind]
        return tuple(1 + int((height > own).sum()) for own in height)

    def judge(self, groups: Sequence[Group], seed: int, first: int = 0) -> Judged:
        """Score groups and draw what the annotator says; comparisons for two responses, rankings for more.

        Args:
            groups: to judge together.
            seed: with its place, seeds what is drawn about a group, whichever groups are judged together.
            first: the place of the first group.

        Raises:
            NonFiniteNumber: a score is NaN or infinite.
        """
        records: list[Preference] = []
        tied = pairs = 0
        scored = self.scores(groups)
        for place, (group, scores) in enumerate(zip(groups, scored, strict=True), start=first):
            if len(scores) != len(group.responses):
                raise BadPreferences(f"{self.name} gave {len(scores)} scores for {len(group.responses)} responses")
            if not all(map(math.isfinite, scores)):
                raise NonFiniteNumber(f"{self.name} gave the scores {scores} to {group.prompt!r}; they must be finite")
            equal = sum(one == other for one, other in combinations(scores, 2))
            tied, pairs = tied + equal, pairs + math.comb(len(scores), 2)
            ranks = self.ranks(scores, np.random.default_rng((seed, place)))
            if len(set(ranks)) == 1:
                continue
            records.append(self._record(group, tuple(scores), ranks))
        return Judged(records, tied, pairs)

    def _record(self, group: Group, scores: tuple[float, ...], ranks: tuple[int, ...]) -> Preference:
        ranking = Ranking(
            prompt=group.prompt,
            responses=group.responses,
            prompt_ids=group.prompt_ids,
            responses_ids=group.responses_ids,
            kind=group.kind,
            scores=scores,
            ranks=ranks,
            annotator=self.name,
        )
        if len(ranks) > 2:
            return ranking
        best = ranks.index(1)
        chance = self.probability(scores[best], scores[1 - best])
        return compared(ranking, best, 1 - best, probability=chance, annotator=self.name)


def model_scores(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, texts_per_forward: int = TEXTS_PER_FORWARD
) -> Scores:
    """Scores of a reward model, which reads the responses' own ids.

    Args:
        model: reads prompt and response.
        tokenizer: the one that the groups' ids belong to.
        texts_per_forward: responses that it reads together.

    Raises:
        VocabularyMismatch: the model reads other tokens; `tokenmdp.reward_models.readable_by` reads the text instead.
    """
    model.check_tokenizer(tokenizer)

    def scores(groups: Sequence[Group]) -> list[tuple[float, ...]]:
        prompts = [group.prompt_ids for group in groups for _ in group.responses_ids]
        responses = [ids for group in groups for ids in group.responses_ids]
        found: list[float] = []
        for start in range(0, len(responses), texts_per_forward):
            part = slice(start, start + texts_per_forward)
            found += model(lay_out(prompts[part], responses[part])).score.tolist()
        each = iter(found)
        return [tuple(next(each) for _ in group.responses_ids) for group in groups]

    return scores


def function_scores(function: Callable[[str, str], float]) -> Scores:
    """Scores of a function of prompt and response as texts.

    >>> group = Group(prompt="a", responses=(" b", " cc"), prompt_ids=(1,), responses_ids=((2,), (3, 4)))
    >>> function_scores(lambda prompt, response: len(response))([group])
    [(2.0, 3.0)]
    """
    return lambda groups: [tuple(float(function(group.prompt, one)) for one in group.responses) for group in groups]


def given_ratings(groups: Sequence[Group]) -> list[tuple[float, ...]]:
    """Scores that the groups came with, such as grades of reviews; an `Annotator`'s ``scores``.

    Raises:
        BadPreferences: a group has none.
    """
    for group in groups:
        if not group.scores:
            raise BadPreferences(f"the responses to {group.prompt!r} have no ratings; give each group its scores")
    return [group.scores for group in groups]


def ceiling(chances: Iterable[float]) -> float:
    """The expected share of labels that agree with the judge's own order: the mean of max(P, 1 - P).

    No model can be expected to be right about more held-out labels than this, so an accuracy is read beside it.

    Args:
        chances: P of each pair whose scores differ.

    Returns:
        A share in [.5, 1]; NaN without pairs.

    >>> round(ceiling([0.9, 0.3]), 3)
    0.8
    """
    best = [max(chance, 1 - chance) for chance in chances]
    return sum(best) / len(best) if best else math.nan


def pairs_of(records: Iterable[Preference]) -> list[Comparison]:
    """Comparisons as they are, rankings pair by pair."""
    return [pair for one in records for pair in ([one] if isinstance(one, Comparison) else one.comparisons())]


def chances_of(pairs: Iterable[Comparison], annotator: Annotator) -> list[float]:
    """P that the annotator prefers the chosen response, for every pair with its scores."""
    return [
        annotator.probability(pair.score_chosen, pair.score_rejected)
        for pair in pairs
        if pair.score_chosen is not None and pair.score_rejected is not None
    ]
