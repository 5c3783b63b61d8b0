"""The peak memory of a few updates, in a process that does nothing else: ``-m speed_parts.peak_memory JSON``."""

from __future__ import annotations

import json
import sys

import torch

from speed_parts.shapes import Shape, make_agent, make_envs, make_reward_model
from tokenmdp.training.peak_memory import peak_bytes


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    shape, device = Shape(**order["shape"]), torch.device(order["device"])
    envs = make_envs(shape, make_reward_model(shape, str(device)), order["credit"])
    agent = make_agent(shape, envs, "auto", str(device)).learn(order["updates"])
    print(json.dumps({"peak_bytes": peak_bytes(device), "tokens": agent.history[-1]["response_tokens"]}))


if __name__ == "__main__":
    main()
