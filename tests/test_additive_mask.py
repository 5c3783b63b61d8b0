"""The masks of a GPU's forwards, tried on the CPU: those that transformers makes, without NaN where nothing is seen."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import causal_mask_function, sdpa_mask

from tokenmdp.models.kernels.additive_mask import ALIGNED, additive_mask, causal_mask

N, HEADS, T, WIDTH = 3, 2, 11, 8
KEPT = torch.arange(T) >= torch.tensor([[0], [4], [10]])  # left-padded


def attend(mask, queries):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, N, HEADS, T, WIDTH, generator=generator)
    return scaled_dot_product_attention(query[:, :, T - queries :], key, value, attn_mask=mask)


@pytest.mark.parametrize("queries", [1, 3, T], ids=["a token", "some behind a cache", "a whole text"])
def test_it_is_the_mask_of_transformers(queries):
    theirs = sdpa_mask(
        N, queries, T, T - queries, attention_mask=KEPT, mask_function=causal_mask_function, allow_is_causal_skip=False
    )
    mask = causal_mask(KEPT, queries, torch.float32)
    assert torch.equal(mask == 0, theirs)
    seeing = theirs.any(-1, keepdim=True)  # others stand in the padding
    ours, expected = (attend(one, queries) for one in (mask, theirs))
    torch.testing.assert_close(ours.where(seeing, 0), expected.where(seeing, 0), rtol=0, atol=1e-6)
    assert ours.isfinite().all()


def test_no_layer_needs_to_convert_it():
    visible = KEPT[:, None, None, :]
    assert additive_mask(visible, torch.float16).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = additive_mask(visible, torch.float32)
    assert mask.dtype == torch.bfloat16
    assert mask.isfinite().all()
    assert all(stride % ALIGNED == 0 for stride in mask.stride()[:-1])
