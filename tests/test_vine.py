"""Monte-Carlo values of prefixes against exact ones, and what the environment is asked for on the way."""

import gymnasium as gym
import pytest
import torch
from doubles import HashRewardModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.returns import vine_advantages
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.continuations import monte_carlo_values
from tokenmdp.testing import TableRewardModel, ToyMDP
from tokenmdp.wrappers import vector

TOY = "tokenmdp:TextGen-Toy-v0"


def make_policy(task):
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    eos = task.eos_token_id
    config = GPT2Config(vocab_size=task.vocab_size, bos_token_id=eos, eos_token_id=eos, **shape)
    return CausalLMPolicy.for_task(GPT2LMHeadModel(config), task)


def roll(envs, policy, seed=0):
    return collect(envs, policy, policy, torch.Generator().manual_seed(seed), seed=seed)[0]


@pytest.mark.parametrize("min_new_tokens", [0, 2])
def test_values_converge_to_the_exact_ones(min_new_tokens):
    mdp = ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=2, seed=0)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    envs = gym.make_vec(
        "tokenmdp:TextGen-v0", num_envs=12, autoreset_mode="Disabled", tokenizer=tokenizer, prompts=["b a"],
        reward_model=TableRewardModel(mdp), max_new_tokens=3, max_prompt_tokens=4, min_new_tokens=min_new_tokens,
    )  # fmt: skip
    envs = vector.SparseReward(envs)
    policy = make_policy(envs.unwrapped.task)
    rollout = roll(envs, policy)

    episode = mdp.episodes(prompt=[1, 0], prompt_slots=2)
    with torch.no_grad():
        logprobs = policy.evaluate(episode.input_ids, episode.attention_mask, 2).logprobs
    seq_logprobs = (logprobs * mdp.mask).sum(-1).double()
    every = mdp.state_values(seq_logprobs, mdp.scores)
    variances = mdp.state_values(seq_logprobs, mdp.scores**2) - every**2
    rows = [
        int(((mdp.tokens == text) & (mdp.mask == mask)).all(-1).nonzero())
        for text, mask in zip(rollout.input_ids[:, 2:] * rollout.response_mask, rollout.response_mask, strict=True)
    ]
    exact, count = every[rows], 300
    values = monte_carlo_values(envs, policy, rollout, count, torch.Generator().manual_seed(1))
    assert values.dtype == torch.float32
    assert not values[~rollout.response_mask].any()
    error = (values - exact).abs()
    assert (error <= 4 * (variances[rows].clamp(min=0) / count).sqrt() + 1e-6).all()
    assert error.max() > 1e-3  # sampled indeed
    gap = vine_advantages(rollout.scores, exact.float(), rollout.response_mask).sum(-1)
    torch.testing.assert_close(gap, rollout.scores - exact[:, 0].float())


def test_one_reward_model_call_a_position_on_the_prefixes_and_their_horizons():
    model = HashRewardModel()
    envs = vector.UniformReward(
        gym.make_vec(
            TOY, num_envs=5, autoreset_mode="Disabled", reward_model=model, horizon_range=(2, 6),
            min_new_tokens=6, score_when="all_done",
        )
    )  # fmt: skip
    policy = make_policy(envs.unwrapped.task)
    rollout = roll(envs, policy)
    lengths = rollout.response_mask.sum(-1)
    assert torch.equal(lengths, torch.from_numpy(envs.unwrapped.horizons))  # nothing may end a text but its horizon
    assert len(lengths.unique()) > 1
    model.asked.clear()
    values = monte_carlo_values(envs, policy, rollout, 3, torch.Generator().manual_seed(0))
    assert len(model.asked) == lengths.max()
    for t, (texts, attention) in enumerate(model.asked):
        assert not attention
        rows = (lengths > t).nonzero()[:, 0].repeat(3)
        assert len(texts) == len(rows)
        for text, row in zip(texts, rows.tolist(), strict=True):
            own = rollout.input_ids[row][rollout.attention_mask[row]].tolist()
            assert len(text) == len(own)  # the horizon of its row
            assert text[: len(own) - lengths[row] + t] == own[: len(own) - lengths[row] + t]
    finished = {tuple(text) for texts, _ in model.asked for text in texts}
    assert len(finished) > 5
    assert torch.isfinite(values).all()


def test_the_training_rows_stay_as_they_were():
    envs = vector.SparseReward(gym.make_vec(TOY, num_envs=4, autoreset_mode="Disabled"))
    policy = make_policy(envs.unwrapped.task)
    rollout = roll(envs, policy)
    before, states = envs.unwrapped.outcome, envs.unwrapped.get_rng_state()
    first = monte_carlo_values(envs, policy, rollout, 2, torch.Generator().manual_seed(0))
    assert envs.unwrapped.outcome is before
    assert envs.unwrapped.get_rng_state() == states
    again = monte_carlo_values(envs, policy, rollout, 2, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)


def test_bad_requests_are_named():
    envs = vector.SparseReward(gym.make_vec(TOY, num_envs=4, autoreset_mode="Disabled"))
    policy = make_policy(envs.unwrapped.task)
    rollout = roll(envs, policy)
    with pytest.raises(ValueError, match="num_rollouts=0; a mean needs at least 1"):
        monte_carlo_values(envs, policy, rollout, 0)
    fewer = vector.SparseReward(gym.make_vec(TOY, num_envs=2, autoreset_mode="Disabled"))
    with pytest.raises(ValueError, match="4 episodes was not collected in 2 rows"):
        monte_carlo_values(fewer, policy, rollout, 1)
