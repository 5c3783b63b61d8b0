"""Small runs that one process plays, or two together over gloo: what test_processes.py compares."""

import os
import socket
import sys
from pathlib import Path

import gymnasium as gym
import torch
import torch.multiprocessing
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from data_doubles import PAIRS, RANKINGS, TEXTS

from tokenmdp.agents.dpo import DPO
from tokenmdp.agents.f_dpg import FDPG
from tokenmdp.agents.ppo import PPO
from tokenmdp.agents.reward_model import RewardModelLearner
from tokenmdp.agents.rloo import RLOO
from tokenmdp.agents.sft import SFT
from tokenmdp.files import save_state
from tokenmdp.runs.environments import toy_policy
from tokenmdp.training.accelerated import processes_of
from tokenmdp.wrappers import vector

UNTIMED = ("seconds", "tokens_per_second")
BASE = {"dtype": "float32", "device": "cpu", "learning_rate": 1e-3, "update_epochs": 2, "num_minibatches": 2}
# adam_eps: a weight whose true gradient is 0, such as a key's bias, otherwise moves as far as its rounding error says.
BASE |= {"adam_eps": 1e-5}
# Credit, episodes, fields of the configuration, arguments of the environment.
RUNS = {
    "uniform": ("uniform", 8, {}, {}),
    "attention": ("attention", 8, {"kl_target": 0.5, "kl_horizon": 20, "top_k": 7, "max_grad_norm": 0.1}, {}),
    "policy attention": ("abc-d", 8, {"ent_coef": 0.1, "temperature": 0.8}, {"horizon_range": (2, 8)}),
    "minibatches of one row": ("sparse", 6, {"num_minibatches": 5}, {}),
    "target_kl": ("uniform", 8, {"learning_rate": 1e-2, "update_epochs": 5, "target_kl": 0.01}, {}),
    "vine": ("sparse", 4, {"estimator": "vine", "vine_rollouts": 2}, {"max_new_tokens": 4, "horizon_range": (1, 4)}),
    "value model": ("sparse", 8, {"value_model": "separate"}, {"horizon_range": (2, 8)}),
    "rloo": ("uniform", 8, {"responses_per_prompt": 2}, {"horizon_range": (2, 8)}),
    "f-dpg": ("sparse", 8, {"target": "score/2", "normaliser": "prompt", "responses_per_prompt": 2}, {}),
    "lora": ("uniform", 8, {"lora_rank": 4, "learning_rate": 1e-2, "gradient_checkpointing": True}, {}),
}
OWN_REFERENCE = ("vine",)  # with the policy itself, the values would first learn a KL that is rounding error alone
SHARDED = ("uniform", "lora", "value model")
UPDATES = 3
# From seven records in batches of 3, 3 and 1: in the last one the second process has none.
FROM_DATA = {
    "sft": (SFT, TEXTS[:7]),
    "dpo": (DPO, PAIRS[:7]),
    "reward model": (RewardModelLearner, [*RANKINGS, *PAIRS[:5]]),
}


def make_learner(name, start, accelerator=None):
    """A learner from data; ``start`` is the directory of the toy policy."""
    kind, data = FROM_DATA[name]
    config = kind.config_class(dtype="float32", device="cpu", learning_rate=1e-3, adam_eps=1e-5, batch_size=3, epochs=2)
    return kind(str(start), data, config, accelerator=accelerator)


def make_envs(name, accelerator=None):
    credit, num_envs, _, options = RUNS[name]
    rows = num_envs // processes_of(accelerator).size
    envs = gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=rows, autoreset_mode="Disabled", **options)
    return vector.CreditReward(envs, credit)


def make_agent(name, accelerator=None):
    kind = {"rloo": RLOO, "f-dpg": FDPG}.get(name, PPO)
    config = kind.config_class(**(BASE | RUNS[name][2]))
    reference = toy_policy(seed=1) if name in OWN_REFERENCE else None
    return kind(toy_policy(seed=0), make_envs(name, accelerator), config, reference, accelerator=accelerator)


def resume(directory, name, accelerator=None):
    return PPO.load(directory, make_envs(name, accelerator), accelerator=accelerator)


def record(agent):
    """The results that two runs must share; the weights in the first process alone if they are sharded."""
    history = [{key: value for key, value in metrics.items() if key not in UNTIMED} for metrics in agent.history]
    weights = agent.processes.policy_state(agent.model)
    return {"history": history, "weights": {name: weight.clone() for name, weight in weights.items()}}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(directory):
    """Play everything that `_process` does; files appear in ``directory``."""
    method = "fork" if sys.platform == "linux" else "spawn"  # which imports everything again
    torch.multiprocessing.start_processes(_process, (free_port(), Path(directory)), nprocs=2, start_method=method)


def _process(rank, port, directory):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)

    def keep(title, content):
        save_state(directory / f"{title} {rank}.safetensors", content)

    for name in RUNS:
        keep(name, record(make_agent(name, accelerator).learn(UPDATES)))
    for name in FROM_DATA:
        keep(name, record(make_learner(name, directory / "start", accelerator).learn(UPDATES)))
    make_agent("uniform", accelerator).learn(2).save(directory / "saved by two")
    keep("one, then two", record(resume(directory / "saved by one", "uniform", accelerator).learn(UPDATES - 2)))
    keep("failures", {title: failure(what, accelerator) for title, what in FAILURES.items()})

    # By itself accelerate shards on GPUs only; PyTorch does it on CPUs too.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP"
    )
    for name in SHARDED:
        agent = make_agent(name, accelerator).learn(2)
        keep(f"{name}, shards", {"numbers": numbers_held(agent)})
        agent.save(directory / f"{name}, saved sharded")
        keep(f"{name}, sharded", record(agent.learn(UPDATES - 2)))
        again = resume(directory / f"{name}, saved sharded", name, accelerator)
        keep(f"{name}, sharded, resumed", record(again.learn(UPDATES - 2)))
    keep("one, then sharded", record(resume(directory / "saved by one", "uniform", accelerator).learn(UPDATES - 2)))
    accelerator.end_training()


def numbers_held(agent):
    """How many numbers this process keeps of policy, reference and optimizer between two updates."""
    tensors = [*agent.policy.parameters(), *agent.reference.parameters()]
    tensors += [value for state in agent.optimizer.state.values() for value in state.values() if value.ndim]
    return sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)


def failure(what, accelerator):
    """The error that this process gets when the second one has trouble."""
    agent = make_agent("uniform", accelerator)
    if agent.processes.rank == 1:
        what(agent)
    try:
        agent.learn(1)
    except Exception as error:
        return [type(error).__name__, str(error)]


def _break_environment(agent):
    def step(actions):
        raise ZeroDivisionError("no reward today")

    agent.envs.unwrapped.step = step


def _poison_value(agent):
    torch.nn.init.constant_(agent.policy.value_head.bias, torch.nan)


def _poison_model(agent):
    torch.nn.init.constant_(agent.policy.lm.transformer.ln_f.bias, torch.nan)


FAILURES = {"error": _break_environment, "nan value": _poison_value, "nan logits": _poison_model}
