"""f-DPG: targets reached on an enumerable task, the normaliser, weights, skipped updates, moments, resumption."""

import math

import gymnasium as gym
import pytest
import torch
from test_ppo import enumerable, make_lm, timeless, weights

from tokenmdp.agents.f_dpg import FDPG, FDPGConfig
from tokenmdp.agents.ppo import PPO
from tokenmdp.files import CheckpointError
from tokenmdp.targets import BinaryTarget, DistributionalTarget, Responses, TargetError, of_texts
from tokenmdp.testing import kl, total_variation
from tokenmdp.wrappers import vector

SETTINGS = {"dtype": "float32", "device": "cpu", "learning_rate": 3e-3, "target": "score/1"}


def make_envs(num_envs=16, wrapper=vector.SparseReward, **options):
    return wrapper(gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=num_envs, autoreset_mode="Disabled", **options))


def make_agent(envs=None, **options):
    return FDPG(make_lm(), envs or make_envs(), FDPGConfig(**(SETTINGS | options)))


def train(updates, num_envs=256, **options):
    """An agent on 15 enumerable texts: exact log-probabilities of target, policy and reference, log Z, the agent."""
    mdp, envs, seq_logprobs = enumerable(num_envs)
    schedule = {"learning_rate": 6e-3, "anneal_lr": True, "total_updates": updates, "update_epochs": 3}
    agent = FDPG(make_lm(vocab_size=3, eos=2), envs, FDPGConfig(**(SETTINGS | schedule | options)))
    agent.learn(updates)
    responses = Responses.of(mdp.episodes(prompt=[0], prompt_slots=2), agent.tokenizer, mdp.scores)
    reference = seq_logprobs(agent.reference)
    unnormalised = agent.target.log_unnormalised(reference, responses)
    log_z = unnormalised.logsumexp(0)
    return unnormalised - log_z, seq_logprobs(agent.policy), reference, log_z, agent, mdp


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "divergence"),
    [
        *(("score/1", name) for name in ("forward-kl", "reverse-kl", "js", "tv")),
        *(("word:b", name) for name in ("forward-kl", "js", "tv")),
    ],
)
def test_every_divergence_reaches_the_target(target, divergence):
    updates = 30 if divergence == "tv" else 18  # its rewards have one size, so its steps stay noisy to the end
    p, policy, reference, log_z, agent, mdp = train(updates, target=target, divergence=divergence)
    assert total_variation(reference, p) > 0.4
    assert total_variation(policy, p) < 0.05
    last = agent.history[-1]
    assert last["z"] == pytest.approx(log_z.exp().item(), rel=0.1)
    assert last["tv"] < 0.1
    assert last["js"] < 0.02
    if target == "score/1":  # the optimum of PPO's objective
        optimum, best = mdp.optimum(reference, kl_coef=1.0)
        torch.testing.assert_close(p, optimum)
        # The others do not weigh what is rare as the objective's KL does, total variation least.
        assert best - mdp.objective(policy, reference, 1.0) < {"reverse-kl": 0.02, "tv": 0.08}.get(divergence, 0.05)


@pytest.mark.slow
def test_moments_are_fitted_on_the_base_and_reached():
    p, policy, reference, _, agent, _ = train(
        10, 128, target="word:b@0.5", divergence="forward-kl", moment_samples=4000
    )
    assert isinstance(agent.target, DistributionalTarget)
    assert agent.target.reached["word:b"] == pytest.approx(0.5)
    assert kl(p, reference) > 0.05
    assert total_variation(policy, p) < 0.1
    assert agent.history[-1]["moment_word:b"] == pytest.approx(0.5, abs=0.1)


def test_in_the_first_update_the_policy_is_the_reference():
    agent = make_agent(make_envs(64), target="reward:>0", learning_rate=1e-12).learn(1)
    (first,) = agent.history
    assert first["kl"] == pytest.approx(0, abs=1e-9)  # the same forward: no rounding of the cache
    assert first["z"] == pytest.approx(first["alignment"])  # P / q is the indicator
    assert first["tv"] == pytest.approx(1 - first["z"], abs=1e-6)
    assert first["forward_kl"] == pytest.approx(-math.log(first["z"]), abs=1e-6)
    assert first["target_ess"] == pytest.approx(first["alignment"])
    assert first["ess"] == pytest.approx(1)
    assert first["clip_fraction"] == 0
    assert "reverse_kl" not in first
    assert "kl_coef" not in first


def test_z_is_the_mean_over_the_lifetime_each_batch_with_its_own_policy():
    agent, sums, counts = make_agent(make_envs(32), target="score/2", learning_rate=1e-2), [], []
    kept = agent._log_z

    def spy(rollout, log_weights):
        sums.append(log_weights.exp().sum().item())
        counts.append(len(log_weights))
        return kept(rollout, log_weights)

    agent._log_z = spy
    agent.learn(3)
    assert [metrics["z"] for metrics in agent.history] == pytest.approx(
        [sum(sums[:n]) / sum(counts[:n]) for n in (1, 2, 3)]
    )


def test_prompts_can_have_a_normaliser_each():
    agent = make_agent(make_envs(16), normaliser="prompt", responses_per_prompt=4, target="score/2").learn(2)
    assert 1 < len(agent.z_sums) <= 8
    assert sum(count for _, count in agent.z_sums.values()) == 32
    assert "" not in agent.z_sums
    assert all(math.isfinite(value) for metrics in agent.history for value in metrics.values())


