"""What a reward model is: finished episodes in, one score a row out, with the checks that all of them share."""

from __future__ import annotations

import copyreg
import threading
import warnings
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tokenmdp.loading import ALIASES, fingerprint, resolve
from tokenmdp.types import Episode, RewardOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Score = int | Literal["auto"]

_loaded: dict[tuple[Any, ...], RewardModel] = {}
_lock = threading.RLock()


class VocabularyMismatch(ValueError):
    """The reward model would read other words than the policy wrote."""


class NonFiniteScore(ValueError):
    """A score or an attention row is NaN or infinite; the message names the row and its text."""


class RewardModel(ABC):
    """Scores finished episodes. A subclass sets the attributes it needs and writes `evaluate`.

    Args:
        tokenizer: the vocabulary the model reads; None where it is not known.
        name: what `load_reward_model` reloads it from, in specs and pickles; None if built from objects.
        options: the keyword arguments of that reload.
    """

    provides: frozenset[str] = frozenset()  # what `needs` may ask for, such as "attention"
    max_tokens: int | None = None  # the longest prompt + response it reads; None is unlimited

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
    def evaluate(self, episodes: Episode, attention: bool) -> RewardOutput:
        """Scores (N,), and the attention row (N, H) if ``attention``; on any device, any float dtype."""

    def __call__(self, episodes: Episode, *, needs: frozenset[str] = frozenset()) -> RewardOutput:
        """Score N episodes in one go.

        Returns:
            scores (N,) and, if ``needs`` has "attention", the row (N, H): float32 on the CPU. Each row's numbers
            depend on its own prompt and response only, not on the padding or on the other rows.

        Raises:
            ValueError: an empty response, a text longer than ``max_tokens``, masks that disagree, a need that
                the model does not provide, or a score or row of another shape.
            NonFiniteScore: a score or an attention row is NaN or infinite.
        """
        self._check(episodes, needs)
        score, attention = self.evaluate(episodes, "attention" in needs)
        score = score.detach().to("cpu", torch.float32)
        if score.shape != episodes.response_mask.shape[:1]:  # (N, 1) would broadcast to (N, N) in the credit
            raise ValueError(
                f"{self} returned scores of shape {tuple(score.shape)} for {len(episodes.response_mask)} episodes; "
                "evaluate returns one number an episode, shape (N,)"
            )
        self._refuse(~torch.isfinite(score), score, "scored", episodes)
        if attention is None:
            return RewardOutput(score)
        attention = attention.detach().to("cpu", torch.float32)
        if attention.shape != episodes.response_mask.shape:
            raise ValueError(
                f"{self} returned attention of shape {tuple(attention.shape)}; evaluate returns one weight a response "
                f"slot, shape {tuple(episodes.response_mask.shape)}"
            )
        response = attention.masked_fill(~episodes.response_mask.bool().cpu(), 0.0).sum(-1)
        self._refuse(~torch.isfinite(response), response, "gave an attention row that sums to", episodes)
        return RewardOutput(score, attention)

    def _refuse(self, bad: torch.Tensor, numbers: torch.Tensor, what: str, episodes: Episode) -> None:
        """Raise for the first row of ``bad`` (N,), naming its number and text."""
        if bad.any():
            row = int(bad.nonzero()[0])
            raise NonFiniteScore(
                f"{self} {what} {numbers[row].item()} for row {row} of {len(numbers)}, whose text is "
                f"{self._text(episodes, row)!r}; look for NaN in its weights, and use float32"
            )

    def _check(self, episodes: Episode, needs: frozenset[str]) -> None:
        if lacking := sorted(needs - self.provides):
            provided = ", ".join(sorted(self.provides)) or "nothing but the score"
            raise ValueError(
                f"{self} does not provide {', '.join(lacking)} (it provides {provided}); use a reward model that does, "
                "or UniformReward or SparseReward, which need the score only"
            )
        attention_mask, response_mask = episodes.attention_mask.bool(), episodes.response_mask.bool()
        empty = (~response_mask.any(-1)).nonzero()
        if len(empty):
            raise ValueError(
                f"row {int(empty[0])} has an empty response (n_tokens 0): only an episode with at least one response "
                "token can be scored; pass the rows that ended"
            )
        if not torch.equal(attention_mask[:, episodes.prompt_slots :], response_mask):
            raise ValueError("attention_mask and response_mask disagree about the response; build both from one array")
        longest = int(attention_mask.sum(-1).max())
        if self.max_tokens is not None and longest > self.max_tokens:
            raise ValueError(
                f"a text of {longest} tokens exceeds the {self.max_tokens} positions of {self}; "
                "lower max_new_tokens or max_prompt_tokens, or use a reward model with more positions"
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
                "Policy and reward model must share a vocabulary: pass tokenizer= with the reward model's own "
                "tokenizer and a policy trained with it, or another reward_model="
            )

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
        if self.name is not None:
            return _reload, (self.name, self.options)
        return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]

    def __copy__(self) -> RewardModel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RewardModel:
        """The model itself: Gymnasium copies keyword arguments once a wrapper, and weights must not multiply."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name or 'unnamed'})"


@lru_cache(maxsize=16)  # 64 environments check the same pair of 50,000 tokens
def _first_difference(
    tokenizer: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, size: int, our_size: int
) -> tuple[int, str, str] | None:
    """The lowest id that names another token in ``ours``, with both tokens; the sizes only tell grown ones apart."""
    known = ours.get_vocab()
    differing = [(index, token) for token, index in tokenizer.get_vocab().items() if known.get(token) != index]
    if not differing:
        return None
    index, token = min(differing)
    names = {position: name for name, position in known.items()}
    return index, token, names.get(index, "no token")


def _reload(name: str, options: dict[str, Any]) -> RewardModel:
    return load_reward_model(name, **options)


def load_reward_model(name: str, *, score: Score = "auto", dtype: str = "float32", device: str = "cpu") -> RewardModel:
    """The reward model of this name; loaded once a process, so that 64 environments share one.

    Names: the alias "imdb-tiny"; "lexicon" (sentiment words read with the bundled tokenizer), "lexicon:TOKENIZER" (the
    same words with another tokenizer), "toy-lexicon"; a directory with a sequence classifier; a hub repository.

    Raises:
        ModelNotFound: nothing has this name, or the hub cannot be reached.
        CheckpointError: the directory is damaged or holds no trained sequence classifier.
        ValueError: the model has several labels and ``score`` does not say which.
    """
    from tokenmdp.reward_models.hf import load_classifier
    from tokenmdp.reward_models.lexicon import load_lexicon, names_word_list

    if not isinstance(name, str):
        raise TypeError(f"a name is a string, not {type(name).__name__}; wrap a model: HFRewardModel(model, tokenizer)")
    path = resolve("reward_model", name)
    if Path(path).is_dir() and name not in ALIASES:
        name = path  # absolute: a pickle may be opened from another working directory
    word_list = names_word_list(name)  # score, dtype and device mean nothing
    key = (name,) if word_list else (name, fingerprint(path), score, dtype, device)
    with _lock:
        if key not in _loaded:
            loaded = load_lexicon(name) if word_list else load_classifier(name, score=score, dtype=dtype, device=device)
            _loaded[key] = loaded
        return _loaded[key]
