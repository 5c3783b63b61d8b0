"""Losses of comparisons as numbers: by hand, against other libraries; and the scores that Bradley-Terry finds."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tabular import minimise, ordered_pairs, preferred

from tokenmdp.preference_losses import bradley_terry_loss, dpo_loss

SCORES = torch.tensor([0.9, -0.4, 1.3, 0.1, -1.0], dtype=torch.float64)
FIRST, SECOND = ordered_pairs(len(SCORES))
# One batch: sums of log-probabilities of chosen, rejected, chosen and rejected under the reference; lengths of both.
SUMS = torch.tensor(
    [[-9.5, -4.25, -12.0], [-8.0, -6.5, -11.0], [-10.0, -4.0, -12.5], [-7.0, -6.0, -10.25]], dtype=torch.float64
)
LENGTHS = torch.tensor([[4, 2, 5], [3, 3, 4]])
BETA, SMOOTHING, CENTRING = 0.4, 0.1, 0.01
PER_TOKEN = SUMS / LENGTHS.repeat(2, 1)
CHOSEN, REJECTED = torch.tensor([1.5, -0.5, 0.25]), torch.tensor([0.5, 0.75, -2.0])
MARGINS = torch.tensor([0.5, 0.0, 1.0])
# By `by_hand` below, and by TRL 1.16.0 with its loss types sigmoid, robust, sigmoid_norm and ipo.
FROZEN = {
    "sigmoid": 0.5186538649,
    "robust": 0.4686538649,
    "length-normalised": 0.6426079988,
    "ipo": 1.0044039352,
    "bradley-terry": 0.6384657759,
    "margins": 0.7426450490,
    "centring": 0.6622157759,
}


def ours():
    """The batch under the shipped losses."""
    return {
        "sigmoid": dpo_loss(*SUMS, BETA),
        "robust": dpo_loss(*SUMS, BETA, SMOOTHING, form="robust"),
        "length-normalised": dpo_loss(*PER_TOKEN, BETA),
        "ipo": dpo_loss(*PER_TOKEN, BETA, form="ipo"),
        "bradley-terry": bradley_terry_loss(CHOSEN, REJECTED),
        "margins": bradley_terry_loss(CHOSEN, REJECTED, MARGINS),
        "centring": bradley_terry_loss(CHOSEN, REJECTED, centring=CENTRING),
    }


def by_hand():
    """The same from the formulas, a number at a time."""
    found = defaultdict(list)

    def nll(x):
        return math.log(1 + math.exp(-x))

    for (pc, pr, rc, rr), (lc, lr) in zip(SUMS.T.tolist(), LENGTHS.T.tolist(), strict=True):
        h = BETA * (pc - pr - rc + rr)
        per_token = (pc - rc) / lc - (pr - rr) / lr
        found["sigmoid"].append(nll(h))
        found["robust"].append(((1 - SMOOTHING) * nll(h) - SMOOTHING * nll(-h)) / (1 - 2 * SMOOTHING))
        found["length-normalised"].append(nll(BETA * per_token))
        found["ipo"].append((per_token - 1 / (2 * BETA)) ** 2)
    for better, worse, margin in zip(CHOSEN.tolist(), REJECTED.tolist(), MARGINS.tolist(), strict=True):
        found["bradley-terry"].append(nll(better - worse))
        found["margins"].append(nll(better - worse - margin))
        found["centring"].append(nll(better - worse) + CENTRING * (better + worse) ** 2)
    return {name: sum(numbers) / 3 for name, numbers in found.items()}


def test_every_loss_of_one_batch_is_the_frozen_number():
    assert by_hand() == pytest.approx(FROZEN, abs=1e-9)
    assert {name: loss.item() for name, loss in ours().items()} == pytest.approx(FROZEN, abs=1e-6)


def test_and_trl_says_the_same():
    trl = pytest.importorskip("trl", reason="compares with TRL where it is installed")

    def blanks():
        """What its trainers need for their logs."""
        alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
        model, metrics = SimpleNamespace(training=False), {"eval": defaultdict(list)}
        return {"accelerator": alone, "model": model, "_metrics": metrics, "_total_train_tokens": 0}

    def dpo(kind):
        """TRL's loss of a model that answers with given log-probabilities: each text's, spread evenly over tokens."""
        lengths = LENGTHS.flatten()  # chosen, then rejected
        mask = torch.arange(7) < lengths[:, None] + 1  # behind a prompt of one token
        mask[:, 0] = False
        logprobs, blank = (SUMS[:2].flatten() / lengths)[:, None] * mask[:, 1:], torch.zeros(mask[:, 1:].shape)
        answer = SimpleNamespace(log_probs=logprobs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
        trainer = SimpleNamespace(
            loss_types=[kind], loss_weights=[1.0], label_smoothing=SMOOTHING, beta=BETA, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", ld_alpha=None, aux_loss_enabled=False, use_weighting=False, **blanks(),
        )  # fmt: skip
        inputs = {name: mask.long() for name in ("input_ids", "attention_mask", "completion_mask")}
        inputs |= {"ref_chosen_logps": SUMS[2], "ref_rejected_logps": SUMS[3]}
        return trl.DPOTrainer._compute_loss(trainer, lambda **_: answer, inputs, False)

    def reward(margins=None, centring=None):
        logits = torch.cat([CHOSEN, REJECTED])[:, None]
        trainer = SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=centring), **blanks())
        inputs = {} if margins is None else {"margin": margins}
        return trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)

    theirs = {
        "sigmoid": dpo("sigmoid"),
        "robust": dpo("robust"),
        "length-normalised": dpo("sigmoid_norm"),
        "ipo": dpo("ipo"),
        "bradley-terry": reward(),
        "margins": reward(MARGINS),
        "centring": reward(centring=CENTRING),
    }
    assert {name: loss.item() for name, loss in theirs.items()} == pytest.approx(FROZEN, abs=1e-6)


def test_dpo_at_the_reference_is_log_2_with_slope_minus_half_beta():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy_chosen = chosen.clone().requires_grad_()
    loss = dpo_loss(policy_chosen, rejected, chosen, rejected, dpo_beta=0.3)
    (slope,) = torch.autograd.grad(loss, policy_chosen)
    assert math.isclose(loss.item(), math.log(2))
    torch.testing.assert_close(slope * 6, torch.full_like(slope, -0.15))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dpo_loss_is_the_hand_loop(label_smoothing):
    sequences = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for a, b, c, d in sequences.T.tolist():
        sigma = 1 / (1 + math.exp(-0.5 * ((a - b) - (c - d))))
        total += -(1 - label_smoothing) * math.log(sigma) - label_smoothing * math.log(1 - sigma)
    assert math.isclose(dpo_loss(*sequences, 0.5, label_smoothing).item(), total / 6)


def fitted(loss, chances, weights=1.0, count=5):
    """Scores (count,) of mean 0 in which the expectation of ``loss(better, worse)`` over all pairs is least."""
    i, j = ordered_pairs(count)

    def expected(scores):
        return (weights * chances * torch.vmap(loss)(scores[i], scores[j])).sum()

    found = minimise(expected, torch.zeros(count, dtype=torch.float64))
    return found - found.mean()


def noisy(chances, error_rate):
    """Labels of which ``error_rate`` are coin flips."""
    return error_rate / 2 + (1 - error_rate) * chances


def test_bradley_terry_recovers_the_scores_up_to_a_constant_whatever_pairs_weigh():
    weights = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    for weight in (1.0, (weights + weights.T)[FIRST, SECOND]):
        found = fitted(bradley_terry_loss, preferred(SCORES), weight)
        torch.testing.assert_close(found, SCORES - SCORES.mean(), rtol=0, atol=1e-7)
    two = fitted(bradley_terry_loss, torch.tensor([0.8, 0.2], dtype=torch.float64), count=2)
    assert (two[0] - two[1]).item() == pytest.approx(math.log(0.8 / 0.2), abs=1e-7)
    assert bradley_terry_loss(CHOSEN + 5, REJECTED + 5) == pytest.approx(bradley_terry_loss(CHOSEN, REJECTED))


def test_an_error_rate_in_the_model_recovers_them_from_noisy_labels():
    labels, centred = noisy(preferred(SCORES), 0.1), SCORES - SCORES.mean()
    told = fitted(lambda better, worse: bradley_terry_loss(better, worse, error_rate=0.1), labels)
    torch.testing.assert_close(told, centred, rtol=0, atol=1e-6)
    untold = fitted(bradley_terry_loss, labels)
    assert (untold @ centred / (centred @ centred)).item() == pytest.approx(0.84, abs=0.03)


def test_the_error_rate_keeps_the_loss_of_a_hopeless_pair_finite():
    gap = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry_loss(gap, torch.zeros(1), error_rate=0.2)
    (slope,) = torch.autograd.grad(loss, gap)
    assert loss.item() == pytest.approx(-math.log(0.1))
    assert slope == 0  # a label that is surely wrong pulls nowhere


def test_centring_fixes_the_constant_of_two_scores_and_bends_the_gaps_of_three():
    def centred(better, worse):
        return bradley_terry_loss(better, worse, centring=0.01)

    def at(scores):
        chances, count = preferred(scores), len(scores)
        i, j = ordered_pairs(count)
        return minimise(
            lambda x: (chances * torch.vmap(centred)(x[i], x[j])).sum(), torch.ones(count, dtype=torch.float64)
        )

    two = at(torch.tensor([2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(two, torch.tensor([-0.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-6)
    three = torch.tensor([1.3, 0.6, -1.0], dtype=torch.float64)
    bent = at(three)
    assert ((bent[0] - bent[2]) - 2.3).abs() > 0.05
    shifted = fitted(bradley_terry_loss, preferred(three), count=3)
    torch.testing.assert_close(shifted, three - three.mean(), rtol=0, atol=1e-7)


def counts(seed=0):
    """How often each of `ordered_pairs` won, and the pairs as choix reads them."""
    rng = np.random.default_rng(seed)
    wins = rng.binomial(30, preferred(SCORES).numpy())
    pairs = [(int(a), int(b)) for a, b, n in zip(FIRST, SECOND, wins, strict=True) for _ in range(n)]
    return torch.tensor(wins, dtype=torch.float64), pairs


def test_counts_of_wins_give_the_maximum_likelihood_that_scipy_finds():
    wins, _ = counts()

    def likelihood(scores):
        return float((wins.numpy() * np.log1p(np.exp(scores[SECOND] - scores[FIRST]))).sum())

    found = minimize(likelihood, np.zeros(len(SCORES)), method="BFGS", options={"gtol": 1e-7}).x
    ours = fitted(bradley_terry_loss, wins).numpy()
    assert ours == pytest.approx(found - found.mean(), abs=1e-4)
    assert np.abs(ours - (SCORES - SCORES.mean()).numpy()).max() > 0.05  # they are counts, not the truth


def test_and_choix_finds_the_same():
    choix = pytest.importorskip("choix", reason="compares with choix where it is installed")
    wins, pairs = counts()
    theirs = choix.ilsr_pairwise(len(SCORES), pairs, alpha=0.0)
    assert fitted(bradley_terry_loss, wins).numpy() == pytest.approx(theirs - theirs.mean(), abs=1e-6)
