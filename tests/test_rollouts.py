import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import Error
from transformers import GPT2Config, GPT2LMHeadModel

from tokenmdp import wrappers
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.collecting import credited_envs
from tokenmdp.rollouts.scoring import score_under
from tokenmdp.wrappers import vector

TOY = "tokenmdp:TextGen-Toy-v0"


def make_envs(wrapper=vector.UniformReward, num_envs=6, **options):
    return wrapper(gym.make_vec(TOY, num_envs=num_envs, autoreset_mode="Disabled", **options))


def make_policy(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=30, eos_token_id=30, **shape))
    return CausalLMPolicy(lm, 32, 30, **options)


def roll(envs, seed=0, **options):
    policy, reference = make_policy(0, **options), make_policy(1, **options)
    generator = torch.Generator().manual_seed(seed)
    return *collect(envs, policy, reference, generator, seed=seed, rows_per_forward=4), policy, reference


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 2, "top_k": 6}], ids=str)
@pytest.mark.parametrize("wrapper", [vector.SparseReward, vector.UniformReward, vector.AttentionCreditReward])
def test_a_rollout_agrees_with_the_environment_and_with_full_forwards(wrapper, options):
    envs = make_envs(wrapper, num_envs=16, min_new_tokens=options.get("min_new_tokens", 0))
    rollout, metrics, policy, reference = roll(envs, **options)
    mask, prompt_slots = rollout.response_mask, rollout.prompt_slots
    torch.testing.assert_close(rollout.token_rewards.sum(-1), rollout.scores)
    assert not rollout.token_rewards[~mask].any()
    assert torch.equal(rollout.attention_mask[:, prompt_slots:], mask)
    for numbers, model in ((rollout.logprobs, policy), (rollout.ref_logprobs, reference)):
        torch.testing.assert_close(score_under(model, rollout, 5), numbers, rtol=0, atol=1e-4)
        assert (numbers[mask] < 0).any()
        assert not numbers[~mask].any()
    for row, ended in zip(rollout.input_ids[:, prompt_slots:], mask, strict=True):
        response = row[ended].tolist()
        assert 30 not in response[:-1]
        assert response[-1] == 30 or len(response) == 8
    assert metrics["score_mean"] == pytest.approx(rollout.scores.mean().item())
    assert metrics["response_tokens"] == mask.sum()
    assert metrics["kl"] == pytest.approx((rollout.logprobs - rollout.ref_logprobs).sum(-1).mean().item(), abs=1e-5)
    assert ("attention_mass" in metrics) == (wrapper is vector.AttentionCreditReward)


def test_the_scores_belong_to_the_texts():
    envs = make_envs(num_envs=8)
    rollout, *_ = roll(envs)
    singles = wrappers.SparseReward(gym.make(TOY))
    for row in range(8):
        prompt = rollout.input_ids[row, : rollout.prompt_slots][rollout.attention_mask[row, : rollout.prompt_slots]]
        singles.reset(options={"prompt": envs.unwrapped.tokenizer.decode(prompt)})
        for token in rollout.input_ids[row, rollout.prompt_slots :][rollout.response_mask[row]].tolist():
            _, reward, terminated, _, _ = singles.step(token)
        assert terminated
        assert reward == pytest.approx(rollout.scores[row].item())


def test_columns_that_are_padding_in_every_row_are_dropped():
    envs = make_envs(prompts=["the film", "plot"])
    rollout, *_ = roll(envs)
    assert rollout.prompt_slots == 2  # of 4
    assert rollout.attention_mask[:, 0].any()
    short = make_envs(horizon_range=(1, 3))
    rollout, *_ = roll(short)
    assert rollout.response_mask.shape[1] <= 3
    assert rollout.response_mask[:, -1].any()


def test_rows_that_end_at_different_steps_keep_their_own_scores():
    late, _, *_ = roll(make_envs(num_envs=12, horizon_range=(1, 8), score_when="all_done"))
    each, _, *_ = roll(make_envs(num_envs=12, horizon_range=(1, 8)))
    assert len(set(each.response_mask.sum(-1).tolist())) > 3
    for ours, theirs in zip(late, each, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_the_reward_model_keeps_its_precision_while_the_policy_samples_in_bfloat16(monkeypatch):
    envs = make_envs()
    model, lowered = type(envs.unwrapped.task.reward_model), []
    evaluate = model.evaluate

    def spy(self, *parts):
        lowered.append(torch.is_autocast_enabled("cpu"))
        return evaluate(self, *parts)

    monkeypatch.setattr(model, "evaluate", spy)
    roll(envs, compute_dtype=torch.bfloat16)
    assert lowered
    assert not any(lowered)


def test_the_seed_decides_and_without_one_the_environment_goes_on():
    first, *_ = roll(make_envs(), seed=3)
    again, *_ = roll(make_envs(), seed=3)
    assert torch.equal(first.input_ids, again.input_ids)
    envs, policy = make_envs(num_envs=16), make_policy()
    one, _ = collect(envs, policy, policy, torch.Generator().manual_seed(0), seed=3)
    two, _ = collect(envs, policy, policy, torch.Generator().manual_seed(0))
    assert not np.array_equal(one.input_ids[:, : one.prompt_slots], two.input_ids[:, : two.prompt_slots])


def test_without_a_reference_nothing_is_read_twice(monkeypatch):
    expected, *_ = roll(make_envs(), seed=3)
    monkeypatch.setattr(CausalLMPolicy, "evaluate", None)
    rollout, metrics = collect(make_envs(), make_policy(0), None, torch.Generator().manual_seed(3), seed=3)
    assert torch.equal(rollout.input_ids, expected.input_ids)
    assert torch.equal(rollout.ref_logprobs, rollout.logprobs)
    assert metrics["kl"] == 0


def test_the_random_numbers_of_the_environment_can_be_put_back():
    envs, other = make_envs(), make_envs()
    envs.reset(seed=5)
    state = envs.unwrapped.get_rng_state()
    expected = [envs.reset()[0]["input_ids"] for _ in range(3)]
    other.unwrapped.set_rng_state(state)
    for prompts in expected:
        np.testing.assert_array_equal(other.reset()[0]["input_ids"], prompts)
    with pytest.raises(ValueError, match="6 random-number states for 2 rows"):
        make_envs(num_envs=2).unwrapped.set_rng_state(state)


def test_collecting_marks_the_token_rewards_as_read():
    envs = make_envs()
    assert not envs.unwrapped.token_rewards_read
    assert credited_envs(envs) is envs.unwrapped
    assert not envs.unwrapped.token_rewards_read  # it only looks
    roll(envs)
    assert envs.unwrapped.token_rewards_read


def test_environments_that_cannot_be_used_are_refused_with_the_remedy():
    with pytest.raises(Error, match=r"vector\.SparseReward"):
        credited_envs(gym.make_vec(TOY, num_envs=2, autoreset_mode="Disabled"))
    for mode in ("NextStep", "SameStep"):
        with pytest.raises(Error, match='"Disabled"'):
            credited_envs(vector.SparseReward(gym.make_vec(TOY, num_envs=2, autoreset_mode=mode)))
    with pytest.raises(TypeError, match=r"gym\.make_vec"):
        credited_envs(wrappers.SparseReward(gym.make(TOY)))
