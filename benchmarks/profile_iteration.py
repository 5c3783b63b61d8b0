"""Where the time of a PPO iteration goes: the operations that take most of it, as it is or with the changes undone.

    python benchmarks/profile_iteration.py --shape 4x256 --dtype float32
    python benchmarks/profile_iteration.py --shape 4x256 --dtype float32 --without-changes

The second undoes all changes that `speed.py changes` measures one by one. PyTorch's profiler counts an operation's own
time, without the operations that it calls. With `--device cuda` the table is of the device's time, kernel by kernel,
and how often the host launched something follows.
"""

from __future__ import annotations

import contextlib

from tokenmdp.runs.process_settings import reexecute_with_settings


def main() -> None:
    import argparse

    import torch
    from speed_parts.changes import CHANGES, CHANGES_OF_LENGTHS
    from speed_parts.device_profile import LAUNCHES, own_time, profiled
    from speed_parts.shapes import SHAPES, make_agent, make_envs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="4x256")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without-changes", action="store_true")
    parser.add_argument("--rows", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    shape = SHAPES[arguments.shape]
    agent = make_agent(shape, make_envs(shape), arguments.dtype, arguments.device)
    with contextlib.ExitStack() as undone:
        if arguments.without_changes:
            for undo in (CHANGES | CHANGES_OF_LENGTHS).values():
                undone.enter_context(undo(agent))
        agent.learn(2)
        profiler = profiled(lambda: agent.learn(1), arguments.device)
    seconds = agent.history[-1]["seconds"]
    operations = sorted(profiler.key_averages(), key=lambda operation: -own_time(operation, arguments.device))
    total = sum(own_time(operation, arguments.device) for operation in operations)
    print(f"{seconds:.2f} s an iteration under the profiler; before it {agent.history[-2]['seconds']:.2f} s\n")
    print("| operation | share | calls |")
    print("|---|---|---|")
    for operation in operations[: arguments.rows]:
        print(f"| {operation.key} | {own_time(operation, arguments.device) / total:.1%} | {operation.count} |")
    if arguments.device != "cpu":
        launches = sum(operation.count for operation in operations if operation.key in LAUNCHES)
        print(f"\n{launches} launches; the device was busy for {total / 1e6:.2f} s")


if __name__ == "__main__":
    reexecute_with_settings()
    main()
