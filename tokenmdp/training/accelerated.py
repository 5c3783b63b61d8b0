"""A run in several processes of accelerate: data parallel (DDP), or sharded weights (FSDP, version 2)."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.error import DependencyNotInstalled
from torch import nn
from torch.nn.functional import pad

from tokenmdp.training.processes import ALONE, OtherProcessFailed, Processes, State, Value, check_names
from tokenmdp.types import Rollout

if TYPE_CHECKING:
    from accelerate import Accelerator


LONGEST_WAIT = timedelta(hours=24)  # of the others while process 0 evaluates and reports; accelerate's is 10 minutes


class Accelerated(Processes):
    """The processes of an ``accelerate.Accelerator``: data parallel (DDP), or sharded weights (FSDP, version 2).

    Raises:
        ValueError: the accelerator is set up for something else.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        kind = accelerator.distributed_type.value
        if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA") or (kind == "FSDP" and not accelerator.is_fsdp2):
            raise ValueError(
                f"the accelerator runs {kind}{' version 1' if kind == 'FSDP' else ''}; "
                "launch with data parallelism or with --use_fsdp --fsdp_version 2"
            )
        if accelerator.mixed_precision != "no":
            raise ValueError(
                f"the accelerator has mixed_precision={accelerator.mixed_precision!r}; leave it at 'no': "
                "PPOConfig.dtype chooses the precision of the forwards"
            )
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self._sharded = accelerator.is_fsdp2

    def device(self, name: str) -> torch.device:  # noqa: D102
        mine = self.accelerator.device
        if name not in ("auto", mine.type, str(mine)):
            raise ValueError(
                f"device is {name!r} and the accelerator gave this process {str(mine)!r}; leave it at 'auto', or pass "
                "device='cpu' and Accelerator(cpu=True)"
            )
        return mine if mine.type == "cuda" else torch.device(mine.type)  # "cpu:0" is not equal to "cpu"

    def prepare(  # noqa: D102
        self, policy: nn.Module, reference: nn.Module | None, optimizer: torch.optim.Optimizer
    ) -> nn.Module:
        if not self._sharded:
            with warnings.catch_warnings():  # accelerate names a remedy that still exchanges buffers at first
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                return self.accelerator.prepare_model(policy)
        from accelerate.utils import fsdp2_prepare_model
        from torch.distributed.fsdp import register_fsdp_forward_method

        self.accelerator.prepare(policy, optimizer)  # in place, both at once
        for sharded in (policy, reference):
            if sharded is None or next(sharded.parameters(), None) is None:
                continue  # switched-off adapters are a view of the policy
            fsdp2_prepare_model(self.accelerator, sharded)
            for method in ("prefill", "append", "evaluate", "values"):
                if hasattr(sharded, method):  # of a policy; a reward model is called only
                    register_fsdp_forward_method(sharded, method)
        for module in [] if reference is None else _sharded_modules(reference):
            module.set_reshard_after_forward(True, recurse=False)  # without a backward nothing else would
        return policy

    def part(self, rows: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, float]:  # noqa: D102
        mine = slice(self.rank, None, self.size)
        weight = self.size * sizes[rows[mine]].sum().item() / sizes[rows].sum().item()
        # Without a row of its own a process still takes part in adding gradients, with weight 0.
        return (rows[mine] if self.rank < len(rows) else rows[:1]), weight

    def reduce_mean(self, numbers: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.accelerator.reduce(numbers, "mean")

    def any(self, flag: bool) -> bool:  # noqa: D102
        return any(self.gather(flag))

    def broadcast(self, value: Value) -> Value:  # noqa: D102
        return self.gather(value)[0]

    def gather(self, value: Value) -> list[Value]:  # noqa: D102
        from accelerate.utils import gather_object

        return gather_object([value])

    def gather_rollout(self, rollout: Rollout) -> Rollout:  # noqa: D102
        prompt, response = rollout.prompt_slots, rollout.response_mask.shape[1]
        more_prompt, more_response = (
            max(sizes) - size
            for sizes, size in zip(zip(*self.gather((prompt, response)), strict=True), (prompt, response), strict=True)
        )
        padded: State = {"scores": rollout.scores}
        for name in ("input_ids", "attention_mask"):
            padded[name] = pad(getattr(rollout, name), (more_prompt, more_response))
        for name in ("response_mask", "logprobs", "ref_logprobs", "values", "token_rewards"):
            padded[name] = pad(getattr(rollout, name), (0, more_response))
        if rollout.support is not None:
            padded["support"] = pad(rollout.support, (0, 0, 0, more_response))
        return rollout._replace(**{name: self.accelerator.gather(column) for name, column in padded.items()})

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:  # noqa: D102
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = torch.tensor(float(error is not None), device=self.accelerator.device)
        if not self.accelerator.reduce(failed, "sum"):
            return
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        first = next(rank for rank, message in enumerate(messages) if message is not None)
        raise OtherProcessFailed(f"process {first} of {self.size} failed: {messages[first]}")

    @contextlib.contextmanager
    def whole_weights(self, *policies: nn.Module) -> Iterator[None]:  # noqa: D102
        if not self._sharded:
            yield
            return
        # Gathered layer by layer, a forward would have to happen in all processes; their texts end at other times.
        for policy in policies:
            for module in _sharded_modules(policy):
                module.unshard()
                module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for policy in policies:
                for module in _sharded_modules(policy):
                    module.reshard()
                    module.set_reshard_after_forward(True, recurse=False)

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:  # noqa: D102
        norm = super().clip_grad_norm(parameters, max_norm)
        return _whole(norm)

    def policy_state(self, policy: nn.Module) -> State:  # noqa: D102
        state = self.accelerator.get_state_dict(policy)
        first: dict[int, str] = {}
        for name, tensor in policy.state_dict(keep_vars=True).items():
            if self._sharded and state and first.setdefault(id(tensor), name) != name:
                state[name] = state[first[id(tensor)]]  # tied weights come apart when they are gathered
        return state

    def load_policy_state(self, policy: nn.Module, state: State) -> None:  # noqa: D102
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        if not self._sharded:
            super().load_policy_state(policy, state)
            return
        check_names(policy, state)
        set_model_state_dict(policy, state, options=StateDictOptions(full_state_dict=True, strict=False))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:  # noqa: D102
        state = optimizer.state_dict()
        whole = {
            index: {name: _whole(value).cpu() if self._sharded else value for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return state | {"state": whole}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: State) -> None:  # noqa: D102
        if self._sharded:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                index: {name: _part_of(value, parameters[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            state = state | {"state": parts}
        optimizer.load_state_dict(state)


def processes_of(accelerator: Accelerator | None) -> Processes:
    """The `Processes` of an accelerator; None: one process.

    >>> processes_of(None).size
    1
    """
    return ALONE if accelerator is None else Accelerated(accelerator)


def launched(device: str) -> Accelerator | None:
    """The accelerator of the processes that ``accelerate launch`` or ``torchrun`` has started; None if neither has.

    Args:
        device: "cpu" keeps to CPUs; with any other each process gets a GPU if there are some.

    Raises:
        gymnasium.error.DependencyNotInstalled: there are several processes and no accelerate.
        ValueError: the launcher is to shard weights on CPUs.
    """
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not sharded:
        return None
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise DependencyNotInstalled(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} processes need accelerate: pip install 'tokenmdp[accelerate]'"
        ) from error
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if sharded and on_cpu:
        raise ValueError("accelerate shards weights on GPUs only; leave out --use_fsdp (data parallel works on CPUs)")
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)  # they never change
    patience = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[buffers, patience])


def _sharded_modules(policy: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part_of(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is sharded as ``parameter`` is; scalars, such as Adam's step, are whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
