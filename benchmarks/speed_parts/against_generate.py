"""(b) The rollout through ``envs.step`` against ``model.generate`` of the installed transformers."""

from __future__ import annotations

import copy
import itertools

import torch
from transformers import PreTrainedModel

from speed_parts.report import Finding, dtype_name
from speed_parts.rollout_clock import ClockedAgent
from speed_parts.shapes import Shape, make_policy, make_prompts
from speed_parts.timing import Numbers, Side, alternate, now, rates, ratio_interval

EQUAL_MARK = 1.3
DEFAULT_MARKS = {"4x256": 1.5, "gpt2": 2.5}


def measure(shape: Shape, device: torch.device, repetitions: int) -> list[Finding]:
    """Response tokens per second. Ours also does what PPO needs: log-probabilities, values, environments, a free score.

    The reference forward of `collect` is timed in the same call and taken off: ``generate`` has none.
    """
    model = make_policy(shape).to(device).eval()
    default = dtype_name("auto", device)
    sides: dict[str, Side] = {
        "generate float32": generate(model, shape, device),
        "ours float32": ClockedAgent(shape, "float32", device).rollout,
    }
    pairs: list[tuple[str, str, float | None]] = [("ours float32", "generate float32", EQUAL_MARK)]
    if default != "float32":
        sides[f"generate {default}"] = generate(copy.deepcopy(model).to(getattr(torch, default)), shape, device)
        sides[f"ours {default}"] = ClockedAgent(shape, default, device).rollout
        pairs.append((f"ours {default}", "generate float32", DEFAULT_MARKS.get(shape.name)))
        pairs.append((f"ours {default}", f"generate {default}", EQUAL_MARK))
    records = alternate(sides, repetitions)
    return [
        Finding(
            "generate", shape.name, f"{ours} / {theirs}", ratio_interval(rates(records[ours]), rates(records[theirs])),
            f"{rates(records[ours]).mean():.0f} / {rates(records[theirs]).mean():.0f} tokens/s",
            at_least=mark if shape.name in DEFAULT_MARKS else None,
            measurements={ours: records[ours], theirs: records[theirs]},
        )
        for ours, theirs, mark in pairs
    ]  # fmt: skip


def generate(model: PreTrainedModel, shape: Shape, device: torch.device) -> Side:
    """Sampling from the whole distribution, every response of the same length."""
    prompts = itertools.islice(itertools.cycle(make_prompts(shape)), shape.episodes)
    input_ids = torch.tensor(list(prompts), device=device)
    lengths = {"min_new_tokens": shape.response_tokens, "max_new_tokens": shape.response_tokens}

    def run() -> Numbers:
        start = now(device)
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=True, top_k=0, top_p=1.0, pad_token_id=0,
            **lengths,
        )  # fmt: skip
        seconds = now(device) - start
        return {"seconds": seconds, "tokens": output.shape[0] * (output.shape[1] - input_ids.shape[1])}

    return run
