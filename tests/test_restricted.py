"""A real task cut down to a few tokens is the same task, and the benchmark that measures the bias runs."""

import importlib.util
from pathlib import Path

import gymnasium as gym
import pytest
import torch

from tokenmdp.credit import Resources, make_credit
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.testing import agreement, likely_tokens, policy_gradient, restrict, score_gradient
from tokenmdp.types import Episode

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "credit_bias.py"


@pytest.fixture(scope="module")
def bundled():
    task = gym.make("tokenmdp:TextGen-IMDb-v0", max_new_tokens=3).unwrapped.task
    return task, CausalLMPolicy.for_task("imdb-tiny", task).requires_grad_(False)


@pytest.fixture(scope="module")
def restricted(bundled):
    task, policy = bundled
    prompt = task.tokenizer.encode("The film was")
    tokens = likely_tokens(policy, prompt, 3, generator=torch.Generator().manual_seed(0))
    return restrict(policy, task.reward_model, prompt, tokens, horizon=3)


def test_the_policy_is_the_models_given_the_tokens(bundled, restricted):
    task, policy = bundled
    prompt = task.tokenizer.encode("The film was")
    for number, prefix in ((0, []), (2, [1]), (3 + 1 + 3 * 2 + 1, [2, 1])):
        ids = torch.tensor([prompt + [restricted.token_ids[token] for token in prefix]])
        with torch.no_grad():
            state = policy.prefill(ids, torch.ones_like(ids))
        expected = state.logits[0, restricted.token_ids].softmax(-1).double()
        torch.testing.assert_close(restricted.logits[number].softmax(-1), expected, rtol=0, atol=1e-5)
    assert restricted.mdp.tabular_seq_logprobs(restricted.logits).exp().sum() == pytest.approx(1)


def test_the_scores_are_the_reward_models(bundled, restricted):
    task, _ = bundled
    for row in (0, 13, 26):
        ids = task.tokenizer.encode("The film was") + [restricted.token_ids[v] for v in restricted.mdp.tokens[row]]
        for length in range(1, 4):
            alone = torch.tensor([ids[: 3 + length]])
            mask = torch.ones_like(alone, dtype=torch.bool)
            score = task.reward_model(Episode(alone, mask, mask[:, 3:])).score.item()
            assert restricted.mdp.prefix_scores[row, length].item() == pytest.approx(score, abs=1e-4)
        assert restricted.mdp.scores[row] == restricted.outcome.reward.score[row]
        assert restricted.outcome.episode.input_ids[row].tolist() == ids


def test_real_prefix_scores_are_a_potential_and_real_attention_is_none(restricted):
    truth = score_gradient(restricted.mdp, restricted.logits)
    cosines = {}
    for name in ("red", "attention"):
        rewards = make_credit(name, credit_beta=1.0)(restricted.outcome, Resources()).token_rewards
        cosines[name] = agreement(policy_gradient(restricted.mdp, restricted.logits, rewards), truth).cosine
    assert cosines["red"] == pytest.approx(1, abs=1e-6)
    assert cosines["attention"] < 0.9999


def test_likely_tokens_differ_and_bad_ones_are_refused(bundled):
    task, policy = bundled
    tokens = likely_tokens(policy, [5, 6], 40, top=40, generator=torch.Generator().manual_seed(0))
    assert len(set(tokens)) == 40
    assert task.eos_token_id not in tokens
    for wrong in ([3, 3], [3, task.eos_token_id]):
        with pytest.raises(ValueError, match="give different ids, none the end of text"):
            restrict(policy, task.reward_model, [5], wrong, horizon=2)


@pytest.mark.skipif(not BENCHMARK.exists(), reason="needs a checkout, not an installed package")
def test_the_benchmark_measures_every_method():
    spec = importlib.util.spec_from_file_location("credit_bias", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    bundled, at_random = benchmark.bundled_instance(0, vocab_size=2, horizon=2), benchmark.random_instance(0)
    assert {"sparse", "red", "attention", "attention, beta .8"} <= at_random.keys() < bundled.keys()
    for name in ("sparse", "red"):
        assert bundled[name]["cosine"] == pytest.approx(1, abs=1e-6)
    assert at_random["uniform"]["cosine"] < 0.999
    for record in (*at_random.values(), *bundled.values()):
        assert record["full_return_cosine"] == pytest.approx(1, abs=1e-6)
    text = benchmark.markdown("Title", [bundled, bundled])
    assert len(text.splitlines()) == 4 + len(bundled)
    assert "| sparse | 1.000 [1.000, 1.000] | 1.000 |" in text
