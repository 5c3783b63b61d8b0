"""Steps of one shape and copies of weights give what plain steps give; on a GPU test_on_cuda.py runs them."""

import copy

import pytest
import torch
from placement_cases import SHORT, Run, credited, make_agent, make_envs, reward_model, timeless
from test_policy import EOS, H, V, language_model, make_policy, prompts
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tokenmdp.models.kernels import packed_weights
from tokenmdp.models.kernels.weight_copies import WeightCopies
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.recorded_steps import COLUMNS, FixedLayer
from tokenmdp.rollouts.collecting import collect

CPU = torch.device("cpu")


def qwen2():
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def policy_of(kind, **options):
    policy = CausalLMPolicy(qwen2() if kind == "qwen2" else language_model(kind), V, EOS, **options)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


@torch.no_grad()
def logits_of_steps(policy, ids, mask, tokens):
    """Logits and values before each of the tokens (N, H)."""
    with policy.decoding(len(ids), 1):
        state = policy.recorded(policy.prefill(ids, mask), H)
        found = [(state.logits, state.value)]
        for token in tokens.T:
            state = policy.append(state, token)
            found.append((state.logits.clone(), state.value))
    logits, values = zip(*found, strict=True)
    return torch.stack(logits), torch.stack(values), state.cache


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [0, 5])
def test_steps_of_one_shape_give_the_same_numbers(kind, dtype, top_k):
    options = {"compute_dtype": dtype, "min_new_tokens": 3, "top_k": top_k}
    plain, fixed = (policy_of(kind, rollout_steps=steps, **options) for steps in ("plain", "recorded"))
    fixed.load_state_dict(plain.state_dict())
    ids, mask = prompts()
    tokens = torch.randint(0, V, (3, H), generator=torch.Generator().manual_seed(2))
    for columns in (slice(None), slice(2, None)):  # prompts of another length use the same memory
        logits, values, _ = logits_of_steps(plain, ids[:2, columns], mask[:2, columns], tokens[:2])
        others, other_values, cache = logits_of_steps(fixed, ids[:2, columns], mask[:2, columns], tokens[:2])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-1
        assert torch.allclose(others, logits, atol=tolerance, rtol=tolerance)
        assert torch.allclose(other_values, values, atol=3 * tolerance, rtol=tolerance)
        assert values.std() > 0.1
        assert cache is fixed._recorded
        cache._recording = object()  # a recording cannot be copied
        assert copy.deepcopy(fixed)._recorded._recording is None
    assert fixed._recorded.shape == (2, 64)
    assert fixed.to(torch.float32)._recorded is None, "the weights may have moved"


def test_a_run_by_steps_of_one_shape_learns_the_same(caplog):
    found = []
    for steps in ("plain", "recorded"):
        run = Run("red", config={"rollout_steps": steps}, env=SHORT)
        envs = credited(make_envs(reward_model("gpt2", CPU), **SHORT), "red", {}, CPU)
        found.append(timeless(make_agent(run, envs, CPU).learn(2).history))
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    assert "nothing is recorded on cpu" in caplog.text


def test_what_cannot_be_recorded_is_refused():
    config = MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    policy = CausalLMPolicy(MistralForCausalLM(config), V, EOS, rollout_steps="recorded")
    with pytest.raises(ValueError, match="needs plain attention and positions, which MistralForCausalLM"):
        policy.recorded(policy.prefill(*prompts()), H)
    abc_d = Run("abc-d", config={"rollout_steps": "recorded"})
    envs = credited(make_envs(reward_model("gpt2", CPU)), "abc-d", {}, CPU)
    with pytest.raises(ValueError, match="keeps no attention, which abc-d credit reads at every token"):
        make_agent(abc_d, envs, CPU)
    agent = make_agent(Run("abc-d"), envs, CPU)
    agent.policy.rollout_steps = "recorded"
    with pytest.raises(ValueError, match="keeps no attention"):
        agent.learn(1)
    with pytest.raises(ValueError, match="rollout_steps is 'record'; choose one of plain, copied, recorded"):
        policy_of("gpt2", rollout_steps="record")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_that_would_differ_are_refused(monkeypatch, dtype):
    monkeypatch.setattr(FixedLayer, "begin", lambda *arguments: None)  # the prompts are lost
    policy = policy_of("gpt2", rollout_steps="recorded", compute_dtype=dtype)
    with pytest.raises(ValueError, match="gives GPT2LMHeadModel other probabilities than plain steps; choose 'copied'"):
        policy.recorded(policy.prefill(*prompts()), H)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_copies_of_the_weights_give_what_autocast_gives(kind):
    policy = make_policy(kind, compute_dtype=torch.bfloat16)
    ids, mask = prompts()
    copies = WeightCopies()
    for _ in range(2):
        with torch.no_grad(), policy.autocast():
            plain = policy.append(policy.prefill(ids, mask), ids[:, 0])
            with copies.used(policy.lm):
                copied = policy.append(policy.prefill(ids, mask), ids[:, 0])
        assert torch.equal(copied.logits, plain.logits)
        with torch.no_grad():  # the copies are of the weights as they are
            for weight in policy.parameters():
                weight.mul_(0.9)
    memory = [copy.data_ptr() for copy, _ in copies._copies.values()]
    with copies.used(policy.lm):
        pass
    assert memory == [copy.data_ptr() for copy, _ in copies._copies.values()]


def test_a_cpu_packs_its_weights_instead_of_copying_them():
    policy = make_policy(compute_dtype=torch.bfloat16, rollout_steps="recorded")
    layer = policy.lm.transformer.h[0].mlp.c_fc
    with policy.decoding(3, H + 8):
        assert ("forward" in vars(layer)) == packed_weights.can_pack(CPU, torch.bfloat16)
        assert not policy._copies._copies


def test_a_text_that_fills_the_columns_with_its_only_token_fits():
    policy = CausalLMPolicy(language_model("llama"), V, EOS, rollout_steps="recorded")
    ids = torch.ones(1, COLUMNS - 1, dtype=torch.long)
    with torch.no_grad(), policy.decoding(1, 1):
        state = policy.recorded(policy.prefill(ids, torch.ones_like(ids)), 1)
        assert policy.append(state, ids[:, 0]).logits.isfinite().all()
    assert policy._recorded.shape == (1, COLUMNS)


def test_a_nan_of_one_rollout_is_not_in_the_next():
    policy = policy_of("gpt2", rollout_steps="recorded")
    ids, mask = prompts()
    tokens = torch.zeros(3, 2, dtype=torch.long)
    before, _, cache = logits_of_steps(policy, ids, mask, tokens)
    for layer in cache.fixed:
        layer.values.fill_(torch.nan)
    assert torch.equal(logits_of_steps(policy, ids, mask, tokens)[0], before)


def test_adapters_and_their_reference_play():
    run = Run("red", config={"rollout_steps": "recorded", "lora_rank": 2}, env=SHORT)
    envs = credited(make_envs(reward_model("gpt2", CPU), **SHORT), "red", {}, CPU)
    agent = make_agent(run, envs, CPU).learn(1)
    rollout, _ = collect(envs, agent.reference, None, seed=0)
    assert rollout.response_mask.any(-1).all()
    assert agent.policy._recorded is not None
    assert agent.reference.rollout_steps == "plain"
