import dataclasses
import json
import math
import shutil

import gymnasium as gym
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tokenmdp.agents import base
from tokenmdp.agents.base import adapt_kl_coef
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.credit import SparseCredit
from tokenmdp.files import CheckpointError, load_state, save_state
from tokenmdp.training import checkpoint as checkpoint_files
from tokenmdp.wrappers import vector

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
UNTIMED = ("seconds", "tokens_per_second")


def make_envs(num_envs=8, wrapper=vector.UniformReward, **options):
    return wrapper(gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=num_envs, autoreset_mode="Disabled", **options))


def make_lm(vocab_size=32, eos=30):
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=eos, eos_token_id=eos, **shape))


def make_agent(envs=None, **options):
    settings = {"dtype": "float32", "device": "cpu", "learning_rate": 1e-3, "update_epochs": 2, "num_minibatches": 2}
    return PPO(make_lm(), envs or make_envs(), PPOConfig(**(settings | options)))


def timeless(history):
    return [{key: value for key, value in metrics.items() if key not in UNTIMED} for metrics in history]


def weights(agent):
    return {**agent.policy.state_dict(), **{f"reference.{k}": v for k, v in agent.reference.state_dict().items()}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anneal_lr": True, "total_updates": 5, "kl_target": 0.5, "kl_horizon": 20, "top_k": 7, "temperature": 0.8},
        {"estimator": "full_return"},
        {"estimator": "vine", "vine_rollouts": 2, "top_k": 7},
    ],
    ids=["defaults", "schedules and top-k", "full return", "vine"],
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, options):
    unbroken = make_agent(**options).learn(5)
    first = make_agent(**options).learn(2)
    first.save(tmp_path / "run")
    resumed = PPO.load(tmp_path / "run", make_envs())
    assert resumed.num_updates_done == 2
    resumed.learn(3)
    assert resumed.config == unbroken.config
    assert timeless(resumed.history) == timeless(unbroken.history)
    assert resumed.kl_coef == unbroken.kl_coef
    expected = weights(unbroken)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    assert timeless(first.history) == timeless(unbroken.history[:2])  # saving disturbed nothing
    assert timeless(first.learn(3).history) == timeless(unbroken.history)


def test_the_same_seed_gives_the_same_run_and_another_gives_another():
    runs = [timeless(make_agent(seed=seed).learn(2).history) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0][0]["score_mean"] != runs[2][0]["score_mean"]


@pytest.mark.parametrize("wrapper", [vector.SparseReward, vector.UniformReward, vector.AttentionCreditReward])
def test_learning_raises_the_score_and_every_metric_is_finite(wrapper):
    agent = make_agent(make_envs(32, wrapper), kl_coef=0.02, learning_rate=4e-3, update_epochs=4)
    seen = []
    agent.learn(6, seen.append)
    assert seen == agent.history
    assert [metrics["update"] for metrics in seen] == list(range(1, 7))
    assert all(math.isfinite(value) for metrics in seen for value in metrics.values())
    assert seen[-1]["score_mean"] > seen[0]["score_mean"] + 2
    assert seen[-1]["kl"] > 0.1
    assert abs(seen[0]["kl"]) < 1e-4  # the policy starts as its reference


@pytest.mark.parametrize("estimator", ["full_return", "vine"])
def test_the_other_estimators_learn_too(estimator):
    options = {"kl_coef": 0.02, "learning_rate": 4e-3, "update_epochs": 4, "vine_rollouts": 2}
    agent = make_agent(make_envs(32, vector.SparseReward), estimator=estimator, **options).learn(6)
    assert all(math.isfinite(value) for metrics in agent.history for value in metrics.values())
    assert agent.history[-1]["score_mean"] > agent.history[0]["score_mean"] + 2
    assert agent.history[-1]["kl"] > 0.1


@pytest.mark.parametrize("estimator", ["reward_to_go", "full_return", "vine"])
def test_only_the_reward_to_go_sees_how_a_score_is_spread(estimator):
    """One update from sparse and from uniform credit, in which nothing else differs."""
    wrappers = (vector.SparseReward, vector.UniformReward)
    agents = [make_agent(make_envs(16, one), estimator=estimator, vine_rollouts=2).learn(1) for one in wrappers]
    sparse, uniform = (nn.utils.parameters_to_vector(agent.policy.parameters()) for agent in agents)
    start = nn.utils.parameters_to_vector(agents[0].reference.parameters())
    assert (sparse - start).norm() > 0.1
    same = (sparse - uniform).norm() < 1e-3 * (sparse - start).norm()
    assert same == (estimator != "reward_to_go")


def test_vine_refuses_credit_that_adds_to_the_score():
    class Bonus(SparseCredit):
        name, conserves_return = "bonus", False

    envs = gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=8, autoreset_mode="Disabled")
    make_agent(vector.CreditReward(envs, Bonus()), estimator="full_return")
    with pytest.raises(ValueError, match="bonus credit adds other rewards"):
        make_agent(vector.CreditReward(envs, Bonus()), estimator="vine")


