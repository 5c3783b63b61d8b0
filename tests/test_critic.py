"""The critic learns: with its own learning rate and gradient norm, and a warning says so when it does not."""

import copy
import logging

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import SB3
from transformers import GPT2Config, GPT2LMHeadModel

from tokenmdp.agents.ppo import CRITIC_DUE, PPO, PPOConfig, critic_warning
from tokenmdp.files import CheckpointError
from tokenmdp.interop.torchrl import actor_critic
from tokenmdp.rollouts import collect
from tokenmdp.runs.policy_run import describe
from tokenmdp.wrappers import vector

POLICY_RATE = 3e-5


def gpt2():
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=30, eos_token_id=30, **shape))


def make_agent(num_envs=8, lm=None, wrapper=vector.SparseReward, env="TextGen-Toy-v0", length=8, **options):
    shape = {"num_envs": num_envs, "max_new_tokens": length}
    envs = gym.make_vec(f"tokenmdp:{env}", **shape, autoreset_mode="Disabled", score_when="all_done")
    return PPO(lm or gpt2(), wrapper(envs), PPOConfig(**{"dtype": "float32", "device": "cpu"} | options))


@pytest.mark.slow
def test_the_critic_explains_returns_that_a_head_at_the_policys_rate_does_not():
    """Eight updates on real reviews, with the whole reward at the end."""

    def explained(**options):
        rates = {"learning_rate": POLICY_RATE, "update_epochs": 2} | options
        agent = make_agent(16, "imdb-tiny", env="TextGen-IMDb-v0", **rates).learn(8)
        return np.mean([metrics["explained_variance"] for metrics in agent.history[5:]])

    assert explained() > 0.1
    assert explained(vf_learning_rate=POLICY_RATE) < 0.05


