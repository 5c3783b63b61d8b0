"""One run in one process or in several: what every process plays, what they exchange, which one writes files.

Every process plays N / W of an update's N episodes. All draw the random numbers of all N episodes and use their own,
and all get the whole rollout before the first advantage is computed. So W processes learn what one process with N
episodes learns, up to the order in which floats are added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from tokenmdp.types import Rollout

Value = TypeVar("Value")
State = dict[str, Any]


class OtherProcessFailed(RuntimeError):
    """Another process of the run stopped with an error; the message holds it."""


class Processes:
    """A run of one process; `tokenmdp.training.accelerated.Accelerated` overrides what is different with several.

    Attributes:
        rank: of this process, 0 to size - 1; 0 writes files and the log.
        size: W.
    """

    rank = 0
    size = 1

    def device(self, name: str) -> torch.device:
        """The device of this process: ``name``, or the fastest device for "auto"."""
        fastest = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(fastest if name == "auto" else name)

    def rows(self, num_local: int) -> slice:
        """Which of the run's ``num_local * size`` episodes are this process's."""
        return slice(self.rank * num_local, (self.rank + 1) * num_local)

    def prepare(self, policy: nn.Module, reference: nn.Module | None, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The module to call for forwards with gradients, which then are those of all processes together."""
        return policy

    def part(self, rows: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, float]:
        """This process's rows of a minibatch and the weight of a mean over their tokens.

        Args:
            rows: (n,) int64, the minibatch.
            sizes: (N,), the tokens of each row, or whatever else a row counts for in the mean.

        Returns:
            The rows and ``weight``: the mean over processes of ``weight * mean over own tokens`` is the mean over the
            minibatch's tokens.
        """
        return rows, 1.0

    def reduce_mean(self, numbers: torch.Tensor) -> torch.Tensor:
        """The mean over processes, on the policy's device."""
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def broadcast(self, value: Value) -> Value:
        """The value that process 0 passes; any picklable one."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, in the order of ranks; any picklable one."""
        return [value]

    def gather_rollout(self, rollout: Rollout) -> Rollout:
        """The episodes of all processes, in the order of the rows."""
        return rollout

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """Around work in which processes do not communicate: an error in one becomes an error in all.

        Without it the others would wait for the failed one until a time limit.
        """
        yield

    @contextlib.contextmanager
    def whole_weights(self, *policies: nn.Module) -> Iterator[None]:
        """Within the block each process can run the policies' forwards by itself, without gradients."""
        yield

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradients down to ``max_norm``; their norm before that."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def policy_state(self, policy: nn.Module) -> State:
        """The whole weights by name, to be saved by process 0; the others may get none."""
        return policy.state_dict()

    def load_policy_state(self, policy: nn.Module, state: State) -> None:
        """Put whole weights into a policy; those that ``state`` leaves out and that do not learn stay.

        Raises:
            ValueError: ``state`` lacks something that learns, or holds something that the policy does not have.
        """
        check_names(policy, state)
        policy.load_state_dict(state, strict=False)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:
        """The whole ``optimizer.state_dict()``, to be saved by process 0."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Put what `optimizer_state` gave, in a run of any number of processes, into an optimizer."""
        optimizer.load_state_dict(state)


ALONE = Processes()


def check_names(policy: nn.Module, state: State) -> None:
    """Refuse weights that lack something that learns, or hold something that the policy does not have."""
    missing = {name for name, weight in policy.named_parameters() if weight.requires_grad} - state.keys()
    unknown = state.keys() - policy.state_dict().keys()
    if problem := [
        f"{len(names)} weights {what}, such as {min(names)}"
        for what, names in (("that learn are missing", missing), ("are not the policy's", unknown))
        if names
    ]:
        raise ValueError("; ".join(problem))
