import functools
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from known_credit import EOS, TOY, KnownCredit, often_ending, position, single, true_reward

from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.returns import gae
from tokenmdp.runs.environments import toy_policy
from tokenmdp.wrappers import SparseReward, vector

pytest.importorskip("torchrl", reason="needs the torchrl extra: pip install 'tokenmdp[torchrl]'")

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import ParallelEnv, check_env_specs
from torchrl.objectives.value import GAE

from tokenmdp.interop.torchrl import actor_critic, make_env, relabel

MASK = ("collector", "mask")


def native(num_envs=3, **arguments):
    envs = gym.make_vec(TOY, num_envs=num_envs, autoreset_mode="Disabled", **arguments)
    return vector.CreditReward(envs, KnownCredit())


class Log(gym.Wrapper):
    """The true token reward of every step of a single environment, in the order of time."""

    def reset(self, **arguments):
        obs, info = self.env.reset(**arguments)
        self.position = position(obs)  # now: TorchRL changes the observation's dict
        return obs, info

    def step(self, action):
        self.truth = [*getattr(self, "truth", []), true_reward(action, self.position)]
        obs, *rest = self.env.step(action)
        self.position = position(obs)
        return obs, *rest


class VectorLog(gym.vector.VectorWrapper):
    """The same for the native vector environment, whose rows TorchRL resets as soon as they have ended."""

    autoreset_mode = gym.vector.AutoresetMode.DISABLED
    reset, step = Log.reset, Log.step


def writer():
    """A policy that ends texts often."""
    rng = np.random.default_rng(0)

    def write(input_ids):
        tokens = often_ending(rng, input_ids[..., 0].numel())
        return torch.as_tensor(tokens).reshape(input_ids.shape[:-1])

    return TensorDictModule(write, in_keys=["input_ids"], out_keys=["action"])


def collector(env, frames, batches=1, policy=None, **options):
    return Collector(
        env,
        policy or writer(),
        frames_per_batch=frames,
        total_frames=frames * batches,
        auto_register_policy_transforms=False,
        **options,
    )


def truth_in(batch):
    """The true reward of every frame, from its own observation and action; (..., T)."""
    return true_reward(batch["action"], position(batch))


@pytest.mark.parametrize("num_envs", [None, 3])
@pytest.mark.parametrize("arguments", [{}, {"horizon_range": (2, 8)}, {"min_new_tokens": 3}])
def test_torchrls_own_check_of_specs_passes(num_envs, arguments):
    env = make_env(TOY, SparseReward if num_envs is None else vector.SparseReward, num_envs=num_envs, **arguments)
    check_env_specs(env)
    assert ("horizon" in set(env.observation_spec)) == ("horizon_range" in arguments)
    for frames in (env.rollout(20, break_when_any_done=False), env.rollout(20, break_when_any_done=False)):
        assert frames["next", "terminated"].any()  # min_new_tokens: no random action was illegal


