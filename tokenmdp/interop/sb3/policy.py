"""A pretrained causal language model as the policy of Stable-Baselines3 and sb3-contrib.

    PPO(CausalLMActorCriticPolicy, env, policy_kwargs={"model": "imdb-tiny"})
    MaskablePPO(MaskableCausalLMActorCriticPolicy, env, policy_kwargs={"model": "imdb-tiny"})

Both hold a `tokenmdp.models.policy.CausalLMPolicy`, so logits, positions, precision and value head are those of this
package's own agent. One forward gives the policy and the value. During collection a step costs one token per row
(`tokenmdp.models.state_reader`); `evaluate_actions` always reads the whole texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenmdp.models.loading import holds_tokenizer, load_tokenizer
from tokenmdp.models.names import resolve
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.policy_fit import check_vocabulary
from tokenmdp.models.state_reader import StateReader, last_slots, read_states
from tokenmdp.models.token_distribution import NEVER
from tokenmdp.models.tokens import VocabularyMismatch

try:
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
    from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
except ImportError as error:
    raise DependencyNotInstalled(
        f"Stable-Baselines3 or sb3-contrib is not installed ({error}); pip install 'tokenmdp[sb3]'"
    ) from error

if TYPE_CHECKING:
    from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.envs.task import TextGenTask


def causal_lm_kwargs(model: str, task: TextGenTask, **options: Any) -> dict[str, Any]:
    """``policy_kwargs`` for the environments of ``task``, after comparing the model's own tokenizer with theirs.

    Needed where ``min_new_tokens > 0`` and the algorithm takes no action masks; elsewhere ``{"model": model}`` does.

    Raises:
        VocabularyMismatch: the model's tokenizer is a different one.

    >>> import gymnasium as gym
    >>> causal_lm_kwargs("imdb-tiny", gym.make("tokenmdp:TextGen-IMDb-v0", min_new_tokens=4).unwrapped.task)
    {'model': 'imdb-tiny', 'min_new_tokens': 4, 'eos_token_id': 0, 'max_prompt_tokens': 16}
    """
    check_vocabulary(model, task.tokenizer)
    described = {
        "min_new_tokens": task.min_new_tokens,
        "eos_token_id": task.eos_token_ids[0] if len(task.eos_token_ids) == 1 else list(task.eos_token_ids),
        "max_prompt_tokens": task.max_prompt_tokens,
    }
    return {"model": model, **described, **options}


class CausalLMMixin(BasePolicy):
    """The common part of the two policies; it precedes Stable-Baselines3's class in the bases.

    Args:
        observation_space: Of a TextGen environment; ``horizon``, where it is in there, is not read.
        action_space: Discrete(V).
        lr_schedule: Stable-Baselines3 passes it. PPO's default of 3e-4 is meant for small new networks and tears a
            pretrained model apart; start at ``learning_rate=2e-5``.
        model: An alias, a directory or a hub name; a directory of `save_pretrained` brings its value head. Saved
            algorithms hold this name and build the model from it again before they take their weights from the file.
        temperature: Divides the logits.
        min_new_tokens: The environment's; end of text has probability 0 before. Needs the next two.
        eos_token_id: The environment's, or several.
        max_prompt_tokens: The environment's; response token 0 stands in this slot.
        compute_dtype: ``torch.bfloat16`` runs the forwards under autocast; weights stay float32.
        vf_learning_rate: Of the value head, which is new and starts at zero, where the schedule starts; from there it
            follows the schedule. At the language model's own rate the head explains next to nothing for many updates.
        reuse_cache: Whether collection and ``predict`` feed only new tokens; may be switched at any time.
        optimizer_class: As in Stable-Baselines3.
        optimizer_kwargs: As in Stable-Baselines3.
        use_sde: Stable-Baselines3 passes it, and refuses True for discrete actions by itself.

    Attributes:
        causal_lm: The language model and its value head, a `tokenmdp.models.policy.CausalLMPolicy`.

    Raises:
        TypeError: the spaces are not those of a TextGen environment, or ``model`` is not a name.
        VocabularyMismatch: the model's tokenizer does not have V tokens.
        ValueError: too few logits or positions, or a model whose logits are not ``lm_head(backbone(ids))``.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        model: str,
        *,
        temperature: float = 1.0,
        min_new_tokens: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        max_prompt_tokens: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
        vf_learning_rate: float = 3e-3,
        reuse_cache: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
    ) -> None:
        slots, vocab_size = _check_spaces(observation_space, action_space)
        if not isinstance(model, str):
            raise TypeError(
                f"model is a {type(model).__name__}, which saved files would hold a second time; write it to a "
                "directory with save_pretrained and pass the directory's name"
            )
        if min_new_tokens and (eos_token_id is None or max_prompt_tokens is None):
            raise ValueError(
                f"min_new_tokens={min_new_tokens} needs eos_token_id and max_prompt_tokens, which observations do not "
                "tell; pass policy_kwargs=causal_lm_kwargs(model, env.unwrapped.task)"
            )
        _check_tokenizer_size(model, vocab_size)
        # Its own min_new_tokens counts from the start of a batch; rows here are at different steps, see `_read`.
        causal_lm = CausalLMPolicy.from_pretrained(
            model, vocab_size, eos_token_id or 0, temperature=temperature, compute_dtype=compute_dtype
        )
        causal_lm.check_positions(slots)
        super().__init__(
            observation_space, action_space, lr_schedule, optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )  # fmt: skip
        self.causal_lm = causal_lm
        self.reuse_cache = reuse_cache
        ends = torch.as_tensor(eos_token_id or 0).reshape(-1)
        self._early_end = (min_new_tokens, ends, max_prompt_tokens or 0)
        self._reader = StateReader(causal_lm)
        self._arguments = {
            "model": model, "temperature": temperature, "min_new_tokens": min_new_tokens, "eos_token_id": eos_token_id,
            "max_prompt_tokens": max_prompt_tokens, "compute_dtype": compute_dtype,
            "vf_learning_rate": vf_learning_rate,
        }  # fmt: skip
        self._rates = (lr_schedule(1), vf_learning_rate)
        self.optimizer = optimizer_class(causal_lm.parameter_groups(*self._rates), **self.optimizer_kwargs)
        self.optimizer.register_step_pre_hook(self._set_vf_learning_rate)

    def _build(self, lr_schedule: Schedule) -> None:
        """Build nothing: the base class would add its own networks and re-initialise ours (``ortho_init``)."""

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose one token per row: (action (N,) int64, value (N, 1), log-probability (N,))."""
        logits, values = self._read(obs, reuse=True)
        distribution = self._distribution(logits, action_masks)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor, action_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score tokens in states, from whole texts: (value (N, 1), log-probability (N,), entropy (N,))."""
        logits, values = self._read(obs, reuse=False)
        distribution = self._distribution(logits, action_masks)
        return values, distribution.log_prob(actions), cast(torch.Tensor, distribution.entropy())

    def get_distribution(self, obs: PyTorchObs, action_masks: Any = None) -> Any:
        """The distribution over the next token."""
        # TRPO differentiates this twice, which the fused attention kernels cannot.
        twice = sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else contextlib.nullcontext()
        with twice:
            logits, _ = self._read(obs, reuse=True)
        return self._distribution(logits, action_masks)

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """The value of each state: (N, 1)."""
        return self._read(obs, reuse=True)[1]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False, action_masks: Any = None) -> torch.Tensor:
        return self.get_distribution(observation, action_masks).get_actions(deterministic=deterministic)

    def train(self, mode: bool = True) -> CausalLMMixin:
        """Declare whether weights are about to change. The model itself stays in eval mode: see `CausalLMPolicy.train`.

        No cache is kept in training mode: TRPO's line search reads states between changes of the weights.
        """
        if mode:
            self._reader.forget()
        return super().train(mode)

    def save_pretrained(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write a directory for ``from_pretrained`` and for ``model=``: language model, value head, tokenizer if given.

        ``tokenizer=env.unwrapped.tokenizer`` lets the next environment take its tokenizer from there too.
        """
        self.causal_lm.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    def _set_vf_learning_rate(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before each step: Stable-Baselines3 has given every group the schedule's rate."""
        (start, vf_learning_rate), (body, head) = self._rates, optimizer.param_groups
        head["lr"] = vf_learning_rate * (body["lr"] / start if start else 1.0)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return self._arguments | {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "reuse_cache": self.reuse_cache,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def _read(self, obs: PyTorchObs, reuse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Processed logits (N, V) and values (N, 1) of the states in ``obs``."""
        input_ids, attention_mask = _texts(cast("Mapping[str, torch.Tensor]", obs), self.causal_lm.vocab_size)
        if reuse and self.reuse_cache and not self.training and not torch.is_grad_enabled():
            state = self._reader.read(input_ids, attention_mask)
        else:
            state = read_states(self.causal_lm, input_ids, attention_mask)
        logits = state.logits
        min_new_tokens, eos_token_ids, max_prompt_tokens = self._early_end
        if min_new_tokens:
            too_early = last_slots(attention_mask) + 1 - max_prompt_tokens < min_new_tokens  # (N, 1)
            is_eos = torch.isin(torch.arange(logits.shape[1]), eos_token_ids).to(logits.device)  # (V,)
            logits = logits.masked_fill(too_early & is_eos, NEVER)
        return logits, state.value[:, None]

    def _distribution(self, logits: torch.Tensor, action_masks: Any) -> Any:
        distribution: Any = cast(Any, self).action_dist.proba_distribution(action_logits=logits)
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution


class CausalLMActorCriticPolicy(CausalLMMixin, ActorCriticPolicy):
    """For PPO, A2C and TRPO. See `CausalLMMixin` for ``policy_kwargs``."""


class MaskableCausalLMActorCriticPolicy(CausalLMMixin, MaskableActorCriticPolicy):
    """For sb3-contrib's MaskablePPO. See `CausalLMMixin` for ``policy_kwargs``; masks need no ``min_new_tokens``."""


def _check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> tuple[int, int]:
    """(slots P+H, tokens V) of a TextGen environment's spaces."""
    keys = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    if not keys.keys() >= {"input_ids", "attention_mask"} or not isinstance(action_space, spaces.Discrete):
        raise TypeError(
            f"observations {observation_space} and actions {action_space} are not those of a TextGen environment, "
            "Dict(input_ids, attention_mask) and Discrete(V); remove wrappers that flatten or replace them"
        )
    return cast(spaces.Box, keys["input_ids"]).shape[-1], int(action_space.n)


def _check_tokenizer_size(model: str, vocab_size: int) -> None:
    """Refuse a model that comes with a tokenizer of another size; more cannot be seen from the spaces."""
    path = resolve("policy", model)
    if Path(path).is_dir() and not holds_tokenizer(path):
        return
    size = len(load_tokenizer(path))
    if size != vocab_size:
        raise VocabularyMismatch(
            f"the environment has {vocab_size} tokens and the tokenizer of {model!r} {size}; "
            f"make the environment with tokenizer={model!r}, and a reward model that reads it"
        )


def _texts(obs: Mapping[str, torch.Tensor], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (N, S) int64 and mask (N, S) bool: rollout buffers turn both into float32.

    Raises:
        ValueError: they are not ids and marks any more, as after VecNormalize.
    """
    input_ids, attention_mask = obs["input_ids"].long(), obs["attention_mask"].bool()
    length = attention_mask.sum(1)
    one_run = last_slots(attention_mask).squeeze(1) + 1 - attention_mask.int().argmax(1) == length
    right = (
        (input_ids == obs["input_ids"]).all()
        & (attention_mask == obs["attention_mask"]).all()
        & (input_ids >= 0).all()
        & (input_ids < vocab_size).all()
        & (one_run & (length > 0)).all()
    )
    if not right:
        raise ValueError(
            f"observations are not token ids in [0, {vocab_size}) with one run of visible slots a row, but input_ids "
            f"{obs['input_ids'].flatten()[:4].tolist()}.. and attention_mask "
            f"{obs['attention_mask'].flatten()[:4].tolist()}..; with VecNormalize pass norm_obs=False"
        )
    return input_ids, attention_mask