def test_updates_that_know_no_z_take_no_step_and_are_counted():
    agent = make_agent(target="word:zebra")
    start = {name: weight.clone() for name, weight in agent.policy.named_parameters()}
    agent.learn(2)
    assert [metrics["skipped_updates"] for metrics in agent.history] == [1, 2]
    assert agent.history[-1]["minibatches"] == agent.history[-1]["z"] == 0
    assert agent.history[-1]["unknown_z"] == 1
    assert all(torch.equal(weight, start[name]) for name, weight in agent.policy.named_parameters())
    assert all(math.isfinite(value) for metrics in agent.history for value in metrics.values())
    known = make_agent(target="reward:>0").learn(1).history[0]
    assert known.keys() == agent.history[0].keys()
    with pytest.raises(TargetError, match="none of 160 responses meets the target 'word:zebra'"):
        agent.learn(8)


def test_weights_are_cut_only_if_asked_and_the_share_is_reported():
    options = {"learning_rate": 3e-2, "update_epochs": 3}
    free = make_agent(**options).learn(1).history[0]
    cut = make_agent(**options, weight_clip=1.0).learn(1).history[0]
    assert free["clip_fraction"] == 0
    assert 0.05 < cut["clip_fraction"] < 1
    assert 0 < free["ess"] < 1
    assert free["approx_kl"] > 0.01
    assert make_agent(**options, target_kl=1e-4).learn(1).history[0]["minibatches"] < 6


def test_the_baseline_is_one_batch_late():
    agent = make_agent(make_envs(32), divergence="forward-kl", learning_rate=1e-12, target="reward:>0").learn(3)
    first, second, third = agent.history
    rewards = [metrics["alignment"] / metrics["z"] for metrics in agent.history]  # 1 / t, as pi = a
    assert first["baseline"] == pytest.approx(rewards[0])
    assert second["baseline"] == pytest.approx(rewards[0])
    assert third["baseline"] == pytest.approx(sum(rewards[:2]) / 2)
    assert agent.baseline == pytest.approx(sum(rewards) / 3)


@pytest.mark.parametrize(
    "options",
    [
        {"update_epochs": 2, "anneal_lr": True, "total_updates": 3},
        {"target": "word:good@0.6 & score/2", "moment_samples": 64},
        {"target": "word:zebra"},
        {"normaliser": "prompt", "responses_per_prompt": 2, "divergence": "tv"},
    ],
    ids=["score", "moments", "never met", "prompts"],
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, options):
    unbroken = make_agent(**options).learn(3)
    make_agent(**options).learn(1).save(tmp_path / "run")
    resumed = FDPG.load(tmp_path / "run", make_envs()).learn(2)
    assert timeless(resumed.history) == timeless(unbroken.history)
    assert all(getattr(resumed, name) == getattr(unbroken, name) for name in FDPG.state)
    expected = weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    with pytest.raises(CheckpointError, match=r"cannot read .*ppo_config.json"):
        PPO.load(tmp_path / "run", make_envs())


def test_learning_brings_words_and_credit_makes_no_difference():
    agents = [
        make_agent(make_envs(64, wrapper), target="words:great,good", update_epochs=4).learn(5)
        for wrapper in (vector.SparseReward, vector.UniformReward)
    ]
    assert timeless(agents[0].history) == timeless(agents[1].history)
    assert agents[0].history[-1]["alignment"] > agents[0].history[0]["alignment"] + 0.15
    assert not agents[0].policy.value_head.weight.any()


def test_a_target_of_ones_own_and_adapters():
    pytest.importorskip("peft", reason="adapters need peft")
    agent = make_agent(lora_rank=2, learning_rate=1e-2)
    agent.target = BinaryTarget(of_texts(lambda texts: [len(text.split()) > 4 for text in texts], "long", True))
    agent.learn(2)
    assert agent.history[-1]["kl"] != 0
    assert agent.history[0]["z"] == pytest.approx(agent.history[0]["alignment"], abs=1e-6)
    agent.target = BinaryTarget(of_texts(lambda texts: [math.nan] * len(texts), "broken", True))
    with pytest.raises(TargetError, match="'broken' is nan for response 0 of 16"):
        agent.learn(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "wrd:a"}, "'wrd:a' is no target; write word:WORD"),
        ({"target": "word:b & score/0.5", "divergence": "reverse-kl"}, "'b' gives some responses probability 0"),
        ({"divergence": "chi2"}, "divergence is 'chi2'; choose one of forward-kl, reverse-kl, js, tv"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1 and f-DPG has no use for it"),
        ({"kl_target": 6.0}, "kl_target is 6.0 and kl_coef is 0"),
        ({"clip_coef": 0.1}, "clip_coef is 0.1 and f-DPG has no use for it"),
        ({"top_k": 4}, "top_k is 4 and f-DPG has no use for it"),
        ({"weight_clip": 0}, "weight_clip is 0.0; it must be positive, or None to switch it off"),
        ({"normaliser": "prompt"}, "responses_per_prompt is 1; set it to at least 2"),
        ({"responses_per_prompt": 3}, "num_envs=16 is not a multiple of responses_per_prompt=3"),
        ({"moment_samples": 0}, "moment_samples is 0; it must be positive"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        FDPG("no such model", make_envs(), FDPGConfig(**(SETTINGS | options)))