@pytest.mark.parametrize("num_envs", [None, 3])
def test_every_frame_gets_its_own_tokens_reward(num_envs):
    logged = Log(single()) if num_envs is None else VectorLog(native(num_envs))
    rows, checked, straddling, undecided = num_envs or 1, 0, 0, 0
    steps, log = 11, np.zeros((0, rows))
    before = np.full(rows, -1)
    for batch in collector(make_env(lambda: logged), steps * rows, batches=700 // (steps * rows)):
        relabel(batch)
        batch = batch.reshape(rows, steps)
        log = np.array(logged.truth[-steps:]).reshape(steps, rows).T
        episodes, known = batch["collector", "traj_ids"].numpy(), batch[MASK].numpy()
        ended = {episodes[place] for place in zip(*np.nonzero(batch["next", "done"].squeeze(-1).numpy()), strict=True)}
        np.testing.assert_array_equal(known, np.isin(episodes, list(ended)))
        rewards = batch["next", "reward"].squeeze(-1).numpy()
        np.testing.assert_allclose(rewards[known], log[known], rtol=1e-6)
        assert (rewards[~known] == 0).all()
        checked += known.sum()
        straddling += (known & (episodes == before[:, None])).sum()
        undecided += (~known).sum()
        before = episodes[:, -1]
    assert checked >= 500
    assert straddling > 25
    assert undecided > 25


def test_parallel_environments():
    env = ParallelEnv(2, functools.partial(make_env, single), mp_start_method="fork")
    checked = undecided = 0
    for batch in collector(env, frames=2 * 53, batches=6):
        known = relabel(batch)[MASK]
        assert batch.shape == (2, 53)
        for row in range(2):  # up to the last end of an episode
            ends = batch["next", "terminated"][row].squeeze(-1).nonzero()
            assert torch.equal(known[row], torch.arange(53) <= ends.max())
        torch.testing.assert_close(batch["next", "reward"].squeeze(-1)[known].double(), truth_in(batch)[known].double())
        assert not torch.equal(batch["action"][0], batch["action"][1])
        checked += int(known.sum())
        undecided += int((~known).sum())
    assert checked >= 500
    assert undecided > 5


@pytest.mark.parametrize("layout", ["padded", "cat"])
@pytest.mark.parametrize("num_envs", [None, 3])
def test_whole_trajectories_lose_no_frame(num_envs, layout):
    env = make_env(single) if num_envs is None else make_env(native)
    checked = 0
    for batch in collector(env, 30, batches=10, trajs_per_batch=6, traj_format=layout):
        real = batch[MASK].clone() if layout == "padded" else torch.ones(batch.shape, dtype=torch.bool)
        known = relabel(batch)[MASK]
        assert torch.equal(known, real)
        torch.testing.assert_close(batch["next", "reward"].squeeze(-1)[known], truth_in(batch)[known].float())
        assert (batch["next", "reward"].squeeze(-1)[~known] == 0).all()
        checked += int(known.sum())
    assert checked > 150


@pytest.mark.parametrize(
    "options",
    [
        {"max_frames_per_traj": 3},
        {"set_truncated": True},
        {"reset_at_each_iter": True},
        {"split_trajs": True},
        {"track_traj_ids": False},
    ],
)
@pytest.mark.filterwarnings("ignore:split_trajs=True")
def test_cut_off_episodes_are_masked_and_the_others_exact(options):
    lost = exact = 0
    for batch in collector(make_env(native), 33, batches=6, **options):
        padding = ~batch[MASK].clone() if options.get("split_trajs") else torch.zeros(batch.shape, dtype=torch.bool)
        known = relabel(batch)[MASK]
        done, terminated = (batch["next", key].squeeze(-1) for key in ("done", "terminated"))
        for row in range(len(batch)):  # by hand: walk back from the end
            decided = False
            for t in reversed(range(batch.shape[1])):
                if done[row, t]:
                    decided = bool(terminated[row, t])
                assert known[row, t] == (decided and not padding[row, t])
        torch.testing.assert_close(batch["next", "reward"].squeeze(-1)[known], truth_in(batch)[known].float())
        exact += int(known.sum())
        lost += int((~known & ~padding).sum())
    assert exact > 20
    assert lost > 5


def test_relabel_twice_or_as_postproc_is_the_same():
    (batch,) = collector(make_env(native), 60)
    once = relabel(batch.clone())
    twice = relabel(once.clone())
    for processed in (twice, *collector(make_env(native), 60, postproc=relabel)):
        known = processed[MASK]
        assert known.float().mean() > 0.5
        torch.testing.assert_close(processed["next", "reward"][known].squeeze(-1), truth_in(processed)[known].float())
    assert (once == twice).all()


def test_batches_of_several_processes_laid_end_to_end():
    """The open episode at the end of one batch is not taken for the beginning of the next one's."""
    parts = []
    for number, batch in enumerate(collector(make_env(single), 25, batches=2, reset_at_each_iter=True)):
        batch["collector", "traj_ids"] += 1000 * number
        parts.append(batch)
    together = relabel(torch.cat(parts))
    for part, start in zip(parts, (0, 25), strict=True):
        known = relabel(part)[MASK]
        assert not known[-1]  # it ends with an open episode
        assert known.any()
        assert torch.equal(known, together[MASK][start : start + 25])
        torch.testing.assert_close(part["next", "reward"][known], together["next", "reward"][start : start + 25][known])


def language_model(**arguments):
    torch.manual_seed(0)
    model = CausalLMPolicy.for_task(toy_policy(0), native(**arguments).unwrapped.task)
    torch.nn.init.normal_(model.value_head.weight)
    model.lm.get_output_embeddings().weight.data[EOS] *= 3
    return model


def test_torchrls_gae_is_gae_of_each_episode():
    policy = language_model()
    actor, critic = actor_critic(policy)
    compared = 0
    for batch in collector(make_env(native), 3 * 17, batches=3, policy=actor):
        relabel(batch)
        with torch.no_grad():
            GAE(gamma=0.9, lmbda=0.8, value_network=critic, deactivate_vmap=True)(batch)
        for episode in batch["collector", "traj_ids"][batch[MASK]].unique():
            rows = batch["collector", "traj_ids"] == episode
            frames = batch[rows]
            whole = policy.evaluate(
                frames["next", "input_ids"][-1:], frames["next", "attention_mask"][-1:].bool(), prompt_slots=4
            )
            length = len(frames)  # what lies in this batch: perhaps only the end of the episode
            total = int(frames["next", "n_tokens"][-1])
            values = whole.values[0, total - length : total].detach()
            torch.testing.assert_close(frames["state_value"].squeeze(-1), values, rtol=1e-4, atol=1e-4)
            advantages, returns = gae(truth_in(frames).float(), values, torch.ones(length, dtype=torch.bool), 0.9, 0.8)
            torch.testing.assert_close(frames["advantage"].squeeze(-1), advantages, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(frames["value_target"].squeeze(-1), returns, rtol=1e-4, atol=1e-4)
            compared += length
    assert compared > 100


@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_the_actor_is_the_policy(min_new_tokens):
    """The log-probabilities of collecting (cached) and of the loss (with gradients) are the policy's own."""
    policy = language_model(min_new_tokens=min_new_tokens)
    actor, critic = actor_critic(policy)
    env = (
        make_env(native, min_new_tokens=min_new_tokens)
        if min_new_tokens == 0
        else make_env(TOY, vector.SparseReward, num_envs=3, min_new_tokens=min_new_tokens)
    )
    (batch,) = collector(env, 3 * 24, policy=actor, trajs_per_batch=None)
    relabel(batch)
    again = actor.get_dist(batch.select("input_ids", "attention_mask", "action_mask", strict=False))
    torch.testing.assert_close(again.log_prob(batch["action"]), batch["action_log_prob"], rtol=1e-4, atol=1e-5)
    assert again.logits.requires_grad
    compared = 0
    for episode in batch["collector", "traj_ids"].unique():
        frames = batch[batch["collector", "traj_ids"] == episode]
        if frames["next", "n_tokens"][-1] == len(frames):  # all of it is here
            whole = policy.evaluate(
                frames["next", "input_ids"][-1:], frames["next", "attention_mask"][-1:].bool(), prompt_slots=4
            )
            expected = whole.logprobs[0, : len(frames)].detach()
            torch.testing.assert_close(frames["action_log_prob"], expected, rtol=1e-4, atol=1e-5)
            assert len(frames) > min_new_tokens
            compared += len(frames)
    assert compared > 30
    shared = {id(parameter) for parameter in policy.parameters()}
    assert {id(parameter) for module in (actor, critic) for parameter in module.parameters()} == shared


def test_weights_sent_to_a_collector_reach_its_cache():
    """TorchRL writes them through ``parameter.data``, which PyTorch does not count as a change."""
    collecting, learning = language_model(), language_model()
    for weight in learning.parameters():
        weight.data.mul_(1.5)
    (actor, _), (target, _) = actor_critic(collecting), actor_critic(learning)
    running = collector(make_env(native), 3 * 5, batches=8, policy=actor)
    off = []
    for batch in running:
        exact = target.get_dist(batch.select("input_ids", "attention_mask")).log_prob(batch["action"])
        off.append((exact - batch["action_log_prob"]).abs().max().item())
        running.update_policy_weights_(TensorDict.from_module(target))
    assert off[0] > 0.1
    assert max(off[1:]) < 1e-4


def test_misuse_is_explained(monkeypatch):
    with pytest.raises(gym.error.Error, match="no credit wrapper"):
        make_env(TOY)
    for mode in ("NextStep", "SameStep"):
        with pytest.raises(gym.error.Error, match=f"autoreset_mode is '{mode}', and TorchRL resets rows itself"):
            make_env(TOY, vector.SparseReward, num_envs=2, autoreset_mode=mode)
    with pytest.raises(gym.error.Error, match="a TimeLimit ends episodes before"):
        make_env(TOY, SparseReward, max_episode_steps=4)
    with pytest.raises(ValueError, match="top_k=2: TorchRL scores"):
        actor_critic(CausalLMPolicy.for_task(toy_policy(0), native().unwrapped.task, top_k=2))
    (batch,) = collector(make_env(native), 60)
    with pytest.raises(ValueError, match="not in the order of time"):
        relabel(batch[:, torch.randperm(20, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(KeyError, match="make the environment with `make_env`"):
        relabel(batch.exclude(("next", "token_rewards")))
    monkeypatch.setitem(sys.modules, "torchrl.data", types.ModuleType("torchrl.data"))
    with pytest.raises(gym.error.DependencyNotInstalled, match=r"too old \(cannot import name 'Binary' from"):
        make_env(TOY, SparseReward)
    monkeypatch.setitem(sys.modules, "torchrl.data", None)
    with pytest.raises(gym.error.DependencyNotInstalled, match=r"pip install 'tokenmdp\[torchrl\]'"):
        make_env(TOY, SparseReward)
    monkeypatch.setitem(sys.modules, "torchrl.modules", None)
    with pytest.raises(gym.error.DependencyNotInstalled, match=r"pip install 'tokenmdp\[torchrl\]'"):
        actor_critic(language_model())
