import logging

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from tokenmdp.files import CheckpointError
from tokenmdp.models.policy import VALUE_HEAD_FILE, CausalLMPolicy
from tokenmdp.models.policy_fit import check_vocabulary
from tokenmdp.models.precision import resolve_dtype
from tokenmdp.models.tokens import VocabularyMismatch, toy_tokenizer

V, EOS, P, H = 37, 5, 6, 7  # the models below have 40 logits: a padded vocabulary
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def language_model(kind, dropout=0.0):
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        config = GPT2Config(vocab_size=40, initializer_range=0.3, bos_token_id=EOS, eos_token_id=EOS, **shape, **rates)
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class RenamedCache(GPT2Model):
    """The cache's argument as transformers calls it from 5.24 on."""

    def forward(self, input_ids=None, cache=None, position_ids=None, **options):
        options |= {} if cache is None else {"past_key_values": cache}
        return super().forward(input_ids, position_ids=position_ids, **options)


def make_policy(kind="gpt2", dropout=0.0, **options):
    policy = CausalLMPolicy(language_model(kind, dropout), V, EOS, **options)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def prompts():
    """Three prompts of 6, 1 and 3 tokens, left-padded with an id that means something elsewhere."""
    ids = torch.randint(0, V, (3, P), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(P) >= P - torch.tensor([6, 1, 3])[:, None]
    return ids, mask


@torch.no_grad()
def sample(policy, ids, mask, seed=0, deterministic=False):
    """Sample H tokens per row through the cache: ids, mask, logprobs, values and supports."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    state, logprobs, values, supports = policy.prefill(ids, mask), [], [], []
    for t in range(H):
        uniform = torch.rand(len(ids), dtype=torch.float64, device=ids.device, generator=generator)
        token, logprob, value = policy.act(state, uniform, deterministic)
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logprobs.append(logprob)
        values.append(value)
        supports.append(state.support)
        if t + 1 < H:
            state = policy.append(state, token)
    return ids, mask, torch.stack(logprobs, 1), torch.stack(values, 1), supports


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "options", [{}, {"min_new_tokens": 3}, {"top_k": 5, "temperature": 0.7}, {"min_new_tokens": 3, "top_k": 4}], ids=str
)
def test_cached_sampling_equals_the_full_forward(kind, options, device):
    policy = make_policy(kind, **options).to(device)
    ids, mask, logprobs, values, supports = sample(policy, *(part.to(device) for part in prompts()))
    sampled_among = torch.stack(supports, 1) if policy.top_k else None
    for support in (None, sampled_among):
        full = policy.evaluate(ids, mask, P, support)
        torch.testing.assert_close(full.logprobs, logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(full.values, values, rtol=0, atol=1e-4)
        assert torch.isfinite(full.entropy).all()
    assert values.std() > 0.1
    assert ids.max() < V
    if policy.min_new_tokens:
        assert not (ids[:, P : P + 3] == EOS).any()


def test_the_padding_of_prompts_and_responses_cannot_matter():
    policy = make_policy()
    ids, mask, *_ = sample(policy, *prompts())
    mask[1, P + 4 :] = False  # row 1 ended after 4 tokens
    other = torch.where(mask, ids, (ids + 1) % V)
    ours, theirs = policy.evaluate(ids, mask, P), policy.evaluate(other, mask, P)
    alone = policy.evaluate(ids[1:2, P - 1 : P + 4], mask[1:2, P - 1 : P + 4], prompt_slots=1)
    for number, of_other, of_alone in zip(ours, theirs, alone, strict=True):
        torch.testing.assert_close(of_other[1, :4], number[1, :4], rtol=0, atol=1e-5)
        torch.testing.assert_close(of_alone[0], number[1, :4], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"min_new_tokens": H}, {"top_k": 3}, {"top_k": 3, "min_new_tokens": 1}], ids=str
)
@torch.no_grad()
def test_tokens_are_drawn_from_the_processed_distribution(options):
    policy = make_policy(temperature=1.5, **options)
    ids, mask = prompts()
    raw = policy.lm(ids[:1], attention_mask=mask[:1].long()).logits[0, -1, :V] / 1.5
    if policy.min_new_tokens:
        raw[EOS] = -torch.inf
    if policy.top_k:
        raw[raw < raw.topk(policy.top_k).values.min()] = -torch.inf
    expected = raw.softmax(-1)
    draws = 20_000
    state = policy.prefill(ids[:1].expand(draws, -1), mask[:1].expand(draws, -1))
    token, logprob, _ = policy.act(
        state, torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    frequencies = torch.bincount(token, minlength=V) / draws
    assert ((frequencies - expected).abs() <= 4.5 * (expected * (1 - expected) / draws).sqrt()).all()
    torch.testing.assert_close(logprob, expected.log()[token], rtol=0, atol=1e-4)
    full = policy.evaluate(torch.cat([ids[:1], token[:1, None]], 1), torch.ones(1, P + 1, dtype=torch.bool), P)
    assert torch.isclose(full.entropy[0, 0], torch.special.entr(expected).sum(), atol=1e-4)


def test_the_caches_argument_may_have_the_name_of_transformers_5_24():
    plain, other = make_policy(), language_model("gpt2")
    renamed = RenamedCache(other.config)
    renamed.load_state_dict(other.transformer.state_dict())
    other.transformer = renamed
    policy = CausalLMPolicy(other, V, EOS)
    policy.value_head.load_state_dict(plain.value_head.state_dict())
    for one, two in zip(sample(plain, *prompts())[:4], sample(policy, *prompts())[:4], strict=True):
        torch.testing.assert_close(one, two)


def test_scores_on_the_samplers_support_stay_finite_for_another_policy():
    policy, other = make_policy(top_k=3), make_policy(top_k=3)
    with torch.no_grad():
        for parameter in other.lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    ids, mask, _, _, supports = sample(policy, *prompts())
    logprobs = other.evaluate(ids, mask, P, torch.stack(supports, 1)).logprobs
    assert (logprobs > -60).all()
    missing = other.evaluate(ids, mask, P)  # on its own top 3 the sampled tokens are not all there
    own = torch.stack([(s == t[:, None]).any(1) for s, t in zip(supports, ids[:, P:].T, strict=True)], 1)
    assert own.all()
    assert not torch.allclose(missing.logprobs, logprobs)


def test_deterministic_takes_the_most_likely_token():
    policy = make_policy()
    ids, mask = prompts()
    state = policy.prefill(ids, mask)
    token, logprob, _ = policy.act(state, deterministic=True)
    assert torch.equal(token, state.logits.argmax(-1))
    torch.testing.assert_close(logprob, state.logits.log_softmax(-1).max(-1).values)


def test_dropout_stays_off_and_a_fresh_value_head_says_0():
    policy = make_policy(dropout=0.5)
    ids, mask, logprobs, *_ = sample(policy, *prompts())
    policy.train()
    assert not any(module.training for module in policy.modules())
    torch.testing.assert_close(policy.evaluate(ids, mask, P).logprobs, logprobs, rtol=0, atol=1e-4)
    fresh = CausalLMPolicy(language_model("gpt2"), V, EOS)
    assert not fresh.evaluate(ids, mask, P).values.any()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_bfloat16_forwards_stay_close_and_keep_float32_outputs(device):
    exact = make_policy("llama").to(device)
    ids, mask, logprobs, values, _ = sample(exact, *(part.to(device) for part in prompts()))
    rounded = make_policy("llama", compute_dtype=torch.bfloat16).to(device)
    with rounded.autocast():  # as `collect` does around its loop
        result = rounded.evaluate(ids, mask, P)
    assert {number.dtype for number in result} == {torch.float32}
    assert 0 < (result.logprobs - logprobs).abs().max() < 0.5
    assert (result.values - values).abs().max() < 0.1 * values.abs().max()
    result.logprobs.sum().backward()
    assert rounded.lm.get_output_embeddings().weight.grad.dtype == torch.float32


def test_a_saved_policy_comes_back_with_its_value_head(tmp_path):
    policy = make_policy()
    ids, mask, *_ = sample(policy, *prompts())
    policy.save_pretrained(tmp_path)
    loaded = CausalLMPolicy.from_pretrained(str(tmp_path), V, EOS)
    for ours, theirs in zip(policy.evaluate(ids, mask, P), loaded.evaluate(ids, mask, P), strict=True):
        assert torch.equal(ours, theirs)
    GPT2LMHeadModel.from_pretrained(tmp_path)  # a plain transformers directory too
    (tmp_path / VALUE_HEAD_FILE).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=VALUE_HEAD_FILE):
        CausalLMPolicy.from_pretrained(str(tmp_path), V, EOS)


def test_models_that_scoring_would_get_wrong_are_refused():
    config = CohereConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, logit_scale=0.1, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        CausalLMPolicy(CohereForCausalLM(config), V, EOS)


@pytest.mark.parametrize(
    ("vocab_size", "options", "message"),
    [
        (V, {"temperature": 0.0}, "temperature is 0.0"),
        (V, {"top_k": V + 1}, r"top_k is 38; choose 0 \(all tokens\) to 37"),
        (41, {}, "40 logits and the environment 41 tokens"),
    ],
)
def test_bad_arguments_are_named(vocab_size, options, message):
    with pytest.raises(ValueError, match=message):
        CausalLMPolicy(language_model("gpt2"), vocab_size, EOS, **options)


def test_episodes_beyond_the_positions_are_refused():
    policy = make_policy()
    policy.check_positions(32)
    with pytest.raises(ValueError, match="up to 33 slots and the policy has 32 positions"):
        policy.check_positions(33)


def test_a_policy_with_another_tokenizer_is_refused(tmp_path):
    tokenizer, other = toy_tokenizer(), toy_tokenizer()
    make_policy().save_pretrained(tmp_path)
    check_vocabulary(str(tmp_path), tokenizer)  # a directory without tokenizer files cannot be compared
    tokenizer.save_pretrained(tmp_path)
    check_vocabulary(str(tmp_path), tokenizer)
    other.add_tokens(["splendid"])
    with pytest.raises(VocabularyMismatch, match=r"\(33 tokens\).*\(32 tokens\).*id 32 \('splendid'"):
        check_vocabulary(str(tmp_path), other)


def test_dtype_auto_falls_back_with_a_word(monkeypatch, caplog):
    cpu = torch.device("cpu")
    monkeypatch.delenv("TOKENMDP_DTYPE", raising=False)
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with caplog.at_level(logging.INFO):
        assert resolve_dtype("auto", cpu) == torch.float32
        assert "falling back to float32" in caplog.text
        resolve_dtype("bfloat16", cpu)
        assert "emulates bfloat16" in caplog.text
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_dtype("auto", cpu) == torch.bfloat16


@pytest.fixture
def tf32_off():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.usefixtures("tf32_off")
def test_tf32_is_float32_with_the_switch_of_a_gpu(caplog):
    with caplog.at_level(logging.INFO):
        assert resolve_dtype("tf32", torch.device("cuda")) is torch.float32
    assert torch.backends.cuda.matmul.allow_tf32
    assert "TF32 from here on" in caplog.text
    assert resolve_dtype("tf32", torch.device("cpu")) is torch.float32  # of a run that began on a GPU
    assert "tf32 is a precision of GPUs: this cpu computes in float32" in caplog.text


def test_dtype_auto_is_what_the_environment_says(monkeypatch):
    cpu = torch.device("cpu")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("TOKENMDP_DTYPE", name)
        assert resolve_dtype("auto", cpu) == dtype
        assert resolve_dtype("float32", cpu) == torch.float32, "an answer given is not overruled"
    monkeypatch.setenv("TOKENMDP_DTYPE", "half")
    with pytest.raises(ValueError, match="TOKENMDP_DTYPE is 'half'; choose"):
        resolve_dtype("auto", cpu)
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        resolve_dtype("float16", cpu)
