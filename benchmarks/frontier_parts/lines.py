"""The lines of the frontier: each algorithm with the values of its knob, and where a cell's results lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tokenmdp.divergences import Divergence

KL_COEFS = (1.0, 0.45, 0.15)  # also the temperatures of the targets: each has the optimum of one kl_coef


class Line(NamedTuple):
    """A line of the figure: an algorithm and the values of its knob."""

    algorithm: str
    knob: str
    values: tuple[float, ...]
    config: dict[str, Any] = {}
    credit: str | None = None  # None: the preset's

    def changes(self, value: float) -> dict[str, Any]:
        """Fields of the configuration at one value of the knob."""
        return self.config | {self.knob: f"score/{value:g}" if self.knob == "target" else value}


LINES = {
    "PPO, sparse": Line("ppo", "kl_coef", KL_COEFS, credit="sparse"),
    "PPO, red": Line("ppo", "kl_coef", (*KL_COEFS, 0.05, 0.0), credit="red"),
    "PPO, attention": Line("ppo", "kl_coef", KL_COEFS, credit="attention"),
    "RLOO": Line("rloo", "kl_coef", KL_COEFS),
    "GRPO": Line("grpo", "kl_coef", KL_COEFS, {"responses_per_prompt": 4}, "sparse"),
    **{
        f"reward to go, {credit}": Line(  # against RLOO, whose group it has: what token credit does without a critic
            "grpo",
            "kl_coef",
            KL_COEFS,
            {"estimator": "reward_to_go", "divide_by_sd": False, "responses_per_prompt": 4},
            credit,
        )
        for credit in ("sparse", "red", "attention")
    },
    **{f"f-DPG, {name}": Line("f-dpg", "target", KL_COEFS, {"divergence": name}) for name in get_args(Divergence)},
    "DPO": Line("dpo", "dpo_beta", (0.3, 0.1, 0.03, 0.01, 0.003)),
    "best of n": Line("best-of-n", "n", (2, 4, 16)),
    "soup": Line("soup", "weight", (0.25, 0.5, 0.75)),  # the last line: its member is a cell of the first one
}
FIRST = "PPO, sparse"  # the line that others are compared with, and whose strongest policy is in the soups
FARTHEST = ("PPO, red", "DPO")  # swept farther, to where the learned reward model's score may be wrong
EQUAL_TIME_BASELINE = "RLOO"  # neither a critic nor token credit


def place(out: Path, name: str, value: float, seed: int) -> Path:
    """The directory of one run; its results lie beside it, as ``.json``."""
    return out / "runs" / re.sub(r"\W+", "_", f"{name} {LINES[name].knob} {value:g} seed {seed}")
