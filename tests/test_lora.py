import copy
import sys

import gymnasium as gym
import pytest
import torch
from gymnasium.error import DependencyNotInstalled
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.evaluation import evaluate
from tokenmdp.files import CheckpointError, load_state, save_state
from tokenmdp.models.lora import WithoutAdapters, add_adapters
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.wrappers import vector

UNTIMED = ("seconds", "tokens_per_second")
IDS = torch.randint(0, 30, (5, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).bool()


def gpt2(seed=0):
    torch.manual_seed(seed)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=30, eos_token_id=30, **shape))


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, bos_token_id=30, eos_token_id=30, **shape))


def make_envs(num_envs=8):
    return vector.UniformReward(gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=num_envs, autoreset_mode="Disabled"))


def make_agent(lm=None, reference=None, num_envs=8, **options):
    settings = {"dtype": "float32", "device": "cpu", "learning_rate": 1e-2, "update_epochs": 2, "num_minibatches": 2}
    config = PPOConfig(**(settings | {"lora_rank": 4} | options))
    return PPO(gpt2() if lm is None else lm, make_envs(num_envs), config, reference)


def timeless(history):
    return [{key: value for key, value in metrics.items() if key not in UNTIMED} for metrics in history]


def logprobs(policy):
    with torch.no_grad():
        return policy.evaluate(IDS, MASK, 4).logprobs


@pytest.mark.parametrize("make_lm", [gpt2, llama])
def test_the_reference_is_the_base_model_to_the_bit(make_lm):
    plain = CausalLMPolicy(make_lm(), 32, 30)
    agent = make_agent(make_lm())
    assert torch.equal(logprobs(agent.policy), logprobs(plain))  # B is 0 at first
    agent.learn(2)
    assert isinstance(agent.reference, WithoutAdapters)
    assert torch.equal(logprobs(agent.reference), logprobs(plain))
    assert (logprobs(agent.policy) - logprobs(plain)).abs().max() > 0.01
    with torch.no_grad():
        states = [policy.prefill(IDS[:, :4], MASK[:, :4]) for policy in (agent.reference, plain)]
        states = [
            policy.append(state, IDS[:, 4]) for policy, state in zip((agent.reference, plain), states, strict=True)
        ]
    assert torch.equal(states[0].logits, states[1].logits)


def test_only_adapters_and_the_value_head_learn():
    agent = make_agent().learn(2)
    learned = {name for name, weight in agent.policy.named_parameters() if weight.requires_grad}
    assert {"value_head.weight", "value_head.bias"} < learned
    assert all(".lora_" in name or name.startswith("value_head") for name in learned)
    assert len(agent.optimizer.state) == len(learned)
    base = gpt2().state_dict()
    frozen = {name: weight for name, weight in agent.policy.lm.state_dict().items() if ".lora_" not in name}
    assert len(frozen) == len(base)
    for name, weight in frozen.items():
        assert torch.equal(weight, base[name.replace(".base_layer", "")]), name


def test_the_reference_costs_no_second_copy_of_the_weights():
    def numbers(*modules):
        """The count of numbers in every distinct storage that the modules' parameters and the optimizer use."""
        storages = {
            weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() // 4
            for module in modules
            for weight in module.parameters()
        }
        return sum(storages.values())

    base = numbers(gpt2())
    agent = make_agent().learn(1)
    adapters = sum(weight.numel() for weight in agent.policy.parameters() if weight.requires_grad)
    assert numbers(agent.policy, agent.reference, agent.reference.lm) == base + adapters
    assert adapters < base / 3
    moments = sum(value.numel() for state in agent.optimizer.state.values() for value in state.values() if value.ndim)
    assert moments == 2 * adapters
    copied = make_agent(lora_rank=0)
    assert numbers(copied.policy, copied.reference) > 2 * base


def test_adapters_learn_the_task():
    agent = make_agent(num_envs=32, kl_coef=0.02, update_epochs=4).learn(10)
    assert agent.history[-1]["score_mean"] > agent.history[0]["score_mean"] + 2
    assert abs(agent.history[0]["kl"]) < 1e-4
    assert agent.history[-1]["kl"] > 0.1


@pytest.mark.parametrize("make_lm", [gpt2, llama])
def test_a_checkpoint_is_the_adapted_policy_for_everybody(tmp_path, make_lm):
    agent = make_agent(make_lm()).learn(2)
    agent.save(tmp_path / "run")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not [name for name in lm.state_dict() if "lora" in name]
    merged = CausalLMPolicy.from_pretrained(str(tmp_path / "run"), 32, 30)
    torch.testing.assert_close(logprobs(merged), logprobs(agent.policy), rtol=0, atol=1e-5)
    assert torch.equal(merged.value_head.weight, agent.policy.value_head.weight)
    again = make_agent(str(tmp_path / "run")).learn(1)  # a new run starts from it and stays with it
    assert abs(again.history[0]["kl"]) < 1e-4


@pytest.mark.parametrize("reference_seed", [None, 1])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, reference_seed):
    def agent():
        return make_agent(reference=None if reference_seed is None else gpt2(reference_seed))

    unbroken, first = agent().learn(4), agent().learn(2)
    first.save(tmp_path / "run")
    assert (tmp_path / "run" / "state" / "base").exists() == (reference_seed is not None)
    saved = CausalLMPolicy.from_pretrained(str(tmp_path / "run" / "state" / "reference"), 32, 30)
    assert torch.equal(logprobs(saved), logprobs(first.reference))
    resumed = PPO.load(tmp_path / "run", make_envs()).learn(2)
    assert timeless(resumed.history) == timeless(unbroken.history)
    expected = unbroken.policy.state_dict()
    for name, weight in resumed.policy.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert torch.equal(logprobs(resumed.reference), logprobs(unbroken.reference))


