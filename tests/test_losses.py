import math

import pytest
import torch

from tokenmdp.divergences import kl_k3
from tokenmdp.losses import clipped_policy_loss, clipped_value_loss, entropy_bonus


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    return new * 0.3, old * 0.3, advantages, mask


def entries(mask):
    return [(row, t) for row, t in mask.nonzero().tolist()]


def test_policy_loss_is_the_hand_loop(batch):
    new, old, advantages, mask = batch
    total, kl, clipped = 0.0, 0.0, 0
    for where in entries(mask):
        ratio = math.exp(new[where] - old[where])
        bounded = min(max(ratio, 0.8), 1.2)
        total += -min(ratio * advantages[where].item(), bounded * advantages[where].item())
        kl += kl_k3(old[where], new[where]).item()
        clipped += abs(ratio - 1) > 0.2
    count = len(entries(mask))
    result = clipped_policy_loss(new, old, advantages, mask, clip_coef=0.2)
    assert math.isclose(result.loss, total / count)
    assert math.isclose(result.approx_kl, kl / count)
    assert math.isclose(result.clip_fraction, clipped / count, rel_tol=1e-6)
    assert 0 < clipped < count


def test_without_change_the_gradient_is_the_policy_gradient(batch):
    new, _, advantages, mask = batch
    new = new.clone().requires_grad_()
    result = clipped_policy_loss(new, new.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(result.loss, new)
    torch.testing.assert_close(gradient, -advantages * mask / mask.sum())
    assert result.approx_kl == result.clip_fraction == 0


def test_value_loss_is_the_hand_loop(batch):
    values, old, returns, mask = batch
    for clip in (0.2, None):
        total = 0.0
        for where in entries(mask):
            error = (values[where] - returns[where]).item() ** 2
            if clip is not None:
                near = old[where] + min(max(values[where] - old[where], -clip), clip)
                error = max(error, (near - returns[where]).item() ** 2)
            total += error / 2
        assert math.isclose(clipped_value_loss(values, old, returns, mask, clip), total / len(entries(mask)))


def test_the_bonus_is_the_mean_entropy_over_the_mask(batch):
    entropy, _, _, mask = batch
    assert torch.isclose(entropy_bonus(entropy, mask), entropy[mask].mean())


@pytest.mark.parametrize("garbage", [1e30, -1e30])
def test_what_the_padding_holds_cannot_matter(batch, garbage):
    new, old, advantages, mask = batch
    dirty = torch.where(mask, new, garbage).requires_grad_()
    losses = [
        clipped_policy_loss(dirty, old, advantages, mask).loss + clipped_value_loss(dirty, old, advantages, mask),
        clipped_policy_loss(new, old, advantages, mask).loss + clipped_value_loss(new, old, advantages, mask),
    ]
    assert torch.equal(*losses)
    losses[0].backward()
    assert torch.isfinite(dirty.grad).all()
    assert not dirty.grad[~mask].any()
