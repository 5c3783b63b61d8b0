"""What a reward model is: finished episodes in, one score per row out, with the checks that all of them share."""

from __future__ import annotations

import copyreg
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tokenmdp.models.tokens import VocabularyMismatch
from tokenmdp.types import Episode, RewardOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NonFiniteScore(ValueError):
    """A score or an attention row is NaN or infinite; the message names the row and its text."""


class EmbeddedTexts(NamedTuple):
    """N texts as a reward model's input embeddings; L is the longest text in tokens."""

    embeddings: torch.Tensor  # (N, L, C), detached
    response: torch.Tensor  # (N, L) bool: where the response is
    # embeddings (M, L, C) in the places of texts index (M,) int64 -> scores (M,), differentiable. An index, because
    # attribution methods ask about many versions of each text in one batch.
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    to_slots: Callable[[torch.Tensor], torch.Tensor]  # one number per position (N, L) -> one per response slot (N, H)
    average: Callable[[], torch.Tensor] | None = None  # the mean embedding (C,) of all tokens; None: there is none


class RewardModel(ABC):
    """Scores finished episodes. A subclass sets the attributes it needs and writes `evaluate`.

    Args:
        tokenizer: the vocabulary the model reads; None where it is not known.
        name: what `load_reward_model` reloads it from, in specs and pickles; None if built from objects.
        options: the keyword arguments of that reload.

    Attributes:
        reloader: what a pickle calls with ``name`` and ``options``; None, unless `load_reward_model` loaded this model,
            and then the pickle holds the model itself.
    """

    provides: frozenset[str] = frozenset()  # what `needs` may ask for, such as "attention"
    max_tokens: int | None = None  # the longest prompt + response it reads; None is unlimited
    meaning: str = ""  # of the score, in words, such as "logit[positive] - logit[negative]"; "": nothing to say
    limit_reason: str = ""  # why that is less than its positions, in parentheses
    reloader: Callable[[str, dict[str, Any]], RewardModel] | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        name: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.options = options or {}

    @abstractmethod
    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """Scores (N,), and what ``needs`` names of `RewardOutput`'s other fields; on any device, any float dtype.

        A response may be shorter than its text suggests: `credit` methods ask about texts with tokens left out, whose
        masks have gaps. Read the tokens that the masks show, in order, as if the others had never been there.
        """

    def __call__(
        self, episodes: Episode, *, needs: frozenset[str] = frozenset(), empty_responses: bool = False
    ) -> RewardOutput:
        """Score N episodes in one go.

        Args:
            episodes: as the environment saw them, or with tokens masked out.
            needs: what to give beyond the score; keys of `tokenmdp.credit.NEEDS`.
            empty_responses: also score prompts that no response follows. A text without any token scores 0.

        Returns:
            scores (N,) and what ``needs`` asks for: float32 on the CPU. Each row's numbers depend on its own prompt
            and response only, not on the padding or on the other rows.

        Raises:
            ValueError: an empty response, a text longer than ``max_tokens``, masks that disagree, a need that
                the model does not provide, or an output of another shape.
            NonFiniteScore: a score, an attention row or a prefix score is NaN or infinite.
        """
        self._check(episodes, needs, empty_responses)
        silent = ~episodes.attention_mask.bool().any(-1)  # only with empty_responses
        if silent.any():
            if needs:
                raise ValueError(f"row {int(silent.nonzero()[0])} has no token at all: it has a score (0) and no more")
            score = torch.zeros(len(silent))
            if not silent.all():
                score[~silent.cpu()] = self(Episode(*(part[~silent] for part in episodes)), empty_responses=True).score
            return RewardOutput(score)
        parts = self.evaluate(episodes, needs)._asdict()
        plain = {key: part.detach().to("cpu", torch.float32) for key, part in parts.items() if part is not None}
        output = RewardOutput(**plain)
        rows, horizon = episodes.response_mask.shape
        if output.score.shape != (rows,):  # (N, 1) would broadcast to (N, N) in the credit
            raise ValueError(
                f"{self} returned scores of shape {tuple(output.score.shape)} for {rows} episodes; "
                "evaluate returns one number per episode, shape (N,)"
            )
        self._refuse(~torch.isfinite(output.score), output.score, "scored", episodes)
        response_mask = episodes.response_mask.bool().cpu()
        if output.attention is not None:
            self._check_shape("attention", output.attention, (rows, horizon), "one weight a response slot")
            response = output.attention.masked_fill(~response_mask, 0.0).sum(-1)
            self._refuse(~torch.isfinite(response), response, "gave an attention row that sums to", episodes)
        if output.attention_layers is not None:
            layers, heads = output.attention_layers.shape[1:3]
            shape = (rows, layers, heads, horizon)
            self._check_shape("attention_layers", output.attention_layers, shape, "one row a layer and head")
            response = output.attention_layers.masked_fill(~response_mask[:, None, None], 0.0).sum((1, 2, 3))
            self._refuse(~torch.isfinite(response), response, "gave attention rows that sum to", episodes)
        if output.prefix_scores is not None:
            self._check_shape("prefix_scores", output.prefix_scores, (rows, horizon + 1), "one score a prefix")
            total = output.prefix_scores.sum(-1)
            self._refuse(~torch.isfinite(total), total, "gave prefix scores that sum to", episodes)
        return output

    def embedded(self, episodes: Episode) -> EmbeddedTexts:
        """The texts as input embeddings with a differentiable score, for a model that provides "gradients".

        Raises:
            ValueError: this model has no embeddings.
        """
        raise ValueError(f"{self} has no embeddings to differentiate its score by; use a model that does")

    def _check_shape(self, name: str, part: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
        if part.shape != shape:
            raise ValueError(
                f"{self} returned {name} of shape {tuple(part.shape)}; evaluate returns {meaning}, shape {shape}"
            )

    def _refuse(self, bad: torch.Tensor, numbers: torch.Tensor, what: str, episodes: Episode) -> None:
        """Raise for the first row of ``bad`` (N,), naming its number and text."""
        if bad.any():
            row = int(bad.nonzero()[0])
            raise NonFiniteScore(
                f"{self} {what} {numbers[row].item()} for row {row} of {len(numbers)}, whose text is "
                f"{self._text(episodes, row)!r}; look for NaN in its weights, and use float32"
            )

    def check_needs(
        self,
        needs: frozenset[str],
        methods: str = "a method that needs less (`tokenmdp credits` lists what each needs)",
    ) -> None:
        """Refuse needs beyond what this model provides.

        Args:
            needs: keys of `tokenmdp.credit.NEEDS`.
            methods: for the message, which methods there are instead.

        Raises:
            ValueError: with what is lacking, what there is, and what to use.
        """
        if lacking := sorted(needs - self.provides):
            provided = ", ".join(sorted(self.provides)) or "nothing but the score"
            online = (
                "; `tokenmdp.wrappers.OnlinePrefixReward` pays the same numbers as red with any reward model, for one "
                "forward per token"
                if "prefix_scores" in lacking
                else ""
            )
            raise ValueError(
                f"{self} does not provide {', '.join(lacking)} (it provides {provided}); use a reward model that does, "
                f"or {methods}, such as UniformReward or SparseReward, which need the score only{online}"
            )

    def _check(self, episodes: Episode, needs: frozenset[str], empty_responses: bool) -> None:
        self.check_needs(needs)
        attention_mask, response_mask = episodes.attention_mask.bool(), episodes.response_mask.bool()
        empty = (~response_mask.any(-1)).nonzero()
        if len(empty) and not empty_responses:
            raise ValueError(
                f"row {int(empty[0])} has an empty response (n_tokens 0): only an episode with at least one response "
                "token can be scored; pass the rows that ended"
            )
        if not torch.equal(attention_mask[:, episodes.prompt_slots :], response_mask):
            raise ValueError("attention_mask and response_mask disagree about the response; build both from one array")
        longest = int(attention_mask.sum(-1).max())
        if self.max_tokens is not None and longest > self.max_tokens:
            raise ValueError(
                f"a text of {longest} tokens exceeds the {self.max_tokens} positions{self.limit_reason} of {self}: "
                "shorten it (in an environment, lower max_new_tokens or max_prompt_tokens), or use a reward model with "
                "more positions"
            )

    def _text(self, episodes: Episode, row: int) -> str:
        ids = episodes.input_ids[row][episodes.attention_mask[row].bool()].tolist()
        return f"token ids {ids}" if self.tokenizer is None else str(self.tokenizer.decode(ids))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise unless every id of ``tokenizer`` names the same token here (further tokens of the model are fine).

        Raises:
            VocabularyMismatch: with both sizes and the first token that differs.
        """
        if self.tokenizer is None:
            warnings.warn(f"{self} has no tokenizer files: its vocabulary could not be compared", stacklevel=2)
            return
        first = _first_difference(tokenizer, self.tokenizer, len(tokenizer), len(self.tokenizer))
        if first is not None:
            index, token, other = first
            raise VocabularyMismatch(
                f"the environment's tokenizer has {len(tokenizer)} tokens and {self} has {len(self.tokenizer)}; the "
                f"first that differs is id {index}: {token!r} in the environment, {other!r} in the reward model. "
                "Pass align='offsets' to let the reward model read the text with its own tokenizer and to move its "
                "credit by characters (in the command, --align offsets); or tokenizer= (--tokenizer) with the reward "
                "model's own and a policy trained with it"
            )

    @property
    def device(self) -> torch.device:
        """The device it computes on; the CPU unless a subclass says otherwise."""
        return torch.device("cpu")

    def to_json(self) -> dict[str, Any]:
        """The arguments of `load_reward_model` that rebuild this model.

        Raises:
            TypeError: it was built from objects and has no name.
        """
        if self.name is None:
            raise TypeError(f"{self} was built from objects, so JSON cannot hold it. {self.remedy()}")
        return {"name": self.name, **self.options}

    def remedy(self) -> str:
        """How to get a named model instead of this object."""
        return "Pass a name that load_reward_model knows, such as a directory, instead of the object"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is not None and self.reloader is not None:
            return self.reloader, (self.name, self.options)
        return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]

    def __copy__(self) -> RewardModel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RewardModel:
        """The model itself: Gymnasium copies keyword arguments for every wrapper, and weights must not multiply."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name or 'unnamed'})"


@lru_cache(maxsize=16)  # 64 environments check the same pair of 50,000 tokens
def _first_difference(
    tokenizer: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, size: int, our_size: int
) -> tuple[int, str, str] | None:
    """The lowest id of another token in ``ours``, with both tokens; sizes reveal only vocabularies that grew."""
    known = ours.get_vocab()
    differing = [(index, token) for token, index in tokenizer.get_vocab().items() if known.get(token) != index]
    if not differing:
        return None
    index, token = min(differing)
    names = {position: name for name, position in known.items()}
    return index, token, names.get(index, "no token")