def test_another_reference_is_used_where_one_is_given():
    agent = make_agent(reference=gpt2(seed=1)).learn(1)
    assert not isinstance(agent.reference, WithoutAdapters)
    assert torch.equal(logprobs(agent.reference), logprobs(CausalLMPolicy(gpt2(seed=1), 32, 30)))
    assert agent.history[0]["kl"] > 0.1


def test_the_reference_is_a_policy_like_any_other(tmp_path):
    agent = make_agent(top_k=5, gradient_checkpointing=True).learn(2)
    reference, plain = agent.reference, CausalLMPolicy(gpt2(), 32, 30, top_k=5)
    with torch.no_grad():
        assert torch.equal(reference(IDS, MASK, 4).logprobs, plain(IDS, MASK, 4).logprobs)
    envs, others = make_envs(), make_envs()
    for policy in (reference, plain):
        policy.min_new_tokens = 3
    assert (evaluate(envs, reference, 16).scores == evaluate(others, plain, 16).scores).all()
    reference.save_pretrained(tmp_path / "base")
    saved = CausalLMPolicy.from_pretrained(str(tmp_path / "base"), 32, 30, min_new_tokens=3, top_k=5)
    assert torch.equal(logprobs(saved), logprobs(plain))
    assert torch.equal(saved.value_head.weight, agent.policy.value_head.weight)


def test_the_settings_of_the_reference_are_its_own_and_so_are_those_of_its_copies():
    agent = make_agent(top_k=5, gradient_checkpointing=True)
    everything = copy.copy(agent.reference)
    everything.top_k, everything.temperature = 0, 0.5
    with torch.no_grad():
        state, narrow = (policy.prefill(IDS, MASK) for policy in (everything, agent.reference))
        expected = CausalLMPolicy(gpt2(), 32, 30, temperature=0.5).prefill(IDS, MASK)
    torch.testing.assert_close(state.logits, expected.logits, rtol=0, atol=1e-5)
    assert narrow.logits.shape == (5, 5)
    assert (agent.policy.top_k, agent.policy.temperature, agent.policy.gradient_checkpointing) == (5, 1.0, True)


def test_a_deep_copy_of_the_reference_has_weights_of_its_own():
    agent = make_agent()
    copied, before = copy.deepcopy(agent.reference), logprobs(agent.reference)
    with torch.no_grad():
        copied.lm.transformer.wte.weight.mul_(2)
    assert torch.equal(logprobs(agent.reference), before)
    assert not torch.equal(logprobs(copied), before)


def test_freezing_the_reference_leaves_the_adapters_learning():
    agent = make_agent()
    learned = [name for name, weight in agent.policy.named_parameters() if weight.requires_grad]
    agent.reference.requires_grad_(False)
    logprobs(agent.reference)
    assert [name for name, weight in agent.policy.named_parameters() if weight.requires_grad] == learned


@pytest.mark.parametrize("change", ["renamed", "missing"])
def test_adapters_that_do_not_fit_are_refused(tmp_path, change):
    make_agent().learn(1).save(tmp_path / "run")
    path = tmp_path / "run" / "state" / "adapters.safetensors"
    state = load_state(path)
    name = next(name for name in state if "lora_B" in name)
    weight = state.pop(name)
    if change == "renamed":
        state[name.replace("default", "other")] = weight
    save_state(path, state)
    (path.parent / "sha256sums.txt").unlink()  # which would only say that the file has changed
    with pytest.raises(CheckpointError) as caught:
        PPO.load(tmp_path / "run", make_envs())
    message = str(caught.value)
    assert message.startswith(f"{path} does not fit the model (1 weights that learn are missing, such as {name}")
    assert ("1 weights are not the policy's" in message) == (change == "renamed")
    assert "restore a copy" in message


def test_the_seed_decides_the_random_matrix():
    def first_matrix(seed):
        policy = CausalLMPolicy(gpt2(), 32, 30)
        before = torch.get_rng_state()
        add_adapters(policy, 4, 16, "all-linear", seed)
        assert torch.equal(torch.get_rng_state(), before)
        return next(weight for name, weight in policy.named_parameters() if "lora_A" in name)

    assert torch.equal(first_matrix(1), first_matrix(1))
    assert not torch.equal(first_matrix(1), first_matrix(2))


def test_a_regular_expression_chooses_the_layers():
    agent = make_agent(lora_target_modules=r".*\.attn\.c_attn")
    adapted = {name.split(".lora_")[0] for name, _ in agent.policy.named_parameters() if ".lora_" in name}
    assert adapted == {f"lm.transformer.h.{layer}.attn.c_attn" for layer in (0, 1)}


def test_what_cannot_be_adapted_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"takes in transformer\.wte, a Embedding; choose linear layers"):
        make_agent(lora_target_modules=".*wte")
    with pytest.raises(ValueError, match=r"='nowhere' cannot be adapted.* such as transformer\.h\.0\.attn\.c_attn$"):
        make_agent(lora_target_modules="nowhere")
    with pytest.raises(ValueError, match="lora_rank is -1; it must not be negative"):
        PPOConfig(lora_rank=-1)
    with pytest.raises(ValueError, match=r"lora_alpha is 0\.0; it must be positive"):
        PPOConfig(lora_alpha=0)
    make_agent().save(tmp_path / "run")
    with pytest.raises(ValueError, match="lora_rank cannot change"):
        PPO.load(tmp_path / "run", make_envs(), lora_rank=8)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyNotInstalled, match=r"lora_rank=4 needs peft: pip install 'tokenmdp\[lora\]'"):
        make_agent()
