"""The weights of an exponential family with given moments, from samples of its base: Newton on the convex dual."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenmdp.targets.features import TargetError

MOST_STEPS = 200
TOLERANCE = 1e-9  # of each moment, in units of its feature's spread
MOST_HALVINGS = 40


def fit_lambdas(
    features: torch.Tensor, moments: torch.Tensor, names: Sequence[str], log_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise the convex dual ``G(lambda) = log mean_i exp(lambda . phi_i) - lambda . moments``.

    ``grad G = E_p[phi] - moments`` and ``hess G = Cov_p[phi]``, p being the samples with weights
    ``exp(lambda . phi_i)``, so the minimum has the moments. Newton's steps are halved until G falls far enough. Where
    the moments lie outside what the samples span, G has no minimum.

    For one binary feature, ``lambda = logit(moment) - logit(mean)``.

    Args:
        features: phi (N, K) float64 of N samples of the base model.
        moments: (K,) float64.
        names: Of the features, for messages.
        log_weights: (N,) float64, ``log a - log q`` where the samples are of q; default: they are of the base model.

    Returns:
        lambdas (K,) and the moments that are reached (K,), float64.

    Raises:
        TargetError: no sample has a feature, or the moments are out of reach of the samples.

    >>> phi = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    >>> [round(part.item(), 6) for part in fit_lambdas(phi, torch.tensor([0.75], dtype=torch.float64), ["great"])]
    [2.197225, 0.75]
    """
    low, high, number = features.amin(0), features.amax(0), len(features)
    for name, least, most, moment in zip(names, low.tolist(), high.tolist(), moments.tolist(), strict=True):
        if least == most == 0:
            raise TargetError(
                f"none of {number} samples has the feature {name!r}; use more samples, or another feature"
            )
        if not least < moment < most:
            raise TargetError(
                f"the moment {moment:g} of {name!r} is out of reach: in {number} samples the feature lies in {least:g} "
                f"to {most:g}; choose a moment between them (for all responses, or none, take a binary target)"
            )
    spread = features.std(0, correction=0)
    scaled, wanted = features / spread, moments / spread  # lambda is per sd: one tolerance for all features
    lambdas = torch.zeros_like(moments)
    base = torch.zeros(number, dtype=features.dtype) if log_weights is None else log_weights

    def dual(at: torch.Tensor) -> torch.Tensor:
        return (base + scaled @ at).logsumexp(0) - wanted @ at  # up to a constant

    for _ in range(MOST_STEPS):
        weights = (base + scaled @ lambdas).softmax(0)  # (N,)
        means = weights @ scaled
        gradient = means - wanted
        if not gradient.isfinite().all():
            break
        if gradient.abs().max() < TOLERANCE:
            return lambdas / spread, means * spread
        centred = scaled - means
        covariance = centred.T @ (weights[:, None] * centred)
        # Least squares: the covariance of features that depend on one another has no inverse.
        step = -torch.linalg.lstsq(covariance, gradient[:, None], driver="gelsd").solution[:, 0]
        slope, size, now = gradient @ step, 1.0, dual(lambdas)
        for _ in range(MOST_HALVINGS):
            if dual(lambdas + size * step) <= now + 1e-4 * size * slope:
                break
            size /= 2
        lambdas = lambdas + size * step
    wrong = ", ".join(
        f"{name!r} reaches {mean:.3g} and not {moment:g}"
        for name, mean, moment in zip(names, (means * spread).tolist(), moments.tolist(), strict=True)
    )
    raise TargetError(
        f"no reweighting of these {number} samples has all the moments ({wrong}); use more samples, or moments "
        "that are nearer to the base model's"
    )
