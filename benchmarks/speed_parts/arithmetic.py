"""(f) Achieved FLOP/s of the update phase against one large matrix product of the same dtype."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from speed_parts.report import Finding, dtype_name
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import Shape
from speed_parts.timing import Numbers, alternate, column, now, ratio_interval
from tokenmdp.models.kernels.onednn import onednn_is_faster, product

MARK = 0.5
MARKED_SHAPES = ("gpt2", "gpt2-64")
PRODUCT_SECONDS = 1.0  # minimum duration of a measurement of the matrix product


def forward_flops(
    layers: int, width: int, vocab_size: int, episodes: int, prompt_tokens: int, response_tokens: int
) -> int:
    """The products in one `CausalLMPolicy.evaluate` of a GPT-2 with N episodes, T = P + H - 1 slots and width d.

        2 * 12 d^2 * N T * layers      the blocks' weights: 3 d^2 query, key, value; d^2 output; 8 d^2 MLP
        4 * T d    * N T * layers      scores = query @ key.T and weights @ value, the whole T x T square
        2 * d V    * N H               output layer, at the rows that predict a response token
        2 * d      * N H               value head

    A multiplication with an addition counts as 2. Only matrix products count: no softmax, GELU, LayerNorm, sampling.

    >>> forward_flops(layers=1, width=2, vocab_size=5, episodes=1, prompt_tokens=1, response_tokens=1)
    248
    """
    slots = prompt_tokens + response_tokens - 1  # the last token predicts nothing
    tokens, predicted = episodes * slots, episodes * response_tokens
    blocks = layers * tokens * (24 * width**2 + 4 * slots * width)
    return blocks + predicted * 2 * width * (vocab_size + 1)


def update_flops(shape: Shape) -> int:
    """``3 * forward * update_epochs``: the backward multiplies twice, for the inputs and for the weights.

    The optimizer's element-wise work counts as 0.
    """
    sizes = (shape.layers, shape.width, shape.vocab_size, shape.episodes, shape.prompt_tokens, shape.response_tokens)
    return 3 * shape.update_epochs * forward_flops(*sizes)


def measure(shape: Shape, device: torch.device, repetitions: int) -> list[Finding]:
    """FLOP/s over the update phase: everything from the end of the rollout to the end of the update."""
    findings = []
    for dtype in dict.fromkeys((dtype_name("auto", device), "float32")):
        agent = ClockedAgent(shape, dtype, device)
        size = 64 if shape.name == "smoke" else 8192 if device.type == "cuda" else 2048
        large = MatrixProduct(size, getattr(torch, dtype), device, 0.0 if shape.name == "smoke" else PRODUCT_SECONDS)
        records = alternate({"product": large.run, "update": agent.iteration}, repetitions)
        achieved = update_flops(shape) / column(records["update"], "update_seconds")
        possible = column(records["product"], "flops_per_second")
        findings.append(
            Finding(
                "flops", shape.name, f"update phase / {size} x {size} matrix product, {dtype}",
                ratio_interval(achieved, possible),
                f"{np.mean(achieved) / 1e9:.1f} / {np.mean(possible) / 1e9:.1f} GFLOP/s; "
                f"{update_flops(shape) / 1e9:.1f} GFLOP an update",
                at_least=MARK if shape.name in MARKED_SHAPES else None, percent=True, measurements=records,
            )
        )  # fmt: skip
    return findings


class MatrixProduct:
    """``size`` x ``size`` times another, again and again, by the faster of the libraries that the agent uses."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> None:
        self.size, self.device, self.seconds = size, device, seconds
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        by_onednn = device.type == "cpu" and dtype == torch.float32 and onednn_is_faster()
        self.multiply = (
            partial(product, left, right, None) if by_onednn else partial(torch.mm, left, right, out=left.clone())
        )

    def run(self) -> Numbers:
        """``2 size^3`` per product, over the time of all of them."""
        products, start = 0, now(self.device)
        while True:
            self.multiply()
            products += 1
            passed = now(self.device) - start
            if passed >= self.seconds:
                return {"flops_per_second": 2 * self.size**3 * products / passed}
