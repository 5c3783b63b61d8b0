"""f-DPG: targets reached on an enumerable task, the normaliser, weights, skipped updates, moments, resumption."""

import math

import gymnasium as gym
import pytest
import torch
from data_doubles import every_logprob
from exact_optima import MDP, enumerable, tiny_lm
from test_ppo import make_lm, timeless, weights

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


def test_updates_that_know_no_z_take_no_step_and_are_counted(caplog):
    agent = make_agent(target="word:zebra")
    start = {name: weight.clone() for name, weight in agent.policy.named_parameters()}
    agent.learn(2)
    assert caplog.text.count("no response so far meets the target 'zebra', so no step was taken") == 1
    assert [metrics["skipped_updates"] for metrics in agent.history] == [1, 2]
    assert agent.history[-1]["minibatches"] == agent.history[-1]["z"] == 0
    assert agent.history[-1]["unknown_z"] == 1
    assert all(torch.equal(weight, start[name]) for name, weight in agent.policy.named_parameters())
    assert all(math.isfinite(value) for metrics in agent.history for value in metrics.values())
    known = make_agent(target="reward:>0").learn(1).history[0]
    assert known.keys() == agent.history[0].keys()
    with pytest.raises(TargetError, match="none of 160 responses meets the target 'zebra'"):
        agent.learn(8)


def test_weights_are_cut_only_if_asked_and_the_share_is_reported():
    options = {"learning_rate": 3e-2, "update_epochs": 3}
    free = make_agent(**options).learn(1).history[0]
    cut = make_agent(**options, weight_clip=1.0).learn(1).history[0]
    assert free["clip_fraction"] == 0
    assert 0.02 < cut["clip_fraction"] < 1
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


def test_the_proposal_writes_until_the_policy_is_nearer_to_the_target():
    agent = make_agent(make_envs(64), proposal="lagged", target="score/2", learning_rate=1e-2)
    start = {name: weight.clone() for name, weight in agent.policy.named_parameters() if weight.requires_grad}
    agent.learn(1)
    first = agent.history[0]
    assert first["ess"] < 1
    assert first["proposal_tv"] == pytest.approx(first["tv"])  # the policy has written
    assert first["proposal_age"] == 0
    played = agent.play

    def spy(*args, **options):
        assert all(torch.equal(weight, agent.proposal[name]) for name, weight in learned() if weight is not None)
        return played(*args, **options)

    def learned():
        return [(name, weight) for name, weight in agent.policy.named_parameters() if weight.requires_grad]

    agent.play = spy
    moved = [weight.clone() for _, weight in learned()]
    assert all(torch.equal(agent.proposal[name], start[name]) for name, _ in learned())
    agent.update()
    agent.play = played
    agent.learn(4)
    assert not all(torch.equal(one, weight) for one, (_, weight) in zip(moved, learned(), strict=True))
    renewed = [later["proposal_age"] == 1 for later in agent.history[2:]]
    nearer = [one["tv"] < one["proposal_tv"] for one in agent.history[1:-1]]
    assert renewed == nearer
    assert any(renewed)


def test_estimates_are_those_of_the_policy_whoever_writes():
    """TV and KL to the target, KL to the reference, mean score: exactly, and from responses of a lagged proposal."""
    config = FDPGConfig(**SETTINGS, proposal="lagged")
    agent = FDPG(tiny_lm(), enumerable(512), config).learn(1)
    reference, pi = every_logprob(agent.reference), every_logprob(agent.policy)
    p = agent.target.log_unnormalised(reference, Responses([""] * 15, MDP.scores)).log_softmax(0)
    assert kl(pi, reference) > 0.2  # its mean over responses of the proposal, not weighted, would be below 0
    agent.learn(1)
    found = agent.history[1]
    assert found["kl"] == pytest.approx(kl(pi, reference).item(), abs=0.15)
    assert found["tv"] == pytest.approx(total_variation(pi, p).item(), abs=0.07)
    assert found["reverse_kl"] == pytest.approx(kl(pi, p).item(), abs=0.1)
    assert found["proposal_tv"] == pytest.approx(total_variation(reference, p).item(), abs=0.07)
    assert found["alignment"] == pytest.approx((pi.exp() @ MDP.scores).item(), abs=0.2)


