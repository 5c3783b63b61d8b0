"""What other libraries expect: padding on the left, groups in TensorBoard, lists of frames, errors of their kinds."""

import gymnasium as gym
import numpy as np
import pytest
from doubles import TOY, ScoreOnly
from gymnasium.error import InvalidAction
from placement_cases import make_envs, reward_model

import tokenmdp.rollouts.collecting as collecting
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.names import resolve
from tokenmdp.runs.directory import tensorboard_tag
from tokenmdp.runs.environments import toy_policy
from tokenmdp.wrappers import CreditReward, OnlinePrefixReward, vector


def toy_agent(num_envs=8):
    envs = vector.SparseReward(gym.make_vec(TOY, num_envs=num_envs, autoreset_mode="Disabled"))
    return PPO(toy_policy(1), envs, PPOConfig(dtype="float32"))


def test_policies_pad_on_the_left(tmp_path):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(resolve("policy", "imdb-tiny")).padding_side == "left"
    agent = toy_agent()
    before = agent.envs.unwrapped.tokenizer.padding_side
    agent.save(tmp_path / "policy")
    assert load_tokenizer(str(tmp_path / "policy")).padding_side == "left"
    assert agent.envs.unwrapped.tokenizer.padding_side == before  # which other code may share


def test_every_metric_has_a_group():
    record = toy_agent().learn(1).history[0]
    groups = {tensorboard_tag(name).split("/")[0] for name in record if name != "update"}
    assert groups == {"rollout", "train", "time"}
    assert tensorboard_tag("attention_mass") == "credit/attention_mass"


def test_lists_of_frames():
    single = gym.make(TOY, render_mode="rgb_array_list")
    single.reset(seed=0)
    single.step(3)
    assert len(single.render()) == 2
    envs = gym.make_vec(TOY, num_envs=3, render_mode="rgb_array_list")
    envs.reset(seed=0)
    for _ in range(4):
        envs.step(np.full(3, 3))
    frames = envs.render()
    assert [len(row) for row in frames] == [5, 5, 5]
    assert frames[0][0].dtype == np.uint8
    envs.step(np.full(3, 3))
    assert [len(row) for row in envs.render()] == [1, 1, 1]
    texts = gym.make_vec(TOY, num_envs=1, render_mode="ansi_list")
    texts.reset(options={"prompt": "the film"})
    assert texts.render() == (["the film |"],)
    with pytest.raises(ValueError, match="human_list"):
        gym.make_vec(TOY, num_envs=1, render_mode="human_list")


@pytest.mark.parametrize("action", [-1, 32, 2.5, "good", None, True, 10**30])
def test_actions_are_refused_as_value_errors_too(action):
    env = gym.make(TOY, disable_env_checker=True).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action") as raised:
        env.step(action)
    assert isinstance(raised.value, InvalidAction)


@pytest.mark.parametrize("actions", [[1], [1.0, 2.0], [1, 99], ["a", "b"]])
def test_batches_of_actions_likewise(actions):
    envs = gym.make_vec(TOY, num_envs=2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="action") as raised:
        envs.step(np.array(actions))
    assert isinstance(raised.value, InvalidAction)


@pytest.mark.parametrize("steps", [3, 100])
def test_a_batch_has_no_time_limit(steps):
    with pytest.raises(ValueError, match=f"pass max_new_tokens={steps}"):
        gym.make_vec(TOY, num_envs=2, max_episode_steps=steps)
    assert gym.make_vec(TOY, num_envs=2, max_episode_steps=-1).num_envs == 2  # Gymnasium's word for no limit


@pytest.mark.parametrize(
    ("credit", "online"), [("red", True), ("attention", False), ("deeplift", False), ("integrated-gradients", False)]
)
def test_a_lack_is_refused_with_what_runs(credit, online):
    with pytest.raises(ValueError, match="does not provide") as raised:
        CreditReward(gym.make(TOY, reward_model=ScoreOnly()), credit)
    said = str(raised.value)
    assert ("OnlinePrefixReward" in said) == online
    assert "sparse, uniform, abc-d" in said
    assert "shapley, owen" in said
    OnlinePrefixReward(gym.make(TOY, reward_model=ScoreOnly()))


def test_a_reward_model_left_on_the_cpu_is_named_once(monkeypatch):
    from types import SimpleNamespace

    import torch

    monkeypatch.setattr(collecting, "_warned_of_devices", set())
    gpu = SimpleNamespace(lm=SimpleNamespace(device=torch.device("cuda", 0)))
    envs = gym.make_vec("tokenmdp:TextGen-IMDb-v0", num_envs=1).unwrapped
    with pytest.warns(UserWarning, match="reward_device='cuda'.*score_when='all_done'"):
        collecting._warn_of_devices(envs, gpu)
    collecting._warn_of_devices(envs, gpu)
    collecting._warn_of_devices(gym.make_vec(TOY, num_envs=1).unwrapped, gpu)  # a word list is quick anywhere
    own = gym.make_vec(TOY, num_envs=1, reward_model=ScoreOnly(), autoreset_mode="Disabled", score_when="all_done")
    with pytest.warns(UserWarning, match=r"; move its model to the GPU$"):
        collecting._warn_of_devices(own.unwrapped, gpu)
    classifier = make_envs(reward_model("gpt2", torch.device("cpu")))
    with pytest.warns(UserWarning, match=r"model\.to\('cuda'\), tokenizer\)$"):
        collecting._warn_of_devices(classifier.unwrapped, gpu)