def test_policy_and_head_have_rates_of_their_own_and_both_are_annealed():
    agent = make_agent(learning_rate=1e-3, vf_learning_rate=5e-2, anneal_lr=True, total_updates=4)
    agent.learn(3)
    assert [group["lr"] for group in agent.optimizer.param_groups] == [5e-4, 2.5e-2]  # of the third update
    assert agent.history[-1]["learning_rate"] == 5e-4


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_every_learning_weight_is_in_one_group_and_the_second_is_the_head(lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    agent = make_agent(lora_rank=lora_rank)
    body, head = (group["params"] for group in agent.optimizer.param_groups)
    assert {id(weight) for weight in head} == {id(weight) for weight in agent.policy.value_head.parameters()}
    learning = [weight for weight in agent.policy.parameters() if weight.requires_grad]
    assert sorted(map(id, [*body, *head])) == sorted(map(id, learning))


def test_a_wrong_value_does_not_shrink_the_step_of_the_policy():
    """Scores far off give the head a huge gradient; under one norm the policy's step would vanish."""
    clip = 0.5
    agent = make_agent(num_minibatches=1, update_epochs=1, max_grad_norm=clip, clip_coef_value=None)
    torch.nn.init.constant_(agent.policy.value_head.bias, 1e3)
    agent.learn(1)
    assert agent.history[0]["vf_grad_norm"] > 50
    body, head = (
        torch.stack([weight.grad.norm() for weight in group["params"] if weight.grad is not None]).norm()
        for group in agent.optimizer.param_groups
    )
    torch.testing.assert_close(head, torch.tensor(clip), rtol=1e-3, atol=0)
    expected = min(clip, agent.history[0]["grad_norm"])
    torch.testing.assert_close(body.item(), expected, rtol=1e-3, atol=0)
    assert body > 0.1


def separate(**options):
    return make_agent(value_model="separate", learning_rate=1e-3, value_model_learning_rate=1e-3, **options)


def test_values_with_a_transformer_of_their_own_leave_the_policys_gradient_alone():
    """The first step moves the policy as it moves without any value loss, and the value model as its own loss says."""
    agent, alone = separate(update_epochs=1, num_minibatches=1), make_agent(
        learning_rate=1e-3, update_epochs=1, num_minibatches=1, vf_coef=0.0
    )  # fmt: skip
    before = copy.deepcopy(agent.policy.state_dict())
    agent.learn(1), alone.learn(1)
    for name, weight in alone.policy.lm.state_dict().items():
        torch.testing.assert_close(agent.policy.lm.state_dict()[name], weight, rtol=0, atol=1e-6)
    changed = {name for name, weight in agent.policy.state_dict().items() if not torch.equal(weight, before[name])}
    assert any(name.startswith("lm.") for name in changed)
    assert "value_model.head.bias" in changed
    assert not any(name.startswith("value_head") for name in changed)
    agent.learn(1)  # the head is no longer 0, so the layers below it have a gradient
    assert agent.history[1]["value_model_grad_norm"] > 0
    after = agent.policy.state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert sum(name.startswith("value_model.lm.h") for name in moved) > 10


def test_the_values_of_a_rollout_are_those_of_the_value_model():
    agent = separate()
    torch.nn.init.normal_(agent.policy.value_model["head"].weight)
    rollout, _ = agent.play()
    texts = rollout.input_ids, rollout.attention_mask, rollout.prompt_slots
    expected = agent.policy.values(*texts) * rollout.response_mask
    torch.testing.assert_close(rollout.values, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(agent.policy.evaluate(*texts).values * rollout.response_mask, expected)
    assert rollout.values.std() > 0.1
    assert not collect(agent.envs, agent.policy, None, agent.generator)[0].values.any()  # nobody asked for them
    with pytest.raises(ValueError, match="no value model; call separate_values"):
        agent.reference.values(*texts)


def test_a_value_model_begins_with_the_values_of_the_head():
    agent = make_agent()
    torch.nn.init.normal_(agent.policy.value_head.weight)
    rollout, _ = agent.play()
    texts = rollout.input_ids, rollout.attention_mask, rollout.prompt_slots
    before = agent.policy.evaluate(*texts).values
    agent.policy.separate_values()
    torch.testing.assert_close(agent.policy.values(*texts), before)


def test_a_directory_keeps_no_value_model_of_an_earlier_save(tmp_path):
    separate().policy.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "value_model.safetensors").exists()
    make_agent().policy.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "value_model.safetensors").exists()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_value_model_resumes_bit_for_bit(gradient_checkpointing, tmp_path):
    options = {"gradient_checkpointing": gradient_checkpointing}
    whole, first = separate(**options).learn(3), separate(**options).learn(1)
    first.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "value_model.safetensors").exists()
    resumed = PPO.load(tmp_path / "saved", first.envs).learn(2)
    for name, weight in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], weight), name
    # A new run takes it only if it asks for one.
    assert PPO(str(tmp_path / "saved"), first.envs).policy.value_model is None
    again = PPO(str(tmp_path / "saved"), first.envs, PPOConfig(value_model="separate"))
    assert torch.equal(again.policy.value_model["head"].weight, first.policy.value_model["head"].weight)
    (tmp_path / "saved" / "value_model.safetensors").write_bytes(b"short")
    (tmp_path / "saved" / "state" / "sha256sums.txt").unlink()  # which names the file first
    with pytest.raises(CheckpointError, match=r"value_model\.safetensors is not this model's value model"):
        PPO(str(tmp_path / "saved"), first.envs, PPOConfig(value_model="separate"))


def test_a_run_says_that_it_has_a_second_model():
    assert "0.03M parameters and a value model of 0.03M in float32" in describe(separate())
    assert "value model" not in describe(make_agent())


def test_a_value_model_beside_adapters_is_refused():
    with pytest.raises(ValueError, match="lora_rank is 2, which saves memory"):
        PPOConfig(value_model="separate", lora_rank=2)


def records(explained, varies=1.0, updates=CRITIC_DUE):
    return updates * [{"explained_variance": explained, "score_std": varies}]


