"""Credit functions on their own: trailing axes, sums and what the padding may hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmdp.credit import attention_weights, blend, redistribute, sparse_weights, uniform_weights

LENGTHS = torch.tensor([1, 3, 5])
MASK = torch.arange(5) < LENGTHS[:, None]


def row():
    return torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * MASK / 5


@given(score=st.floats(-1e4, 1e4, width=32), beta=st.floats(0, 1), length=st.integers(1, 5))
def test_every_weighting_conserves_the_score(score, beta, length):
    mask = torch.arange(5) < length
    alpha, *_ = attention_weights(row()[2], mask)
    for weights in (sparse_weights(mask), uniform_weights(mask), blend(alpha, mask, beta)):
        assert (weights >= 0).all()
        assert not weights[~mask].any()
        token_rewards = redistribute(torch.tensor(score), weights)
        assert abs(token_rewards.double().sum().item() - score) <= 1e-5 * max(1.0, abs(score))


def test_a_batch_is_its_rows():
    batch = attention_weights(row(), MASK)
    for index in range(3):
        for ours, alone in zip(batch, attention_weights(row()[index], MASK[index]), strict=True):
            assert torch.equal(ours[index], alone)
        assert torch.equal(blend(batch[0], MASK, 0.3)[index], blend(batch[0][index], MASK[index], 0.3))
        assert torch.equal(sparse_weights(MASK)[index], sparse_weights(MASK[index]))
        assert torch.equal(uniform_weights(MASK)[index], uniform_weights(MASK[index]))


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_what_the_padding_holds_cannot_matter(garbage):
    clean = attention_weights(row(), MASK)
    dirty = attention_weights(torch.where(MASK, row(), garbage), MASK)
    for ours, theirs in zip(clean, dirty, strict=True):
        assert torch.equal(ours, theirs)


def test_below_the_floor_the_weights_are_uniform():
    weights, mass, fell_back = attention_weights(row() * torch.tensor([1.0, 1e-6, 1.0])[:, None], MASK)
    assert fell_back.tolist() == [False, True, False]
    assert mass[1] < 1e-6
    assert torch.equal(weights[1], uniform_weights(MASK)[1])


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"attention \(3, 4\) and response_mask \(3, 5\) differ"):
        attention_weights(row()[:, :4], MASK)