def test_the_kl_penalty_holds_the_policy_back():
    kls = [make_agent(make_envs(32), kl_coef=coef, update_epochs=4).learn(8).history[-1]["kl"] for coef in (0.0, 5.0)]
    assert kls[0] > 4 * abs(kls[1])


def test_only_the_first_update_seeds_the_environment(monkeypatch):
    seeds, collect = [], base.collect

    def spy(*parts, seed, **options):
        seeds.append(seed)
        return collect(*parts, seed=seed, **options)

    monkeypatch.setattr(base, "collect", spy)
    make_agent(seed=4).learn(2).learn(1)
    assert seeds == [base.environment_seed(4), None, None]


def test_the_entropy_bonus_keeps_the_policy_broad():
    narrow, broad = (
        make_agent(make_envs(32), ent_coef=coef, kl_coef=0.0, update_epochs=4, learning_rate=3e-3)
        .learn(5)
        .history[-1]["entropy"]
        for coef in (0.0, 1.0)
    )
    assert broad > narrow + 0.2


def test_minimum_length_and_top_k_leave_everything_finite():
    agent = make_agent(make_envs(16, min_new_tokens=3), top_k=4, learning_rate=5e-3, update_epochs=6).learn(6)
    assert all(math.isfinite(value) for metrics in agent.history for value in metrics.values())
    assert all(metrics["response_length"] >= 4 for metrics in agent.history)
    assert agent.history[-1]["kl"] > 0


def test_target_kl_ends_the_epochs_before_the_step_that_goes_too_far():
    free = make_agent(learning_rate=1e-2, update_epochs=5).learn(1).history[0]
    held = make_agent(learning_rate=1e-2, update_epochs=5, target_kl=0.01).learn(1).history[0]
    assert free["minibatches"] == 10
    assert 2 <= held["minibatches"] < 10
    assert held["approx_kl"] < free["approx_kl"]


def test_every_episode_is_in_one_minibatch_of_each_epoch_also_if_they_do_not_divide():
    agent = make_agent(make_envs(5), num_minibatches=4, update_epochs=3)
    parts = [part.tolist() for part in agent._minibatches(5)]
    assert [len(part) for part in parts] == [2, 1, 1, 1] * 3
    for first in (0, 4, 8):
        assert sorted(row for part in parts[first : first + 4] for row in part) == list(range(5))
    assert parts[:4] != parts[4:8]
    assert agent.learn(1).history[0]["minibatches"] == 12


def test_the_coefficient_follows_the_target():
    assert adapt_kl_coef(0.2, kl=60.0, kl_target=6.0, kl_horizon=1000, num_episodes=100) == pytest.approx(0.204)
    assert adapt_kl_coef(0.2, kl=-1.0, kl_target=6.0, kl_horizon=1000, num_episodes=100) == pytest.approx(0.196)
    assert adapt_kl_coef(0.2, kl=6.6, kl_target=6.0, kl_horizon=1000, num_episodes=100) == pytest.approx(0.202)
    agent = make_agent(kl_coef=0.1, kl_target=5.0, kl_horizon=8).learn(2)
    assert [metrics["kl_coef"] for metrics in agent.history] == pytest.approx([0.1, 0.08])


def test_the_learning_rate_falls_linearly_and_the_run_ends_where_it_is_0():
    agent = make_agent(anneal_lr=True, total_updates=4).learn(4)
    rates = [metrics["learning_rate"] for metrics in agent.history]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    with pytest.raises(ValueError, match="exceed total_updates=4"):
        agent.learn(1)


def test_a_callback_may_interrupt_and_the_run_goes_on_as_if_it_had_not():
    def interrupt(metrics):
        if metrics["update"] == 2:
            raise KeyboardInterrupt

    agent = make_agent()
    with pytest.raises(KeyboardInterrupt):
        agent.learn(4, interrupt)
    assert agent.num_updates_done == len(agent.history) == 2
    assert timeless(agent.learn(2).history) == timeless(make_agent().learn(4).history)


def test_a_nan_stops_the_run_and_names_the_remedy():
    agent = make_agent()
    torch.nn.init.constant_(agent.policy.value_head.bias, torch.nan)
    with pytest.raises(FloatingPointError, match=r"the values are NaN or infinite.*lower learning_rate"):
        agent.learn(1)
    with pytest.raises(FloatingPointError, match=r"update 1 .*lower learning_rate \(rates now: 1e\+30, 0.003\)"):
        make_agent(learning_rate=1e30).learn(1)


def test_bfloat16_learns_too():
    agent = make_agent(make_envs(32), dtype="bfloat16", update_epochs=4, learning_rate=3e-3).learn(4)
    assert agent.policy.lm.dtype == torch.float32
    assert agent.history[-1]["score_mean"] > agent.history[0]["score_mean"]
    still = make_agent(make_envs(32), dtype="bfloat16", learning_rate=1e-12).learn(1).history[0]
    assert 0 <= still["approx_kl"] < 1e-4  # rounding alone: sampling with the cache against the full forward
    exact = make_agent(make_envs(32), dtype="float32", learning_rate=1e-12).learn(1).history[0]
    assert 0 < abs(still["entropy"] - exact["entropy"]) < 1e-2
    assert still["clip_fraction"] == 0


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_learns_saves_and_resumes(tmp_path, dtype):
    agent = make_agent(make_envs(32), device="cuda", dtype=dtype, update_epochs=4, top_k=20).learn(8)
    assert agent.policy.lm.device.type == "cuda"
    assert agent.history[-1]["score_mean"] > agent.history[0]["score_mean"]
    agent.save(tmp_path / "run")
    PPO.load(tmp_path / "run", make_envs(32)).learn(1)
    PPO.load(tmp_path / "run", make_envs(32), top_k=0).learn(1)


