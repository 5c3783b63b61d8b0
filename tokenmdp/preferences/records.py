"""Comparisons and rankings of responses to one prompt. The token ids are the truth, the texts are for reading.

A text that a policy sampled, tokenized again, often gives other ids than the sampled ones, and a model would learn from
a response that was never written. So every record keeps both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tokenmdp.preferences.errors import (
    AllTied,
    BadPreferences,
    DifferentPrompts,
    EmptyText,
    IdenticalResponses,
    NonFiniteNumber,
    UnknownTokenIds,
    WrongRanks,
)

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with K >= 2 different responses, not compared yet.

    Raises:
        EmptyText: the prompt or a response has no tokens.
        IdenticalResponses: two responses have the same ids.
        BadPreferences: numbers of texts, ids and scores that do not fit together.
        NonFiniteNumber: a score is NaN or infinite.
    """

    prompt: str
    responses: tuple[str, ...]  # K texts, without the end-of-text token
    prompt_ids: Ids
    responses_ids: tuple[Ids, ...]  # K; the end-of-text token is there if the response ended
    scores: tuple[float, ...] = ()  # K numbers of a judge or ratings, higher is better; or none
    kind: str = ""  # of the prompt, such as "open" and "closed"

    def __post_init__(self) -> None:
        if len(self.responses) != len(self.responses_ids) or len(self.responses) < 2:
            raise BadPreferences(
                f"{len(self.responses)} responses as text and {len(self.responses_ids)} as ids; give the same number, "
                "at least 2"
            )
        check_ids("the prompt", self.prompt_ids)
        for place, ids in enumerate(self.responses_ids):
            check_ids(f"response {place}", ids)
        check_different(self.responses_ids)
        if self.scores and len(self.scores) != len(self.responses):
            raise BadPreferences(
                f"{len(self.scores)} scores for {len(self.responses)} responses; give one each, or none"
            )
        for score in self.scores:
            check_finite("a score", score)


@dataclass(frozen=True, kw_only=True)
class Ranking(Group):
    """A `Group` in an order: ``ranks[i] < ranks[j]`` says that response i is preferred to response j.

    Raises:
        WrongRanks: ranks that are not one per response.
        AllTied: all ranks are equal.
    """

    ranks: tuple[int, ...]  # K; 1 is the best, equal ranks are ties
    annotator: str | None = None
    annotated_at: str | None = None  # ISO 8601, UTC

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ranks) != len(self.responses):
            raise WrongRanks(f"{len(self.ranks)} ranks for {len(self.responses)} responses; give one rank each")
        if any(rank < 1 or not isinstance(rank, int) for rank in self.ranks):
            raise WrongRanks(f"ranks are {list(self.ranks)}; they are whole numbers from 1, the best")
        if len(set(self.ranks)) == 1:
            raise AllTied(
                f"all {len(self.ranks)} responses have rank {self.ranks[0]}: nothing is preferred; leave it out"
            )

    def comparisons(self) -> list[Comparison]:
        """Every pair that is not tied, the preferred response first: at most K (K - 1) / 2."""
        pairs = []
        for one, other in combinations(range(len(self.ranks)), 2):
            if self.ranks[one] != self.ranks[other]:
                best, worst = (one, other) if self.ranks[one] < self.ranks[other] else (other, one)
                pairs.append(compared(self, best, worst, annotator=self.annotator, annotated_at=self.annotated_at))
        return pairs


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One response preferred to another.

    Raises:
        EmptyText: prompt, chosen or rejected has no tokens.
        IdenticalResponses: chosen and rejected have the same ids.
        NonFiniteNumber: a score or the margin is NaN or infinite, or the probability is not in [0, 1].
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    score_chosen: float | None = None  # the annotator's, in its own unit
    score_rejected: float | None = None
    margin: float | None = None  # by how much the chosen one should win, in log-odds
    probability: float | None = None  # that the annotator prefers the chosen one, whatever it drew
    annotator: str | None = None
    annotated_at: str | None = None  # ISO 8601, UTC
    kind: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            check_ids(name, getattr(self, f"{name}_ids"))
        check_different((self.chosen_ids, self.rejected_ids))
        for name in ("score_chosen", "score_rejected", "margin", "probability"):
            if (value := getattr(self, name)) is not None:
                check_finite(name, value)
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise NonFiniteNumber(f"probability is {self.probability}; it lies in [0, 1]")


