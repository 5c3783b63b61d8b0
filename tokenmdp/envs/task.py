"""The parts of one text-generation task: built and checked once, shared by the single and the vector form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import numpy as np
import torch

from tokenmdp.credit import CREDIT_METHODS, REWARD_MODEL_NEEDS
from tokenmdp.envs.prompts import Encoder, PromptSource, Truncate, prompt_source
from tokenmdp.models import encoding
from tokenmdp.models.loading import fingerprint, load_config, load_tokenizer
from tokenmdp.models.names import resolve
from tokenmdp.models.sizes import PositionLimit, configured_limit
from tokenmdp.reward_models.base import RewardModel
from tokenmdp.reward_models.ensemble import read_ensemble
from tokenmdp.reward_models.lexicon import names_word_list
from tokenmdp.reward_models.loading import check_placement, load_reward_model
from tokenmdp.reward_models.retokenized import PLAIN, check_template, readable_by
from tokenmdp.reward_models.scaled import ScaledRewardModel, check_scale
from tokenmdp.reward_models.scores import Score, score_rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.models.policy import CausalLMPolicy

Align = Literal["offsets"]

REQUIRED = ("tokenizer", "reward_model", "prompts")


@dataclass(frozen=True, eq=False)
class TextGenTask:
    """Everything about a task that does not change while episodes run. Build it with `make_task`."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # V
    eos_token_ids: tuple[int, ...]  # a response ends with any of them
    pad_token_id: int
    max_prompt_tokens: int  # P
    max_new_tokens: int  # H
    min_new_tokens: int
    horizon_range: tuple[int, int] | None
    encode_prompt: Encoder
    prompts: PromptSource
    reward_source: str | RewardModel
    reward_options: dict[str, Any]
    align: Align | None
    reward_template: str
    add_special_tokens: bool
    score_scale: float
    score_shift: float
    arguments: dict[str, Any]  # arguments of make_task, to rebuild the task from
    policies: dict[tuple[Any, ...], CausalLMPolicy] = field(default_factory=dict)  # what `load_policy` has loaded

    @property
    def eos_token_id(self) -> int:
        """The first id that ends a response."""
        return self.eos_token_ids[0]

    @cached_property
    def reward_model(self) -> RewardModel:
        """The reward model; a named one is loaded at the first use, once per process.

        Raises:
            VocabularyMismatch: it reads other tokens than the environment writes, and ``align`` is None.
            ValueError: prompt and response do not fit its positions (of one that reads the text with a tokenizer of
                its own, the scoring says so), or it has no tokenizer to align with.
        """
        source = self.reward_source
        model = source if isinstance(source, RewardModel) else load_reward_model(source, **self.reward_options)
        model = self._readable(model)
        if model.max_tokens is not None and self.max_prompt_tokens + self.max_new_tokens > model.max_tokens:
            limit = PositionLimit(model.max_tokens, model.limit_reason)
            raise ValueError(too_long(self.max_prompt_tokens, self.max_new_tokens, limit, model))
        return self._scaled(model)

    def check_needs(self, needs: frozenset[str]) -> None:
        """Refuse needs that the reward model cannot meet; a named one that is not loaded yet is checked when it is."""
        loaded = self.__dict__.get("reward_model")  # where cached_property keeps it
        if loaded is not None:
            has = loaded.provides
            runs = [
                name
                for name, method in CREDIT_METHODS.items()
                if method.needs & REWARD_MODEL_NEEDS <= has  # type: ignore[attr-defined]
            ]
            loaded.check_needs(needs, f"one of the methods that run with this one ({', '.join(runs)})")

    def load_policy(self, name: str) -> CausalLMPolicy:
        """The policy of this name for the task; loaded once per process and task, frozen, where the reward model is."""
        from tokenmdp.models.policy import (
            CausalLMPolicy,  # the only use of a policy here: making an env must not need one
        )

        path = resolve("policy", name)
        key = (path, fingerprint(path))
        if key not in self.policies:
            source = self.reward_source
            device = self.reward_options["device"] if isinstance(source, str) else source.device
            self.policies[key] = CausalLMPolicy.for_task(name, self).requires_grad_(False).to(device)
        return self.policies[key]

    def load_reward_model(self, name: str) -> RewardModel:
        """A further reward model for this task; loaded once per process, with the device and dtype of the task's.

        The task's ``score`` says which number of the task's own model to take, so it counts for that name only; so do
        ``score_scale`` and ``score_shift``.
        """
        source, options = self.reward_source, dict(self.reward_options)
        if isinstance(source, str) and resolve("reward_model", name) == resolve("reward_model", source):
            return self._scaled(self._readable(load_reward_model(name, **options)))
        del options["score"]
        return self._readable(load_reward_model(name, **options))

    def _scaled(self, model: RewardModel) -> RewardModel:
        if (self.score_scale, self.score_shift) == (1, 0):
            return model
        return ScaledRewardModel(model, self.score_scale, self.score_shift)

    def _readable(self, model: RewardModel) -> RewardModel:
        if self.align is not None:
            return readable_by(model, self.tokenizer, self.reward_template, self.add_special_tokens)
        model.check_tokenizer(self.tokenizer)
        return model

    def draw_prompt(self, rng: np.random.Generator) -> list[int]:
        """The prompt of the next episode."""
        return self.prompts.draw(rng)

    def draw_horizon(self, rng: np.random.Generator) -> int:
        """The horizon of the next episode: H, or uniform in ``horizon_range`` (both ends included)."""
        if self.horizon_range is None:
            return self.max_new_tokens
        return int(rng.integers(self.horizon_range[0], self.horizon_range[1] + 1))

    def observation_space(self) -> gym.spaces.Dict:
        """The space of one observation."""
        slots = self.max_prompt_tokens + self.max_new_tokens
        spaces: dict[str, gym.Space] = {
            "input_ids": gym.spaces.Box(0, self.vocab_size - 1, (slots,), np.int64),
            "attention_mask": gym.spaces.Box(0, 1, (slots,), np.int8),
        }
        if self.horizon_range is not None:
            spaces["horizon"] = gym.spaces.Box(*self.horizon_range, (1,), np.int64)
        return gym.spaces.Dict(spaces)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextGenTask:
        """The task itself: it never changes, and a copied environment must not copy a reward model."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_task, (self.arguments,)


def _rebuild_task(arguments: dict[str, Any]) -> TextGenTask:
    return make_task(**arguments)


def make_task(
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = "imdb-tiny",
    reward_model: str | RewardModel | None = "imdb-tiny",
    prompts: Any = "imdb-tiny",
    max_new_tokens: int = 16,
    max_prompt_tokens: int = 16,
    prompt_tokens: Sequence[int] = (2, 8),
    truncate_prompt: Truncate | None = None,
    score: Score = "auto",
    score_scale: float = 1.0,
    score_shift: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    min_new_tokens: int = 0,
    horizon_range: Sequence[int] | None = None,
    reward_device: str = "cpu",
    reward_dtype: str = "float32",
    align: Align | None = None,
    reward_template: str = PLAIN,
    prompt_template: Literal["chat"] | None = None,
    add_special_tokens: bool = True,
) -> TextGenTask:
    """Check the arguments of an environment and load what they name. Names resolve alias -> directory -> hub.

    Args:
        tokenizer: the vocabulary; V is its length. A name, or a tokenizer.
        reward_model: what scores a finished episode. A name (loaded at the first score), or a `RewardModel`.
        prompts: a list of texts, a table, or the name of a source; see `tokenmdp.envs.prompts.prompt_source`.
        max_new_tokens: the horizon H, at least 1.
        max_prompt_tokens: the prompt slots P, at least 1.
        prompt_tokens: (least, most) tokens of a text that make a prompt, for data-set sources.
        truncate_prompt: what to cut from a prompt longer than P: None refuses it, "left" or "right" drops that side.
        score: which number of a classifier is the score: "auto", an index, a label or "LABEL - LABEL"; see
            `tokenmdp.reward_models.scores.score_rule`.
        score_scale: the score is ``score_scale * (what the reward model says - score_shift)``, before any credit.
        score_shift: see there; with the mean and 1 / the standard deviation of measured scores it is normalised.
        eos_token_id: the id that ends a response, or several; default the tokenizer's, and those that a
            generation_config.json or config.json beside a named tokenizer lists.
        min_new_tokens: tokens before end-of-text becomes legal; `action_masks` shows it.
        horizon_range: (least, most), both included: draw each episode's horizon; it joins the observation.
        reward_device: where a named reward model runs.
        reward_dtype: its weights' type; less than float32 makes scores depend on the batch.
        align: what to do if the reward model has another vocabulary. None refuses it; "offsets" lets it read the
            decoded text with its own tokenizer and moves its credit to the environment's tokens by characters, see
            `tokenmdp.reward_models.RetokenizedRewardModel`. Where the vocabularies are the same this changes nothing.
        reward_template: with ``align``, the text that the reward model reads, such as "Q: {prompt} A: {response}", or
            "chat": by the chat template of the reward model's tokenizer.
        prompt_template: "chat": a prompt that is a text is a user's message in the tokenizer's chat template. (A list
            of messages is always put through it.)
        add_special_tokens: put before a text what its tokenizer puts there by itself, such as <s>: before prompts, and
            with ``align`` around what the reward model reads, as its own tokenizer has it. Ids are taken as they are.

    Raises:
        gymnasium.error.MissingArgument: a part that the environment id does not preset was not given.
        TypeError: an object that is not a reward model or tokenizer.
        ValueError: numbers that do not fit together.
        ModelNotFound: a name that resolves to nothing.
    """
    arguments = dict(locals())
    for name in REQUIRED:
        if arguments[name] is None:
            raise gym.error.MissingArgument(
                f"{name} is missing: pass {name}=..., or make TextGen-IMDb-v0 for a default"
            )
    check_scale(score_scale, score_shift)
    source = _reward_source(reward_model, score, reward_device, reward_dtype)
    tokens = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else _tokenizer_object(tokenizer)
    vocab_size = encoding.vocab_size(tokens)
    ends = _ends(tokens, tokenizer if isinstance(tokenizer, str) else None, eos_token_id)
    for eos in ends:
        if not 0 <= eos < vocab_size:
            raise ValueError(f"eos_token_id={eos} is not a token: the tokenizer's ids are 0..{vocab_size - 1}")
    if prompt_template not in (None, encoding.CHAT):
        raise ValueError(f"prompt_template={prompt_template!r} is neither None nor 'chat'")
    for name in ("max_prompt_tokens", "max_new_tokens", "min_new_tokens"):
        _check_whole(name, arguments[name])
    if max_new_tokens < 1 or max_prompt_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}, max_prompt_tokens={max_prompt_tokens}: both are at least 1")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens} is not in [0, max_new_tokens={max_new_tokens}]")
    if truncate_prompt not in (None, "left", "right"):
        raise ValueError(f"truncate_prompt={truncate_prompt!r} is not one of None, 'left' and 'right'")
    _check_alignment(align, reward_template)
    if not isinstance(add_special_tokens, bool):
        raise ValueError(f"add_special_tokens={add_special_tokens!r} is neither True nor False")
    horizons = None if horizon_range is None else _pair("horizon_range", horizon_range)
    if horizons is not None and not 1 <= horizons[0] <= horizons[1] <= max_new_tokens:
        raise ValueError(f"horizon_range={horizons} needs 1 <= least <= most <= max_new_tokens={max_new_tokens}")
    start = tuple(encoding.start_ids(tokens)) if add_special_tokens else ()
    encoder = Encoder(tokens, vocab_size, max_prompt_tokens, truncate_prompt, start, prompt_template == encoding.CHAT)
    task = TextGenTask(
        tokenizer=tokens,
        vocab_size=vocab_size,
        eos_token_ids=ends,
        pad_token_id=int(ends[0] if tokens.pad_token_id is None else tokens.pad_token_id),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        horizon_range=horizons,
        encode_prompt=encoder,
        prompts=prompt_source(prompts, encoder, _pair("prompt_tokens", prompt_tokens)),
        reward_source=source,
        reward_options={"score": score, "device": reward_device, "dtype": reward_dtype},
        align=align,
        reward_template=reward_template,
        add_special_tokens=add_special_tokens,
        score_scale=score_scale,
        score_shift=score_shift,
        arguments=arguments,
    )
    if isinstance(source, RewardModel) or names_word_list(source):
        _ = task.reward_model  # already built, or instant to load, so it is checked at construction
    else:
        check_placement(reward_dtype, reward_device)
        _check_classifier(source, score, None if align else (max_prompt_tokens, max_new_tokens))
    return task


def _check_classifier(name: str, score: Score, slots: tuple[int, int] | None) -> None:
    """Refuse a named classifier that is missing or does not fit by its config.json, without loading its weights.

    ``slots`` are those of the prompt and of the response; None if the model may count in other tokens.
    """
    if (ensemble := read_ensemble(resolve("reward_model", name))) is not None:
        for member in ensemble[0]:
            _check_classifier(member, score, slots)
        return
    config = load_config("reward_model", name)
    score_rule(score, config, name)  # raises if it is not clear
    limit = configured_limit(config)
    if limit is not None and slots is not None and sum(slots) > limit.tokens:
        raise ValueError(too_long(*slots, limit, name))


def _ends(tokenizer: PreTrainedTokenizerBase, name: str | None, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a response, without repetition.

    Raises:
        ValueError: there are none, or something else is given.
    """
    if given is not None:
        ends: list[Any] = list(given) if isinstance(given, (list, tuple, np.ndarray)) else [given]
        wrong = [end for end in ends if isinstance(end, bool) or not isinstance(end, (int, np.integer))]
        if wrong or not ends:
            raise ValueError(
                f"eos_token_id={given!r} is neither a token id nor a list of ids; "
                "tokenizer.convert_tokens_to_ids('</s>') gives the id of a token"
            )
    else:
        path = None if name is None else Path(resolve("tokenizer", name))
        ends = encoding.ends_of_text(tokenizer, path)
    if not ends:
        raise ValueError("the tokenizer has no end-of-text token; pass eos_token_id=ID")
    return tuple(dict.fromkeys(int(end) for end in ends))