def test_a_checkpoint_is_a_directory_that_transformers_reads(tmp_path):
    agent = make_agent().learn(1)
    agent.save(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert torch.equal(model.transformer.wte.weight, agent.policy.lm.transformer.wte.weight)
    assert tokenizer.get_vocab() == agent.envs.unwrapped.tokenizer.get_vocab()
    assert json.loads((tmp_path / "run/ppo_config.json").read_text())["config"] == dataclasses.asdict(agent.config)
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"value_head.safetensors", "state/trainer.safetensors", "state/envs.json"} <= files
    assert not [name for name in files if name.endswith((".pt", ".bin", ".pkl"))]
    other = PPO(str(tmp_path / "run"), make_envs(), dataclasses.replace(agent.config, seed=9))  # a new run from it
    assert torch.equal(other.policy.value_head.weight, agent.policy.value_head.weight)
    assert other.num_updates_done == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "run"
    make_agent().save(run)
    return run


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    [
        "ppo_config.json",
        "model.safetensors",
        "value_head.safetensors",
        "config.json",
        "state/trainer.safetensors",
        "state/envs.json",
        "state/history.json",
        "state/reference/model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named(checkpoint, name, damage):
    file = checkpoint / name
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(file.parent)):
        PPO.load(checkpoint, make_envs())


def test_foreign_and_missing_checkpoints_are_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere/ppo_config.json"):
        PPO.load(tmp_path / "nowhere", make_envs())
    config = checkpoint / "ppo_config.json"
    (checkpoint / "state" / "sha256sums.txt").unlink()  # which would only say that the file has changed
    config.write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match=r"has format .other. and this version reads .tokenmdp-ppo-2"):
        PPO.load(checkpoint, make_envs())
    config.write_text(json.dumps({"format": str(PPO.format), "config": {"learning_speed": 1}}))
    with pytest.raises(CheckpointError, match="learning_speed"):
        PPO.load(checkpoint, make_envs())


def test_a_run_that_goes_on_in_another_precision_says_so(checkpoint, caplog, monkeypatch):
    PPO.load(checkpoint, make_envs(), dtype="auto")
    monkeypatch.setenv("TOKENMDP_DTYPE", "bfloat16")
    PPO.load(checkpoint, make_envs(), dtype="bfloat16")
    assert "goes on in" not in caplog.text, "the same, then asked for"
    PPO.load(checkpoint, make_envs(), dtype="auto")
    assert "saved by a run in float32, which goes on in bfloat16" in caplog.text


def test_a_checkpoint_of_another_device_goes_on_and_says_what_differs(checkpoint, caplog):
    file = checkpoint / "state" / "trainer.safetensors"
    (checkpoint / "state" / "sha256sums.txt").unlink()
    save_state(file, load_state(file) | {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)})
    agent = PPO.load(checkpoint, make_envs(), learning_rate=5e-4).learn(1)
    assert "saved on cuda" in caplog.text
    assert agent.history[-1]["learning_rate"] == 5e-4
    with pytest.raises(ValueError, match="kl_coef, seed cannot change"):
        PPO.load(checkpoint, make_envs(), seed=3, kl_coef=0.3)


def test_environments_of_another_shape_are_refused(checkpoint):
    with pytest.raises(CheckpointError, match="8 random-number states for 4 rows"):
        PPO.load(checkpoint, make_envs(4))


def test_an_interrupted_save_leaves_the_previous_checkpoint(checkpoint, monkeypatch):
    agent = PPO.load(checkpoint, make_envs()).learn(1)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            agent.save(checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    agent.save(checkpoint)
    assert PPO.load(checkpoint, make_envs()).num_updates_done == 1


def test_saving_never_replaces_other_files_and_says_when_it_cannot_write(tmp_path):
    agent = make_agent()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other files"):
        agent.save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        agent.save(tmp_path / "thesis.txt" / "run")


def test_misfits_of_policy_and_environment_are_named():
    with pytest.raises(ValueError, match="num_envs=8 does not fill num_minibatches=9"):
        make_agent(num_minibatches=9)
    with pytest.raises(ValueError, match="10 logits and the environment 32 tokens"):
        PPO(make_lm(vocab_size=10, eos=1), make_envs(), PPOConfig(device="cpu"))
    model = make_lm()
    with pytest.raises(ValueError, match="policy and reference are one model object"):
        PPO(model, make_envs(), PPOConfig(device="cpu"), reference=model)
    with pytest.raises(ValueError, match="up to 44 slots and the policy has 32 positions"):
        make_agent(make_envs(max_new_tokens=40))
