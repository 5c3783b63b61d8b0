"""TorchRL: environments whose batches carry token rewards, and the function that puts them where the loss looks.

    env = make_env("tokenmdp:TextGen-Toy-v0", vector.AttentionCreditReward, num_envs=16)
    actor, critic = actor_critic(policy)
    for batch in Collector(env, actor, frames_per_batch=1024, total_frames=100_000):
        relabel(batch)
        GAE(gamma=1.0, lmbda=0.95, value_network=critic, deactivate_vmap=True)(batch)
        loss(batch[batch["collector", "mask"]])

Tested with torchrl 0.14; needs ``pip install 'tokenmdp[torchrl]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from tokenmdp.interop.reading import mark_token_rewards_read
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.state_reader import StateReader, read_states, without_early_end
from tokenmdp.models.token_distribution import NEVER
from tokenmdp.wrappers.layers import SCALING, ChangedReward, check_conversions

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModule
    from torchrl.envs import EnvBase
    from torchrl.modules import ProbabilisticActor

KNOWN = ("collector", "mask")  # where TorchRL itself marks the frames of padded batches that are real


def make_env(
    env: str | Callable[[], gym.Env | gym.vector.VectorEnv],
    credit: Callable[[Any], Any] | None = None,
    *,
    num_envs: int | None = None,
    **arguments: Any,
) -> EnvBase:
    """A TorchRL environment whose ``("next", ...)`` holds token_rewards, token_mask, score and n_tokens.

    They are filled in the frame that ends an episode and zero elsewhere. The observation's keys stay at the root
    (``input_ids``, ``attention_mask``, and ``horizon`` where episodes draw one). With ``min_new_tokens`` an
    ``action_mask`` joins them and TorchRL's `ActionMask` transform keeps random actions legal.

    Args:
        env: an environment id, or a function that makes the environment (with its credit wrapper, if ``credit`` is
            left out). ``ParallelEnv(4, functools.partial(make_env, ID, SparseReward))`` runs four in processes; use the
            ``tokenmdp:`` form of the id there.
        credit: a wrapper class of `tokenmdp.wrappers`, or of `tokenmdp.wrappers.vector` with ``num_envs``.
        num_envs: rows of the native vector environment; default: a single one.
        **arguments: of ``gym.make`` or ``gym.make_vec``. None may be given with a function but no ``num_envs``.

    Raises:
        gymnasium.error.DependencyNotInstalled: torchrl is missing or too old.
        gymnasium.error.Error: no credit wrapper, a TimeLimit, or a vector environment that resets rows by itself.
    """
    try:
        from torchrl.data import Binary, Composite, Unbounded
        from torchrl.envs import ActionMask, GymWrapper, TransformedEnv
        from torchrl.envs.gym_like import default_info_dict_reader
    except ImportError as error:
        raise _not_installed(error) from error

    if not isinstance(env, str):
        made = env()
    elif num_envs is None:
        made = gym.make(env, **arguments)
    else:
        made = gym.make_vec(env, num_envs=num_envs, **{"autoreset_mode": AutoresetMode.DISABLED} | arguments)
    if credit is not None:
        made = credit(made)
    check_conversions(made, "make_env")
    mark_token_rewards_read(made)
    mode = made.metadata.get("autoreset_mode", AutoresetMode.DISABLED)  # a single environment resets nothing
    if mode is not AutoresetMode.DISABLED:
        raise gym.error.Error(
            f"autoreset_mode is {mode.value!r}, and TorchRL resets rows itself; make the environment with "
            'autoreset_mode="Disabled"'
        )

    base: Any = made.unwrapped
    wrapped = GymWrapper(made, categorical_action_encoding=True)
    rows, horizon = wrapped.batch_size, base.task.max_new_tokens
    spec = Composite(
        token_rewards=Unbounded((*rows, horizon), dtype=torch.float32),
        token_mask=Binary(horizon, (*rows, horizon), dtype=torch.bool),
        score=Unbounded(rows, dtype=torch.float32),
        n_tokens=Unbounded(rows, dtype=torch.int64),
        shape=rows,
    )
    masks = bool(base.min_new_tokens)
    if masks:
        spec["action_mask"] = Binary(base.task.vocab_size, (*rows, base.task.vocab_size), dtype=torch.bool)
    wrapped.set_info_dict_reader(default_info_dict_reader(list(spec.keys()), spec=spec))
    if not masks:
        return wrapped

    # A reader is TorchRL's hook into every reset and step; this one asks the environment instead of the info.
    def read_legal(info: dict[str, Any], state: TensorDictBase) -> TensorDictBase:
        return state.set("action_mask", torch.from_numpy(base.action_masks()))

    wrapped.set_info_dict_reader(read_legal)
    return TransformedEnv(wrapped, ActionMask())


def relabel(batch: TensorDictBase) -> TensorDictBase:
    """``batch["next", "reward"][i] = token_rewards[n - 1 - (end - i)]``, where frame ``end`` ends frame i's episode.

    Each frame gets its own token's reward, also in episodes that began in an earlier batch: the last frame carries
    the credit of all n tokens. ``batch["collector", "mask"]`` (..., T) bool becomes True at the frames whose reward is
    now right, and False

    * where the episode has not ended within this batch (its credit is not decided; the reward stays 0.0),
    * where it was cut off: by ``max_frames_per_traj``, ``reset_at_each_iter`` or ``set_truncated``,
    * in the padding of ``split_trajs`` and ``trajs_per_batch``.

    Compute advantages on the whole batch and learn from ``batch[batch["collector", "mask"]]``. Nothing of a False
    frame flows into a True one: all follow the end of an episode. ``trajs_per_batch`` holds frames back until their
    episode has ended, so with it no frame is lost.

    Apply it to what the collector yields, before shuffling; a second time changes nothing. As the collector's
    ``postproc`` it does for fixed-frame batches only: with ``trajs_per_batch`` TorchRL calls that before it has put the
    episodes together.

    Args:
        batch: of any collector, time last: (T,), (num_envs, T), or (trajectories, T). Changed in place.

    Raises:
        KeyError: what `make_env` puts into a batch is missing.
        ValueError: the frames are not in the order of time.
        ChangedReward: a transform or wrapper has changed the rewards, which the token rewards do not follow.
    """
    last = batch["next"]
    if "token_rewards" not in last or "attention_mask" not in batch:
        raise KeyError(
            'the batch has no ("next", "token_rewards") or no "attention_mask": make the environment with '
            "`make_env` and relabel before leaving keys out"
        )
    done, steps = last["done"].squeeze(-1), torch.arange(batch.shape[-1], device=last["done"].device)
    end = torch.where(done, steps, len(steps)).flip(-1).cummin(-1).values.flip(-1)  # (..., T); T: not in this batch
    known, end = end < len(steps), end.clamp(max=len(steps) - 1)
    known &= last["terminated"].squeeze(-1).gather(-1, end)
    if ("collector", "traj_ids") in batch.keys(True):  # collectors that run in several processes lay theirs end to end
        episode = batch["collector", "traj_ids"]
        known &= episode == episode.gather(-1, end)
    if KNOWN in batch.keys(True):
        known &= batch[KNOWN]
    token = last["n_tokens"].gather(-1, end) - 1 - (end - steps)  # (..., T): which of the episode's tokens this is
    horizon = last["token_rewards"].shape[-1]
    seen = batch["attention_mask"][..., -horizon:].sum(-1)  # (..., T): response tokens before this one
    if (token != seen)[known].any():
        raise ValueError(
            "the frames of an episode are not in the order of time; relabel a batch as the collector yields it, before "
            "shuffling or slicing"
        )
    credit = torch.take_along_dim(last["token_rewards"], end.unsqueeze(-1), dim=-2)  # (..., T, H)
    rewards = credit.gather(-1, token.clamp(min=0).unsqueeze(-1))  # (..., T, 1)
    _check_rewards(last, rewards.squeeze(-1), known, end)
    batch["next", "reward"] = torch.where(known.unsqueeze(-1), rewards, last["reward"])
    batch[KNOWN] = known
    return batch


def _check_rewards(last: TensorDictBase, earned: torch.Tensor, known: torch.Tensor, end: torch.Tensor) -> None:
    """Refuse a batch in which an episode's rewards are neither its score in the end nor its token rewards.

    Args:
        last: ``batch["next"]``.
        earned: (..., T) each frame's token reward.
        known: (..., T) bool: frames whose episode ended in the batch.
        end: (..., T) the frame in which it did.
    """
    rewards = last["reward"].squeeze(-1).double()
    scores = torch.where(last["done"].squeeze(-1), last["score"], 0.0).double()
    differ = [
        torch.zeros_like(end).scatter_add(-1, end, (known & ~same).long()).gather(-1, end)  # in the frame's episode
        for same in (torch.isclose(rewards, expected, rtol=1e-5, atol=1e-6) for expected in (scores, earned.double()))
    ]
    wrong = (known & (differ[0] > 0) & (differ[1] > 0)).flatten()
    if wrong.any():
        frame = int(wrong.nonzero()[0])
        raise ChangedReward(
            f"a frame has the reward {rewards.flatten()[frame]:g}, and {scores.flatten()[frame]:g} was expected: a "
            "reward transform of TorchRL (RewardScaling, RewardClipping) or a reward wrapper has changed it; token "
            f"rewards take its place and would not follow. {SCALING}"
        )


def actor_critic(policy: CausalLMPolicy) -> tuple[ProbabilisticActor, TensorDictModule]:
    """The policy as TorchRL's losses want it: an actor (writes ``action``) and a critic (writes ``state_value``).

    Both train ``policy`` in place and share its transformer. Without gradients (in a collector), the actor
    keeps a key-value cache and reads one token per step. HF models do not run under vmap, so give `GAE`
    ``deactivate_vmap=True``.

    Raises:
        gymnasium.error.DependencyNotInstalled: torchrl is missing or too old.
        ValueError: ``top_k``, under which a token the actor has sampled may later have probability 0.
    """
    try:
        from tensordict.nn import TensorDictModule
        from torchrl.modules import ProbabilisticActor
    except ImportError as error:
        raise _not_installed(error) from error

    if policy.top_k:
        raise ValueError(
            f"top_k={policy.top_k}: TorchRL scores a sampled token under the current top k, where it may be missing "
            "(an infinite ratio); build the policy with top_k=0"
        )
    observation = ["input_ids", "attention_mask"]
    masked = ["action_mask"] if policy.min_new_tokens else []
    actor = ProbabilisticActor(
        TensorDictModule(TokenLogits(policy), in_keys=observation + masked, out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, TensorDictModule(StateValue(policy), in_keys=observation, out_keys=["state_value"])


class TokenLogits(nn.Module):
    """``logits(observation)`` (..., V): the processed next-token logits of a `CausalLMPolicy`."""

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__()
        self.policy = without_early_end(policy)
        self._reader: StateReader | None = None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, action_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Observations (..., S), and (..., V) bool of what is legal."""
        rows, ids, mask = _flat(input_ids, attention_mask)
        if torch.is_grad_enabled():
            logits = read_states(self.policy, ids, mask).logits
        else:
            self._reader = self._reader or StateReader(self.policy)
            logits = self._reader.read(ids, mask).logits.clone()
        logits = logits.unflatten(0, rows) if rows else logits.squeeze(0)
        return logits if action_mask is None else logits.masked_fill(~action_mask, NEVER)


class StateValue(nn.Module):
    """``V(observation)`` (..., 1): the value head of a `CausalLMPolicy`."""

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__()
        self.policy = without_early_end(policy)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Observations (..., S)."""
        rows, ids, mask = _flat(input_ids, attention_mask)
        return read_states(self.policy, ids, mask).value.reshape(*rows, 1)


def _not_installed(error: ImportError) -> gym.error.DependencyNotInstalled:
    return gym.error.DependencyNotInstalled(
        f"torchrl is not installed or too old ({error}); run `pip install 'tokenmdp[torchrl]'`"
    )


def _flat(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
    """The leading shape, then ids (N, S) int64 and mask (N, S) bool. Rows without a token (padding) read slot 0."""
    ids, mask = input_ids.reshape(-1, input_ids.shape[-1]), attention_mask.reshape(-1, input_ids.shape[-1]).bool()
    mask = mask.clone()
    mask[:, 0] |= ~mask.any(1)
    return tuple(input_ids.shape[:-1]), ids, mask
