"""PyTorch's profiler on a CPU or a GPU: each operation's own time on the device that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from speed_parts.timing import wait_for

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def profiled(work: Callable[[], Any], device: str) -> profile:
    """The profiler after ``work``, and after the device has done it."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=activities) as profiler:
        work()
        wait_for(device)
    return profiler


def own_time(operation: Any, device: str) -> float:
    """Microseconds of one row of ``key_averages()``: on a GPU those of kernels and copies, as PyTorch sums them.

    The times of operations, and of annotations such as ``Optimizer.step``, are those of their kernels once more.
    """
    if device == "cpu":
        return operation.self_cpu_time_total
    on_device = operation.device_type is not DeviceType.CPU and not operation.is_user_annotation
    return operation.self_device_time_total if on_device else 0.0
