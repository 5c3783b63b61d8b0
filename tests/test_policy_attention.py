"""The live policy's attention: rows kept while sampling against one eager forward over the finished texts."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.credit import MissingResource, make_credit
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.policy_attention import ForwardAttention
from tokenmdp.rollouts import collect
from tokenmdp.wrappers import CreditReward, vector

TOY = "tokenmdp:TextGen-Toy-v0"


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=32, n_embd=32, n_layer=2, n_head=4, eos_token_id=30, bos_token_id=30)
    )


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, max_position_embeddings=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, eos_token_id=30,
        )
    )  # fmt: skip


def build(make):
    torch.manual_seed(3)
    model = make().eval()
    with torch.no_grad():  # at initialisation attention is almost uniform and would hide a wrong row
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def eager_attention(model, outcome):
    """(n, H, H) from transformers' own maps, row by row without padding."""
    episode = outcome.episode
    maps = torch.zeros(*episode.response_mask.shape, episode.response_mask.shape[1])
    for row, (ids, mask) in enumerate(zip(episode.input_ids, episode.attention_mask, strict=True)):
        length = int(episode.response_mask[row].sum())
        attention = model(ids[mask][None], output_attentions=True).attentions[-1][0].mean(0)  # (T, T)
        maps[row, :length, :length] = attention[-length:, -length:]
    return maps


@pytest.mark.parametrize("make", [gpt2, llama])
@torch.no_grad()
def test_sampled_rows_equal_an_eager_forward(make, monkeypatch):
    model, eager = build(make), build(make)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    envs = vector.CreditReward(gym.make_vec(TOY, num_envs=16, autoreset_mode="Disabled"), make_credit("abc-d"))
    policy = CausalLMPolicy.for_task(model, envs.unwrapped.task)
    plain = CausalLMPolicy.for_task(build(make), envs.unwrapped.task)
    seen = []
    credit = type(envs.credit).__call__
    monkeypatch.setattr(
        type(envs.credit), "__call__",
        lambda method, outcome, resources: (
            seen.append((outcome, resources.policy_attention(outcome))), credit(method, outcome, resources),
        )[1],
    )  # fmt: skip
    rollout, metrics = collect(envs, policy, policy, torch.Generator().manual_seed(0), seed=1)
    assert {"attention_mass", "attention_entropy", "credit_fallback"} <= metrics.keys()

    lengths = set()
    monkeypatch.undo()
    for outcome, sampled in seen:
        expected = eager_attention(eager, outcome)
        mask = outcome.episode.response_mask
        for row, length in enumerate(mask.sum(-1).tolist()):
            lengths.add(length)
            # The last token's row is never read: the policy does not choose a token after it.
            torch.testing.assert_close(
                sampled[row, : length - 1, :length], expected[row, : length - 1, :length], atol=1e-5, rtol=1e-4
            )
        forward = ForwardAttention(plain)(outcome)
        inside = mask[:, :, None] & mask[:, None, :]
        torch.testing.assert_close(forward * inside, expected * inside, atol=1e-5, rtol=1e-4)
        method = envs.credit
        for provider in (ForwardAttention(plain), lambda _, maps=expected: maps):
            resources = envs.unwrapped.resources()._replace(policy_attention=provider)
            token_rewards = method(outcome, resources).token_rewards
            torch.testing.assert_close(
                token_rewards[:, : rollout.token_rewards.shape[1]], rollout.token_rewards[outcome.rows],
                atol=1e-5, rtol=1e-4,
            )  # fmt: skip
    assert len(lengths) > 2


def test_asking_for_rows_changes_no_sample():
    rollouts = []
    for credit in ("sparse", "abc-d2"):
        envs = vector.CreditReward(gym.make_vec(TOY, num_envs=8, autoreset_mode="Disabled"), make_credit(credit))
        policy = CausalLMPolicy.for_task(build(gpt2), envs.unwrapped.task)
        rollouts.append(collect(envs, policy, policy, torch.Generator().manual_seed(0), seed=1)[0])
    sparse, abc_d2 = rollouts
    assert torch.equal(sparse.input_ids, abc_d2.input_ids)
    torch.testing.assert_close(sparse.logprobs, abc_d2.logprobs)
    assert not torch.equal(sparse.token_rewards, abc_d2.token_rewards)


