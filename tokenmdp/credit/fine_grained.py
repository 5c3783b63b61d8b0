"""Credit from several reward models at once, each speaking at its own density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch

from tokenmdp.credit.base import MissingResource, Resources
from tokenmdp.credit.deletion import scores_of_kept
from tokenmdp.credit.options import check_number, check_whole
from tokenmdp.credit.spans import segment_ends
from tokenmdp.credit.weights import sparse_weights
from tokenmdp.types import Credit, Episode, Outcome, take

if TYPE_CHECKING:
    from tokenmdp.reward_models import RewardModel

DENSITIES = ("token", "clause", "sentence", "text")
CONTEXTS = ("prefix", "segment", "whole")


@runtime_checkable
class ReadsTokens(Protocol):
    """Distinguishes a `RewardModel` from other objects here; its class belongs to a later layer."""

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer whose ids name other tokens."""
        ...


@dataclass(frozen=True)
class FineReward:
    """One reward model of `FineGrainedCredit`: it gives ``R(segment j)`` to the token that ends segment j.

    With ``context="prefix"``, ``R(j) = s(prompt + y up to the end of j) - s(prompt + y before j)``; nothing is
    subtracted for the first segment, so its R includes the score of the prompt. This is the default, because the model
    reads whole texts as it was trained to, a negation before the segment counts, and the R of a response sum to the
    model's score of it. With ``context="segment"``, ``R(j) = s(prompt + segment j)``, for models that were trained to
    judge single sentences. With ``context="whole"``, ``R(j) = s(prompt + y + end of text + y up to the end of j)``,
    with no second end where y ends with one: a model that was trained on `tokenmdp.preferences.segment_ranking` answers
    for segment j when it has read all of y. A causal model needs one forward for all segments of a text.

    What is paid is ``w * (R(j) - shift)``, or with ``sign`` ``w * sign(R(j) - shift)``. So ``weight=1/sd, shift=mean``
    is ``(R - mean) / sd``, and ``weight=0.3, sign=True`` pays 0.3 for a segment of the wanted class and -0.3 for
    another one, where R is the log-odds of the class, as Wu et al. scale their models.

    Args:
        reward_model: s; a `RewardModel`, the name of one, or None for the environment's own.
        density: where segments end: "token" at every token, "clause" and "sentence" as in `tokenmdp.credit.spans`,
            "text" at the last token. The last token always ends a segment, except that in the contexts "segment" and
            "whole" an end-of-text token or punctuation after the last sentence gets nothing.
        weight: w, of any sign.
        context: "prefix", "segment" or "whole".
        shift: in the unit of R; taken off every segment.
        sign: pay for the sign only.
    """

    reward_model: RewardModel | str | None = None
    density: str = "text"
    weight: float = 1.0
    context: str = "prefix"
    shift: float = 0.0
    sign: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (("density", self.density, DENSITIES), ("context", self.context, CONTEXTS)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        for name, number in (("weight", self.weight), ("shift", self.shift)):
            check_number(name, number)
            if not math.isfinite(number):
                raise ValueError(f"{name} is {number}; it must be a finite number")
        if not isinstance(self.sign, bool):
            raise ValueError(f"sign is {self.sign!r}; give true or false")
        if not (self.reward_model is None or isinstance(self.reward_model, (str, ReadsTokens))):
            raise ValueError(
                f"reward_model is {self.reward_model!r}; pass a RewardModel, the name of one, or None for the "
                "environment's own"
            )


@dataclass(frozen=True)
class FineGrainedCredit:
    """``token_rewards[t] = sum_k w_k * sum_j 1[t = end_j of part k] * (R_k(segment j of part k) - shift_k)``.

    Ends that fall on one token add up. A part's text-density segment read by the environment's own model is the score,
    so that part alone, with weight 1, is sparse credit. The sum is the score for no other choice in general. Reports
    ``reward_calls``, the texts that were scored for it: one where a model gives the scores of all prefixes of a text at
    once, as causal classifiers do, else one per segment. The paper's KL term is the agent's ``kl_coef``.

    Source: Wu et al., "Fine-Grained Human Feedback Gives Better Rewards for Language Model Training", 2023, whose
    reward models read the whole text and answer at every segment's end, as those of the context "whole" do.

    Args:
        parts: at least one `FineReward`.
        rows_per_forward: texts that a reward model reads at a time.
    """

    parts: Sequence[FineReward]
    rows_per_forward: int = 256
    name: ClassVar[str] = "fine-grained"
    conserves_return: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reward_calls"})

    def __post_init__(self) -> None:
        check_whole("rows_per_forward", self.rows_per_forward, 1)
        if not isinstance(self.parts, Sequence) or isinstance(self.parts, str):
            raise ValueError(f"parts is {self.parts!r}; give a list of FineReward(reward_model, density, weight)")
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise ValueError("parts is empty; give at least one FineReward")
        for part in self.parts:
            if not isinstance(part, FineReward):
                raise TypeError(f"parts holds {part!r}; each part is a FineReward(reward_model, density, weight)")

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) of any sign, and the report.

        Raises:
            MissingResource: a part's reward model, or the tokenizer to find sentences with, is missing.
        """
        mask = outcome.episode.response_mask.bool()
        total = torch.zeros(mask.shape, dtype=torch.float64)
        calls = torch.zeros(len(mask), dtype=torch.int64)
        for part in self.parts:
            ends = self._ends(part, outcome.episode, resources)
            rows, last = ends.nonzero(as_tuple=True)  # (M,), ordered by row, then by place
            model = self._model(part, resources)
            whole = part.context == "whole"
            read = read_before(outcome.episode, resources.tokenizer) if whole else outcome.episode
            scores, asked = self._scores(part, model, outcome._replace(episode=read), rows, last)
            if part.context == "prefix":
                before = torch.where(rows[1:] == rows[:-1], scores[:-1], 0.0)
                scores[1:] -= before
            paid = scores - part.shift
            total[rows, last] += part.weight * (paid.sign() if part.sign else paid)
            calls += asked.bincount(minlength=len(mask))
        return Credit(total.to(outcome.reward.score.dtype), {"reward_calls": calls})

    def _scores(
        self, part: FineReward, model: RewardModel, outcome: Outcome, rows: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's scores of the M texts (M,) float64, and the rows of the texts that it read for them."""
        episode, mask = outcome.episode, outcome.episode.response_mask.bool()
        keep = self._texts(part, mask, rows, last)
        scores = outcome.reward.score[rows].double()
        asked = torch.ones_like(rows, dtype=torch.bool)
        if part.reward_model is None and part.context != "whole":
            asked = (keep != mask[rows]).any(-1)  # the whole response already has its score
        if part.context != "segment" and "prefix_scores" in model.provides and asked.any():
            read = rows[asked].unique()  # one forward for all segments of a text
            prefixes = [
                model(take(episode, some), needs=frozenset({"prefix_scores"})).prefix_scores
                for some in read.split(self.rows_per_forward)
            ]
            every = torch.cat(prefixes).double()  # type: ignore[arg-type]
            scores[asked] = every[torch.searchsorted(read, rows[asked]), last[asked] + 1]
            return scores, read
        scores[asked] = scores_of_kept(model, episode, rows[asked], keep[asked], self.rows_per_forward).double()
        return scores, rows[asked]

    def _ends(self, part: FineReward, episode: Episode, resources: Resources) -> torch.Tensor:
        """Which tokens end a segment, (N, H) bool."""
        mask = episode.response_mask.bool()
        if part.density in ("clause", "sentence"):
            prefix = part.context == "prefix"
            return segment_ends(episode, resources.tokenizer, f"{part.density}s", wordless_rest=prefix)
        return mask if part.density == "token" else sparse_weights(mask).bool()

    def _texts(self, part: FineReward, mask: torch.Tensor, rows: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Which response tokens each of the M scored texts has, (M, H) bool."""
        places = torch.arange(mask.shape[1])
        keep = mask[rows] & (places <= last[:, None])
        if part.context == "segment":
            first = torch.zeros_like(last)
            first[1:] = torch.where(rows[1:] == rows[:-1], last[:-1] + 1, 0)
            keep &= places >= first[:, None]
        return keep

    def _model(self, part: FineReward, resources: Resources) -> RewardModel:
        if part.reward_model is None:
            if resources.reward_model is None:
                raise MissingResource("a part without reward_model reads the environment's own, and there is none")
            return resources.reward_model
        if isinstance(part.reward_model, str):
            if resources.load_reward_model is None:
                raise MissingResource(
                    f"nobody here loads a reward model by name; pass load_reward_model({part.reward_model!r}) as part"
                )
            return resources.load_reward_model(part.reward_model)
        if resources.tokenizer is not None:
            try:
                part.reward_model.check_tokenizer(resources.tokenizer)
            except ValueError as error:
                # Of the same type: the alignment that the model's own message recommends is only for named parts.
                raise type(error)(
                    f"{part.reward_model} reads other tokens than the environment writes; pass "
                    "RetokenizedRewardModel(reward_model, env.unwrapped.tokenizer) as part, or in an environment with "
                    f"align='offsets' the reward model's name ({error})"
                ) from error
        return part.reward_model


def read_before(episode: Episode, tokenizer: Any) -> Episode:
    """The response again, after a prompt that holds it: prompt + response + end of text, as `segment_ranking` has it.

    A response that ends with an end-of-text token gets no second one.

    Raises:
        MissingResource: no tokenizer says which token ends a text.
    """
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise MissingResource("the context 'whole' needs a tokenizer with an end-of-text token; pass one")
    end = torch.full_like(episode.input_ids[:, :1], tokenizer.eos_token_id)
    response, read = episode.input_ids[:, episode.prompt_slots :], episode.response_mask.bool()
    last = sparse_weights(read).bool()
    unended = ~((response == end) & last).any(-1, keepdim=True)
    mask = torch.cat([episode.attention_mask.bool(), unended, read], -1)
    ids = torch.cat([episode.input_ids, end, response], -1)
    return Episode(ids, mask, episode.response_mask)
