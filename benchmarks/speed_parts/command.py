"""The command line of ``benchmarks/speed.py``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from rich.console import Console

from speed_parts import against_generate, against_trl, arithmetic, changes, credit_cost, growth, overhead, scaling
from speed_parts.report import Finding, machine, print_table, write_json
from speed_parts.shapes import SHAPES, Shape
from speed_parts.trl_process import default_directory, make_environment

# Part -> shapes it measures unless told otherwise, repetitions
PARTS: dict[str, tuple[tuple[str, ...], int]] = {
    "trl": (("4x256", "gpt2"), 5),
    "generate": (("4x256", "gpt2"), 8),
    "credit": (("bundled",), 12),
    "horizon": (("4x256",), 4),
    "growth": (("4x256",), 4),
    "overhead": (("bundled", "4x256", "gpt2"), 5),
    "flops": (("gpt2-64", "gpt2"), 3),
    "changes": (("4x256",), 5),
}


def main(argv: list[str] | None = None) -> list[Finding]:
    """Measure, print and write; returns what was found."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    described = machine(device)
    findings: list[Finding] = []
    console = Console(stderr=True)
    for part in arguments.parts:
        for name in chosen_shapes(arguments, part):
            console.print(f"measuring {part} {name}", markup=False)
            found = run_part(part, SHAPES[name], device, arguments)
            # The marks apply only to the sizes of a full measurement.
            findings += [finding.without_mark() for finding in found] if arguments.smoke else found
            if arguments.out is not None:
                write_json(arguments.out, findings, described, vars(arguments))
    print_table(findings, described)
    if arguments.out is not None:
        console.print(f"wrote {arguments.out}", markup=False)
    return findings


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="speed.py", description="Measure the PPO agent's speed; benchmarks/README.md explains the parts."
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: those with a mark, for each part")
    parser.add_argument("--repetitions", type=int, help="of each side, after one that is not counted")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--threads", type=int, default=cores, help="of both sides; default all cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON file, written after each part")
    parser.add_argument("--trl-venv", type=Path, default=default_directory(), help="made if it is not there")
    parser.add_argument("--trl-python", type=Path, help="a Python that has TRL 0.11.4, instead of --trl-venv")
    parser.add_argument("--no-reexec", action="store_true", help="keep the system's allocator settings, for both sides")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes once, to see that it runs; trl only if named")
    arguments = parser.parse_args(argv)
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is not a part; choose from {', '.join(PARTS)}")
    arguments.parts = arguments.parts or [part for part in PARTS if not (arguments.smoke and part == "trl")]
    return arguments


def chosen_shapes(arguments: argparse.Namespace, part: str) -> tuple[str, ...]:
    return ("smoke",) if arguments.smoke else tuple(arguments.shapes or PARTS[part][0])


def run_part(part: str, shape: Shape, device: torch.device, arguments: argparse.Namespace) -> list[Finding]:
    repetitions = arguments.repetitions or (1 if arguments.smoke else PARTS[part][1])
    if part == "trl":
        python = arguments.trl_python or make_environment(arguments.trl_venv)
        return against_trl.measure(shape, device, repetitions, python)
    if part == "generate":
        return against_generate.measure(shape, device, repetitions)
    if part == "credit":
        return credit_cost.measure(shape, device, repetitions, (3,) if arguments.smoke else credit_cost.LENGTHS)
    if part == "horizon":
        sizes = ((2, 4), (2, 4)) if arguments.smoke else (scaling.HORIZONS, scaling.BATCHES)
        return scaling.measure(shape, device, repetitions, *sizes)
    if part == "growth":
        axes = ((64, 128), (2, 3), (2, 4)) if arguments.smoke else ()
        return growth.measure(shape, device, repetitions, *axes)
    if part == "overhead":
        return overhead.measure(shape, device, repetitions)
    if part == "changes":
        return changes.measure(shape, device, repetitions)
    return arithmetic.measure(shape, device, repetitions)
