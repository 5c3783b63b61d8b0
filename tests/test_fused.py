"""Each shortcut against the plain computation that it replaces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel

from tokenmdp.models.kernels import cpu_attention, token_scores
from tokenmdp.models.policy import CausalLMPolicy


def plain_scores(logits, tokens):
    every_logprob = logits.float().log_softmax(-1)
    entropy = -(every_logprob.exp() * every_logprob).sum(-1)
    return every_logprob.gather(-1, tokens[..., None]).squeeze(-1), entropy


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(2, 50), chunk=st.integers(1, 400), data=st.data())
def test_token_scores_equal_log_softmax_with_their_gradients(rows, width, chunk, data):
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, width, generator=generator) * 4).requires_grad_()
    tokens = torch.randint(0, width, (rows,), generator=generator)
    weights = torch.randn(2, rows, generator=generator)
    used = data.draw(st.sampled_from([(0,), (1,), (0, 1)]))  # logprobs, entropy or both in the loss
    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(token_scores.CHUNK_NUMBERS, "cpu", chunk)
        for scores in (plain_scores, token_scores.token_scores):
            numbers = scores(logits, tokens)
            gradients.append(
                (*numbers, *torch.autograd.grad(sum((numbers[i] * weights[i]).sum() for i in used), logits))
            )
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_token_scores_of_bfloat16_are_those_of_the_rounded_logits():
    logits = torch.randn(6, 5, 300, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    tokens = torch.arange(30).view(6, 5)
    ours, plain = token_scores.token_scores(logits, tokens), plain_scores(logits, tokens)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    grad, expected = (torch.autograd.grad(numbers[0].sum(), logits)[0] for numbers in (ours, plain))
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forbidden_token_makes_no_nan_also_under_autocast(dtype):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 7] = torch.finfo(dtype).min
    logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob, entropy = token_scores.token_scores(logits, torch.tensor([1, 2, 3]))
    torch.testing.assert_close((logprob, entropy), plain_scores(logits, torch.tensor([1, 2, 3])), rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(3 * logprob.sum() + 1e4 * entropy.sum(), logits)
    assert grad.isfinite().all()
    assert not grad[:, 7].any()


def test_token_scores_keep_nothing_of_the_size_of_the_logits_but_the_logits():
    logits = torch.randn(64, 500, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_scores.token_scores(logits, torch.zeros(64, dtype=torch.long))
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= logits.numel()] == [logits.data_ptr()]


def test_a_second_derivative_is_refused():
    logits, weights = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    logprobs, _ = token_scores.token_scores(logits, torch.zeros(3, dtype=torch.long))
    (grad,) = torch.autograd.grad((logprobs * weights).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_activation_in_one_kernel_is_the_same_function():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    plain = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(4)
    ids = torch.randint(0, 32, (3, 10))
    expected = plain(ids).logits
    policy = CausalLMPolicy(plain, 32, 0)
    torch.testing.assert_close(policy.lm(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert sum(type(module) is torch.nn.GELU for module in policy.lm.modules()) == 2
    assert policy.lm.config.activation_function == "gelu_new"  # what is saved is still GPT-2


def tensors(queries, keys, heads, key_heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, number, length, 8, generator=generator)
        for number, length in ((heads, queries), (key_heads, keys), (key_heads, keys))
    )


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 9), (3, 9)])
def test_attention_in_bfloat16_equals_sdpa_up_to_rounding(queries, keys, kind, key_heads):
    query, key, value = tensors(queries, keys, 4, key_heads)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask = {"causal": None, "bool": seen.expand(3, 1, -1, -1).clone()}.get(kind)
    if kind == "bool":
        mask[0, :, :, 0] = False  # row 0 has a padded slot
        mask[0, :, 0, 0] |= not mask[0, 0, 0].any()
    if kind == "additive":
        mask = torch.zeros(1, 4, queries, keys).masked_fill(~seen, -1e9) + torch.randn(1, 4, 1, keys)
    truth = scaled_dot_product_attention(
        query, key, value, attn_mask=seen if mask is None else mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    small = query.bfloat16()
    for cached in (torch.bfloat16, torch.float32):
        assert cpu_attention.attends(small, key)
        ours = cpu_attention.attend(small, key.to(cached), value.to(cached), mask, 0.3, is_causal=queries > 1)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), truth, rtol=0, atol=5e-2)


def test_attention_with_large_scores_stays_within_the_rounding_of_its_products():
    query, key, value = (3 * part for part in tensors(32, 32, 4, 4))
    seen = torch.ones(32, 32, dtype=torch.bool).tril()
    truth = scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
    scores = (query @ key.transpose(-1, -2)).abs().amax() * 8**-0.5
    ours = cpu_attention.attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), seen, None, is_causal=True)
    # 2^-8 of a score in each of query, key and product; a weight moves by as much, the output by that times its values.
    bound = 3 * 2**-8 * scores * value.abs().amax()
    assert (ours.float() - truth).abs().amax() < bound
    assert (ours.float() - truth).norm() < 0.03 * truth.norm()


def test_many_weights_go_to_the_kernel_that_does_not_keep_them(monkeypatch):
    query, key, _ = (part.bfloat16() for part in tensors(6, 6, 4, 4))
    assert cpu_attention.attends(query, key)
    monkeypatch.setattr(cpu_attention, "MOST_WEIGHTS", 3 * 4 * 6 * 6 - 1)
    assert not cpu_attention.attends(query, key)
    assert cpu_attention.attends(query[:, :, :1], key)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_in_bfloat16_has_sdpas_gradients(key_heads):
    leaves = [part.requires_grad_() for part in tensors(6, 6, 4, key_heads)]
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    plain = scaled_dot_product_attention(*leaves, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    ours = cpu_attention.attend(*(leaf.bfloat16() for leaf in leaves), None, None, is_causal=True)
    weights = torch.randn(plain.shape)
    pairs = zip(*(torch.autograd.grad((out * weights).sum(), leaves) for out in (ours.float(), plain)), strict=True)
    for grad, expected in pairs:
        assert (grad - expected).norm() < 0.02 * expected.norm()
