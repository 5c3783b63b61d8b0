"""Diversity, perplexity and the second judge: against plain loops, known texts and the rollouts themselves."""

import copy
import math
import random
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from gymnasium.error import DependencyNotInstalled
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp.evaluation.policies import evaluate, gold_scores, played
from tokenmdp.evaluation.texts import (
    KEPT_SAMPLES,
    distinct_n,
    evaluate_cell,
    perplexity,
    self_bleu,
)
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.reward_models import VocabularyMismatch, load_reward_model
from tokenmdp.runs.environments import evaluation_envs, make_envs, toy_policy
from tokenmdp.runs.settings import PRESETS
from tokenmdp.types import Episode

SETTINGS = replace(PRESETS["smoke"].settings, credit="uniform")
TEXTS = st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=9), min_size=2, max_size=6)


def policies(sharpness=3.0):
    """A policy that differs from its reference."""
    task = make_envs(SETTINGS, 1, None).unwrapped.task
    reference = CausalLMPolicy.for_task(toy_policy(1), task)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.lm.get_input_embeddings().weight.mul_(sharpness)
    return policy, reference


@given(TEXTS, st.integers(1, 4))
def test_distinct_n_counts_ngrams_of_each_text(texts, n):
    lines = ["".join(map(str, text)) for text in texts]
    ngrams = Counter(line[i : i + n] for line in lines for i in range(len(line)) if len(line[i : i + n]) == n)
    assert distinct_n(texts, n) == (len(ngrams) / ngrams.total() if ngrams else 0)


def test_a_collapsed_policy_has_no_diversity():
    texts, same = [[i, i + 1, i + 2, i + 3, i + 4] for i in range(0, 40, 5)], [[2, 3, 4, 5, 6]] * 8
    assert [distinct_n(texts, n) for n in (1, 2, 3)] == [1, 1, 1]
    assert [distinct_n(same, n) for n in (1, 2, 3)] == [1 / 8, 1 / 8, 1 / 8]
    assert self_bleu(same) == pytest.approx(1)
    assert self_bleu([[0]] * 8) == pytest.approx(1)  # end-of-text at once
    assert self_bleu(texts) < 0.15  # the smoothing keeps it above 0


def bleu(words, references):
    """BLEU-4 by its definition: clipped precisions up to the text's length, brevity penalty, exponential smoothing."""
    logs, smallest = [], 1
    for n in range(1, min(4, len(words)) + 1):
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        most = Counter()
        for reference in references:
            most |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        matches = (counts & most).total()
        if not matches:
            smallest *= 2
        logs.append(math.log((matches or 1 / smallest) / counts.total()))
    if not any(set(words) & set(reference) for reference in references):
        return 0.0
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return math.exp(sum(logs) / len(logs) + min(0, 1 - nearest / len(words)))


@given(TEXTS)
def test_self_bleu_is_the_mean_bleu_against_the_others(texts):
    expected = [bleu(text, texts[:place] + texts[place + 1 :]) for place, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(texts), abs=1e-9)


def test_self_bleu_does_not_know_which_number_a_token_has():
    rng = random.Random(0)
    texts = [[rng.randint(2, 9) for _ in range(12)] for _ in range(10)]
    assert self_bleu([[4000 - 7 * token for token in text] for text in texts]) == pytest.approx(self_bleu(texts))


def test_self_bleu_refuses_a_single_text_and_names_its_extra(monkeypatch):
    with pytest.raises(ValueError, match="at least 2"):
        self_bleu([[2, 3]])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(DependencyNotInstalled, match=r"pip install 'tokenmdp\[study\]'"):
        self_bleu([[2, 3], [2, 4]])


def test_perplexity_of_a_uniform_reference_is_the_number_of_tokens():
    assert perplexity([3 * math.log(1 / 32), math.log(1 / 32)], [3, 1]) == pytest.approx(32)


def test_a_row_says_what_the_rollouts_say():
    policy, reference = policies()
    row, samples = evaluate_cell(policy, reference, evaluation_envs(SETTINGS, 70, None), "toy-lexicon", 70, seed=3)
    envs = make_envs(SETTINGS, 64, None)
    rollouts = list(played(envs, policy, reference, samples=70, seed=3))
    assert [len(rollout.scores) for rollout in rollouts] == [64, 6]
    tokens = sum(int(rollout.response_mask.sum()) for rollout in rollouts)
    nats = torch.cat([rollout.ref_logprobs[rollout.response_mask] for rollout in rollouts])
    kls = torch.cat([(rollout.logprobs - rollout.ref_logprobs).sum(1) for rollout in rollouts])
    eos = envs.unwrapped.task.eos_token_id
    ended = [
        eos in ids[-mask.shape[0] :][mask].tolist()
        for rollout in rollouts
        for ids, mask in zip(rollout.input_ids, rollout.response_mask, strict=True)
    ]
    assert len(nats) == tokens
    assert row["perplexity"] == pytest.approx((-nats.mean()).exp().item(), rel=1e-5)
    assert row["kl"] == pytest.approx(kls.mean().item(), rel=1e-5)
    assert row["kl"] > 0.1
    assert row["response_length"] == tokens / 70
    assert row["ended_by_eos"] == sum(ended) / 70
    assert row["gold"] == pytest.approx(row["score"])  # the judge is the reward model itself here
    assert len(samples) == KEPT_SAMPLES
    assert all(sample.facts["gold"] == sample.score for sample in samples)


def test_a_row_agrees_with_the_commands_evaluation():
    policy, reference = policies()
    row, samples = evaluate_cell(policy, reference, evaluation_envs(SETTINGS, 12, None), None, 12, seed=1)
    whole = evaluate(policy, reference, evaluation_envs(SETTINGS, 12, None), samples=12, seed=1)
    assert row["score"] == pytest.approx(sum(whole.scores) / 12)
    assert row["kl"] == pytest.approx(sum(whole.kls) / 12)
    assert samples == whole.samples[:KEPT_SAMPLES]
    assert "gold" not in row


def test_a_sharp_policy_is_seen_as_less_diverse():
    reference = policies()[1]
    usual, _ = evaluate_cell(reference, reference, evaluation_envs(SETTINGS, 64, None), None, 64, seed=1)
    sharp, _ = evaluate_cell(policies(12.0)[0], reference, evaluation_envs(SETTINGS, 64, None), None, 64, seed=1)
    assert usual["kl"] == pytest.approx(0, abs=1e-5)
    assert sharp["self_bleu"] > usual["self_bleu"] + 0.2
    assert sharp["distinct_2"] < usual["distinct_2"] - 0.2


def test_gold_scores_are_the_models_scores_of_the_rows_texts():
    policy, reference = policies()
    (rollout,) = played(make_envs(SETTINGS, 5, None), policy, reference, samples=5, seed=1)
    judge = load_reward_model("toy-lexicon")
    for place, score in enumerate(gold_scores(judge, rollout).tolist()):
        parts = (rollout.input_ids, rollout.attention_mask, rollout.response_mask)
        assert judge(Episode(*(part[place : place + 1] for part in parts))).score.item() == score


def test_a_gold_model_of_another_vocabulary_is_refused():
    policy, reference = policies()
    with pytest.raises(VocabularyMismatch, match="align='offsets'"):
        evaluate_cell(policy, reference, evaluation_envs(SETTINGS, 4, None), "lexicon", 4, seed=1)