def test_a_critic_that_explains_nothing_is_named_once():
    config = PPOConfig(vf_learning_rate=1e-4)
    said = critic_warning(records(0.05), config)
    assert "explains 0.05 of the variance" in said
    assert "raise vf_learning_rate (now 0.0001)" in said
    apart = critic_warning(records(0.05), PPOConfig(value_model="separate"))
    assert "vf_learning_rate (now 0.003) and value_model_learning_rate (now 0.0001), or play" in apart
    assert "lower vf_learning_rate" in critic_warning(records(-0.4), config)  # it jumps back and forth
    assert critic_warning(records(0.15), config) is None
    assert critic_warning(records(0.05, varies=0.0), config) is None  # nothing to explain
    assert critic_warning(records(0.05), PPOConfig(estimator="vine")) is None  # the critic of the KL
    for updates in (CRITIC_DUE - 1, CRITIC_DUE + 1):
        assert critic_warning(records(0.05, updates=updates), config) is None


def test_the_agent_says_so_while_it_learns(caplog):
    agent = make_agent(vf_learning_rate=1e-9, learning_rate=1e-9, update_epochs=1, num_minibatches=1)
    with caplog.at_level(logging.WARNING):
        agent.learn(CRITIC_DUE - 1)
        assert not caplog.messages
        agent.learn(2)
    assert len([message for message in caplog.messages if "raise vf_learning_rate" in message]) == 1


@pytest.mark.long
def test_the_vine_critic_learns_the_kl():
    """Under vine the returns are those of the KL penalty alone: the critic must explain these."""
    options = {"estimator": "vine", "vine_rollouts": 1, "learning_rate": 2e-3, "vf_learning_rate": 3e-2}
    agent = make_agent(16, kl_coef=0.5, **options).learn(12)
    late = [metrics["explained_variance"] for metrics in agent.history[-5:]]
    assert np.mean(late) > 0.05  # a head that does not move explains 0


def test_torchrl_and_our_own_loops_get_the_groups_from_the_policy():
    pytest.importorskip("torchrl")
    policy = make_agent().policy
    actor, critic = actor_critic(policy)
    body, head = policy.parameter_groups(1e-4, 3e-3)
    assert (body["lr"], head["lr"]) == (1e-4, 3e-3)
    held = {id(weight) for module in (actor, critic) for weight in module.parameters()}
    assert held == {id(weight) for group in (body, head) for weight in group["params"]}


def test_under_stable_baselines3_the_head_keeps_its_rate_and_follows_the_schedule(tmp_path):
    pytest.importorskip("stable_baselines3", reason=SB3)
    from stable_baselines3 import PPO as SB3PPO
    from stable_baselines3.common.env_util import make_vec_env

    from tokenmdp.interop.sb3.policy import CausalLMActorCriticPolicy

    gpt2().save_pretrained(tmp_path / "model")
    model = SB3PPO(
        CausalLMActorCriticPolicy, make_vec_env("tokenmdp:TextGen-Toy-v0", n_envs=2),
        learning_rate=lambda left: 1e-4 * left, n_steps=8, batch_size=16, n_epochs=1,
        policy_kwargs={"model": str(tmp_path / "model"), "vf_learning_rate": 2e-2},
    )  # fmt: skip
    steps = []

    def watched(model):
        model.policy.optimizer.register_step_post_hook(
            lambda optimizer, *_: steps.append([group["lr"] for group in optimizer.param_groups])
        )
        return model

    watched(model).learn(32)  # two rollouts of 16 steps, a step of the optimizer each
    assert steps == [pytest.approx([5e-5, 1e-2]), [0, 0]]
    model.save(tmp_path / "saved")
    steps.clear()
    watched(SB3PPO.load(tmp_path / "saved", env=model.get_env())).learn(32)
    assert steps[0] == pytest.approx([5e-5, 1e-2])