@pytest.mark.parametrize("credit", ["abc-d", "abc-d2"])
def test_the_agent_attaches_its_policy(credit):
    envs = vector.CreditReward(gym.make_vec(TOY, num_envs=8, autoreset_mode="Disabled"), make_credit(credit))
    agent = PPO(build(gpt2), envs, PPOConfig(seed=1, num_minibatches=2))
    agent.learn(2)
    assert all("attention_mass" in metrics for metrics in agent.history)


def test_without_an_agent_the_first_ending_says_what_to_attach():
    env = CreditReward(gym.make(TOY), make_credit("abc-d"))
    env.reset(seed=0)
    with pytest.raises(MissingResource, match=r"no agent has attached one; .*ForwardAttention\(policy\)"):
        env.step(env.unwrapped.eos_token_id)
    policy = CausalLMPolicy.for_task(build(gpt2), env.unwrapped.task)
    env.unwrapped.policy_attention = ForwardAttention(policy)
    env.reset(seed=0)
    env.step(4)
    *_, info = env.step(env.unwrapped.eos_token_id)
    assert info["token_rewards"].sum() == pytest.approx(info["score"])


def test_a_rollouts_rows_credit_no_later_episode():
    envs = vector.CreditReward(gym.make_vec(TOY, num_envs=2, autoreset_mode="Disabled"), make_credit("abc-d"))
    policy = CausalLMPolicy.for_task(build(gpt2), envs.unwrapped.task)
    collect(envs, policy, policy, torch.Generator().manual_seed(0), seed=1)
    envs.reset(seed=2)
    with pytest.raises(MissingResource, match="no agent has attached one"):
        envs.step(np.full(2, envs.unwrapped.eos_token_id))
    attached = envs.unwrapped.policy_attention = ForwardAttention(policy)
    collect(envs, policy, policy, torch.Generator().manual_seed(0), seed=1)
    assert envs.unwrapped.policy_attention is attached


GROUPED = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 30, "eos_token_id": 30, "pad_token_id": 31,
}  # fmt: skip
WINDOWS = {
    "mistral": MistralConfig(**GROUPED, sliding_window=6),
    "mistral, a window of 3": MistralConfig(**GROUPED, sliding_window=3),
    "qwen2, the last layer only": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    ),
    "gemma 3, the last layer only": Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=5, layer_types=["full_attention", "sliding_attention"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
@torch.no_grad()
def test_rows_of_sliding_windows_lie_on_the_tokens_that_were_read(name):
    """Prompts of different length, a window shorter than the text, rows that end early and leave the batch."""
    model = build(lambda: AutoModelForCausalLM.from_config(copy.deepcopy(WINDOWS[name])))
    eager = build(lambda: AutoModelForCausalLM.from_config(copy.deepcopy(WINDOWS[name])))
    eager.set_attn_implementation("eager")
    policy, seen = CausalLMPolicy(model, 32, 30, min_new_tokens=2), []
    envs = vector.CreditReward(
        gym.make_vec(TOY, num_envs=6, autoreset_mode="Disabled", max_new_tokens=12, min_new_tokens=2), "abc-d"
    )
    base = envs.unwrapped
    step = type(base).step

    def keeping(*arguments):
        result = step(base, *arguments)
        if base.outcome is not None:
            seen.append((base.outcome, base.policy_attention(base.outcome)))
        return result

    base.step = keeping
    collect(
        envs,
        policy,
        CausalLMPolicy(build(lambda: AutoModelForCausalLM.from_config(copy.deepcopy(WINDOWS[name]))), 32, 30),
        seed=5,
    )
    assert sum(len(outcome.rows) for outcome, _ in seen) == 6
    for outcome, sampled in seen:
        expected, forward = eager_attention(eager, outcome), ForwardAttention(policy)(outcome)
        for row, mask in enumerate(outcome.episode.response_mask):
            read = int(mask.sum()) - 1  # the last token is never read
            assert torch.allclose(sampled[row, :read, :read], expected[row, :read, :read], atol=1e-4)
            assert torch.allclose(forward[row, :read, :read], expected[row, :read, :read], atol=1e-4)