def test_moments_are_fitted_on_the_base():
    agent = FDPG(tiny_lm(), enumerable(256), FDPGConfig(**SETTINGS | {"target": "word:b@0.5"}, moment_samples=4000))
    agent.learn(1)
    assert isinstance(agent.target, DistributionalTarget)
    assert agent.target.reached["word:b"] == pytest.approx(0.5)
    responses = Responses.of(MDP.episodes([0], 1), agent.tokenizer, MDP.scores)
    reference = every_logprob(agent.reference)
    p = agent.target.log_unnormalised(reference, responses).softmax(0)
    has_b = agent.target.measures(responses)["moment_word:b"]
    assert (p @ has_b).item() == pytest.approx(0.5, abs=0.03)
    assert agent.history[0]["moment_word:b"] == pytest.approx((reference.exp() @ has_b).item(), abs=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"update_epochs": 2, "anneal_lr": True, "total_updates": 3},
        {"target": "word:good@0.6 & score/2", "moment_samples": 64},
        {"target": "word:zebra"},
        {"normaliser": "prompt", "responses_per_prompt": 2, "divergence": "tv"},
        {"proposal": "lagged", "target": "score/0.5"},
    ],
    ids=["score", "moments", "never met", "prompts", "lagged"],
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, options):
    unbroken = make_agent(**options).learn(3)
    make_agent(**options).learn(1).save(tmp_path / "run")
    resumed = FDPG.load(tmp_path / "run", make_envs()).learn(2)
    assert timeless(resumed.history) == timeless(unbroken.history)
    assert all(str(getattr(resumed, name)) == str(getattr(unbroken, name)) for name in FDPG.state)
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


def test_a_target_of_ones_own_and_adapters(tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    agent = make_agent(lora_rank=2, learning_rate=1e-2)
    agent.target = BinaryTarget(of_texts(lambda texts: [len(text.split()) > 4 for text in texts], "long", True))
    agent.learn(2)
    assert agent.history[-1]["kl"] != 0
    assert agent.history[0]["z"] == pytest.approx(agent.history[0]["alignment"], abs=1e-6)
    agent.save(tmp_path / "run")
    resumed = FDPG.load(tmp_path / "run", make_envs())
    with pytest.raises(TargetError, match="began with 'long'; assign that to agent"):
        resumed.learn(1)
    resumed.target = BinaryTarget(of_texts(lambda texts: [math.nan] * len(texts), "long", True))
    with pytest.raises(TargetError, match="'long' is nan for response 0 of 16"):
        resumed.learn(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "wrd:a"}, "'wrd:a' is no target; write word:WORD"),
        ({"target": "word:b & score/0.5", "divergence": "reverse-kl"}, "'b' gives some responses probability 0"),
        ({"divergence": "chi2"}, "divergence is 'chi2'; choose one of forward-kl, reverse-kl, js, tv"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1, and this algorithm does not use it; leave it at 0.3"),
        ({"top_k": 4}, "top_k is 4, and this algorithm does not use it; leave it at 0"),
        ({"weight_clip": 0}, "weight_clip is 0.0; it must be positive, or None to switch it off"),
        ({"normaliser": "prompt"}, "responses_per_prompt is 1; set it to at least 2"),
        ({"responses_per_prompt": 3}, "num_envs=16 is not a multiple of responses_per_prompt=3"),
        ({"moment_samples": 0}, "moment_samples is 0; it must be positive"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        FDPG("no such model", make_envs(), FDPGConfig(**(SETTINGS | options)))