Preference = Comparison | Ranking


def compared(group: Group, chosen: int, rejected: int, **facts: object) -> Comparison:
    """The comparison of two responses of a group; ``facts`` are further fields of `Comparison`."""
    scores = {"score_chosen": group.scores[chosen], "score_rejected": group.scores[rejected]} if group.scores else {}
    return Comparison(
        prompt=group.prompt,
        chosen=group.responses[chosen],
        rejected=group.responses[rejected],
        prompt_ids=group.prompt_ids,
        chosen_ids=group.responses_ids[chosen],
        rejected_ids=group.responses_ids[rejected],
        kind=group.kind,
        **{**scores, **facts},  # type: ignore[arg-type]
    )


def ranking_from(comparisons: Sequence[Comparison]) -> Ranking:
    """The ranking whose `Ranking.comparisons` are these; responses in the order in which they appear.

    A response's rank is 1 + the number of responses that are preferred to it; pairs that are not there are ties.

    Raises:
        DifferentPrompts: the comparisons do not share one prompt.
        WrongRanks: they contradict each other, such as a circle, or a tie that the other pairs do not allow.
        BadPreferences: there are none.
    """
    if not comparisons:
        raise BadPreferences("no comparisons; a ranking needs at least one")
    first = comparisons[0]
    texts: dict[Ids, str] = {}
    scores: dict[Ids, float | None] = {}
    beaten_by: dict[Ids, set[Ids]] = {}
    for place, one in enumerate(comparisons):
        if one.prompt_ids != first.prompt_ids:
            raise DifferentPrompts(
                f"comparison {place} has the prompt {one.prompt!r} and comparison 0 {first.prompt!r}; rank the "
                "responses to one prompt at a time"
            )
        for ids, text, score in (
            (one.chosen_ids, one.chosen, one.score_chosen), (one.rejected_ids, one.rejected, one.score_rejected),
        ):  # fmt: skip
            texts.setdefault(ids, text)
            scores.setdefault(ids, score)
        beaten_by.setdefault(one.rejected_ids, set()).add(one.chosen_ids)
    ranks = {ids: 1 + len(beaten_by.get(ids, ())) for ids in texts}
    asked = {(winner, loser) for loser, winners in beaten_by.items() for winner in winners}
    expanded = {(a, b) for a in texts for b in texts if ranks[a] < ranks[b]}
    if asked != expanded:
        raise WrongRanks(
            f"{len(asked)} comparisons of {len(texts)} responses to {first.prompt!r} fit no ranking: they hold a "
            "circle, or lack a pair that the others decide; keep them as comparisons"
        )
    known = [score for score in scores.values() if score is not None]
    return Ranking(
        prompt=first.prompt,
        responses=tuple(texts.values()),
        prompt_ids=first.prompt_ids,
        responses_ids=tuple(texts),
        ranks=tuple(ranks.values()),
        scores=tuple(known) if len(known) == len(texts) else (),
        kind=first.kind,
        annotator=first.annotator,
        annotated_at=first.annotated_at,
    )


def check_vocabulary(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Refuse ids that are not in [0, ``vocab_size``).

    Raises:
        UnknownTokenIds: with the first of them.
    """
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UnknownTokenIds(
                f"{where} holds the token id {token}, and the vocabulary has the ids 0..{vocab_size - 1}; read it with "
                "the tokenizer that it was written with"
            )


def check_ids(what: str, ids: Ids) -> None:
    """Refuse a text without tokens."""
    if not ids:
        raise EmptyText(f"{what} is empty: it has no tokens; leave this comparison out")
    if min(ids) < 0:
        raise UnknownTokenIds(f"{what} holds the token id {min(ids)}; ids are not negative")


def check_different(responses_ids: Sequence[Ids]) -> None:
    """Refuse the same response twice."""
    if len(set(responses_ids)) < len(responses_ids):
        twice = next(ids for ids in responses_ids if responses_ids.count(ids) > 1)
        raise IdenticalResponses(
            f"two responses are the same {len(twice)} tokens {list(twice)[:8]}, so none can be preferred; leave this "
            "comparison out"
        )


def check_finite(what: str, value: float) -> None:
    """Refuse NaN and infinities."""
    if not math.isfinite(value):
        raise NonFiniteNumber(f"{what} is {value}; give a finite number, or leave it out")
