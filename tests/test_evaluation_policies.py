"""An evaluation computes credit for the episodes it shows, and every number is what credit for all would give."""

import json
import warnings
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import HashRewardModel

from tokenmdp.credit import make_credit
from tokenmdp.evaluation.policies import Evaluation, evaluate, load_evaluation, played, save_evaluation
from tokenmdp.models.loading import load_causal_lm
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.samples import samples_from_rollout
from tokenmdp.runs.environments import toy_policy
from tokenmdp.runs.policy_run import PolicyRun
from tokenmdp.runs.settings import PRESETS
from tokenmdp.training.processes import Processes
from tokenmdp.wrappers import vector

TOY = "tokenmdp:TextGen-Toy-v0"
IMDB = "tokenmdp:TextGen-IMDb-v0"
PROMPTS = ["The film was", "The acting is", "This is a very", "A story of", "We laughed; the rest was"]


def toy_envs(wrapper=vector.UniformReward, num_envs=6, **options):
    envs = gym.make_vec(TOY, num_envs=num_envs, autoreset_mode="Disabled", reward_model=HashRewardModel(), **options)
    return wrapper(envs)


def toy_policies(envs):
    policies = [CausalLMPolicy.for_task(toy_policy(seed), envs.unwrapped.task) for seed in (3, 4)]
    with torch.no_grad():
        policies[0].lm.get_input_embeddings().weight.mul_(3)
    return policies


def only_uniform(seen):
    """Uniform credit that keeps the number of episodes it is called with."""
    uniform = make_credit("uniform")

    class Watched:
        name, conserves_return, causal, potential_based, needs = "watched", True, False, False, frozenset()

        def __call__(self, outcome, resources):
            seen.append(len(outcome.rows))
            return uniform(outcome, resources)._replace(report={"row": outcome.rows.float()})

    return lambda envs: vector.CreditReward(envs, Watched())


@pytest.fixture(scope="module")
def bundled():
    return load_causal_lm("imdb-tiny")


@pytest.mark.parametrize(
    ("credit", "options"),
    [
        ("attention", {"score_when": "all_done"}),
        ("red", {"score_when": "ended"}),
        ("abc-d", {"score_when": "all_done"}),
        ("abc-d", {"score_when": "ended"}),
        ("shapley", {"score_when": "all_done", "max_new_tokens": 4}),
        ("shapley", {"reward_model": "lexicon:imdb-tiny", "score_when": "ended", "max_new_tokens": 12}),
    ],
    ids=str,
)
def test_the_shown_credit_and_all_numbers_are_those_of_the_full_computation(credit, options, bundled):
    options = {"max_new_tokens": 6} | options
    envs = gym.make_vec(IMDB, num_envs=4, autoreset_mode="Disabled", prompts=PROMPTS, **options)
    envs = vector.CreditReward(envs, make_credit(credit))
    policy = CausalLMPolicy.for_task(bundled, envs.unwrapped.task)
    reference = CausalLMPolicy.for_task(bundled, envs.unwrapped.task, temperature=1.5)
    full = list(played(envs, policy, reference, samples=10, seed=3))
    some = list(played(envs, policy, reference, samples=10, seed=3, credited=6))
    for rollout, same in zip(full, some, strict=True):
        for name, column in rollout._asdict().items():
            if name != "token_rewards" and column is not None:
                assert torch.equal(column, getattr(same, name)), name
    assert [int(rollout.token_rewards.isfinite().all(1).sum()) for rollout in full] == [4, 4, 2]
    assert [rollout.token_rewards.isfinite().all(1).tolist() for rollout in some] == [
        [True] * 4, [True] * 2 + [False] * 2, [False] * 2,
    ]  # fmt: skip

    result = evaluate(policy, reference, envs, samples=10, seed=3, shown=6)
    kls = [(rollout.logprobs - rollout.ref_logprobs).sum(1).tolist() for rollout in full]
    assert result.scores == [score for rollout in full for score in rollout.scores.tolist()]
    assert result.kls == [kl for part in kls for kl in part]
    assert result.lengths == [length for rollout in full for length in rollout.response_mask.sum(1).tolist()]
    tokenizer = envs.unwrapped.tokenizer
    expected = [sample for rollout in full for sample in samples_from_rollout(rollout, tokenizer)][:6]
    assert any(credit for sample in expected for credit in sample.credits[:-1])
    if credit == "shapley" and "reward_model" not in options:
        # A transformer that reads other texts at the same time rounds differently.
        for ours, theirs in zip(result.samples, expected, strict=True):
            assert ours.credits == pytest.approx(theirs.credits, abs=1e-6)
            assert replace(ours, credits=[]) == replace(theirs, credits=[])
    else:
        assert result.samples == expected