def _check_alignment(align: Align | None, reward_template: str) -> None:
    if align not in (None, "offsets"):
        raise ValueError(f"align={align!r} is neither None nor 'offsets'")
    check_template(reward_template)
    if align is None and reward_template != PLAIN:
        raise ValueError(
            f"reward_template={reward_template!r} lets the reward model read another text than the environment's "
            "tokens; pass align='offsets' with it"
        )


def too_long(max_prompt_tokens: int, max_new_tokens: int, limit: PositionLimit, model: object) -> str:
    """The message for prompt and response slots beyond a reward model's positions."""
    return (
        f"max_prompt_tokens={max_prompt_tokens} + max_new_tokens={max_new_tokens} = "
        f"{max_prompt_tokens + max_new_tokens} tokens exceed the {limit} of the reward model {model}; "
        "lower one of them or use a reward model with more positions"
    )


def _reward_source(reward_model: Any, score: Score, device: str, dtype: str) -> str | RewardModel:
    if isinstance(reward_model, torch.nn.Module):
        raise TypeError(
            f"reward_model is a bare {type(reward_model).__name__}; wrap it with its tokenizer: "
            "reward_model=tokenmdp.HFRewardModel(model, tokenizer)"
        )
    if not isinstance(reward_model, (str, RewardModel)):
        raise TypeError(f"reward_model is a name or a tokenmdp.RewardModel, not {reward_model!r}")
    if isinstance(reward_model, RewardModel) and (score, device, dtype) != ("auto", "cpu", "float32"):
        raise ValueError(
            f"score={score!r}, reward_device={device!r} and reward_dtype={dtype!r} apply to a named reward model; "
            f"{reward_model} is built already, so choose them where you build it"
        )
    return reward_model


def _tokenizer_object(tokenizer: Any) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is a name or a transformers tokenizer, not {tokenizer!r}")
    return tokenizer


def _pair(name: str, value: Sequence[int]) -> tuple[int, int]:
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; give two numbers, (least, most)")
    for number in value:
        _check_whole(name, number)
    return int(value[0]), int(value[1])


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} has {value!r}; give a whole number")
