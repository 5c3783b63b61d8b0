"""The peak memory of a few updates, in a process that does nothing else: ``-m speed_parts.peak_memory JSON``."""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

import torch

from speed_parts.shapes import Shape, make_agent, make_envs, make_reward_model


def peak_bytes(device: torch.device) -> int:
    """The most this process has held: of the device on CUDA, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent as it was when it forked
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    shape, device = Shape(**order["shape"]), torch.device(order["device"])
    envs = make_envs(shape, make_reward_model(shape, str(device)), order["credit"])
    agent = make_agent(shape, envs, "auto", str(device)).learn(order["updates"])
    print(json.dumps({"peak_bytes": peak_bytes(device), "tokens": agent.history[-1]["response_tokens"]}))


if __name__ == "__main__":
    main()