@pytest.mark.parametrize(("shown", "calls"), [(0, []), (2, [2]), (6, [6]), (9, [6, 3]), (100, [6, 6, 2])])
def test_the_credit_method_sees_the_shown_episodes_only(shown, calls):
    seen = []
    envs = toy_envs(only_uniform(seen), score_when="all_done")
    result = evaluate(*toy_policies(envs), envs, samples=14, shown=shown)
    assert seen == calls
    assert len(result.samples) == min(shown, 14)
    assert len(result.scores) == len(result.kls) == len(result.tokens) == len(result.ref_logprobs) == 14
    assert result.lengths == list(map(len, result.tokens))
    assert result.gold == []


def test_rows_without_credit_end_as_without_a_wrapper_and_reports_are_of_the_others():
    envs = toy_envs(only_uniform([]))
    policy, reference = toy_policies(envs)
    rollout, metrics = collect(envs, policy, reference, seed=1, credited_rows=3)
    assert rollout.token_rewards[3:].isnan().all()
    torch.testing.assert_close(rollout.token_rewards[:3].sum(1), rollout.scores[:3])
    assert metrics["row"] == 1  # the mean of 0, 1, 2
    assert "row" not in collect(envs, policy, reference, seed=1, credited_rows=0)[1]
    assert collect(envs, policy, reference, seed=1)[1]["row"] == 2.5
    envs.reset(seed=0)
    with envs.credit_first(2), pytest.raises(RuntimeError), envs.credit_first(4):
        raise RuntimeError
    with envs.credit_first(2):
        *_, infos = envs.step(np.full(6, envs.unwrapped.eos_token_id))
    assert infos["_token_rewards"].tolist() == [True] * 2 + [False] * 4
    assert infos["_score"].all()
    envs.reset(seed=0)
    *_, infos = envs.step(np.full(6, envs.unwrapped.eos_token_id))
    assert infos["_token_rewards"].all()


def test_a_second_judge_scores_every_episode():
    envs = toy_envs()
    result = evaluate(*toy_policies(envs), envs, samples=8, judge=envs.unwrapped.task.reward_model)
    assert result.gold == result.scores
    assert result.kls != [0] * 8


@pytest.mark.parametrize("judge", ["run", "run/checkpoint", "lexicon"])
def test_a_judge_that_is_the_reward_model_is_named_however_it_is_written(judge, tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    settings = replace(PRESETS["smoke"].settings, reward_model="./run", judge=judge)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        PolicyRun(settings).check(1, Processes())
    assert [str(one.message) for one in seen] == (
        [] if judge == "lexicon" else [f"the judge {judge} is the reward model itself, so its score says nothing that "
                                       "the first one does not; choose another --judge"]
    )  # fmt: skip


def test_evaluations_load_also_those_of_earlier_versions(tmp_path):
    envs = toy_envs()
    result = evaluate(*toy_policies(envs), envs, samples=8, shown=2)
    save_evaluation(tmp_path / "new.json", result)
    assert load_evaluation(tmp_path / "new.json") == result
    record = {
        name: column for name, column in asdict(result).items() if name in ("scores", "kls", "lengths", "samples")
    }
    (tmp_path / "old.json").write_text(json.dumps(record))
    old = load_evaluation(tmp_path / "old.json")
    assert old == replace(result, ref_logprobs=[], tokens=[])
    assert isinstance(old, Evaluation)
