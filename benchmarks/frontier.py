"""Judge's score against KL: every algorithm with a sweep of its knob, on one learned reward model and its comparisons.

    tokenmdp prefer --pairs 6144 --out runs/pairs.jsonl
    tokenmdp train reward-model --data runs/pairs.jsonl --out runs/rm
    python benchmarks/frontier.py --data runs/pairs.jsonl --reward-model runs/rm/checkpoint --out runs/frontier
    python benchmarks/frontier.py --out runs/frontier --table           # of what is there

PPO, RLOO, GRPO, f-DPG and best-of-n follow the learned reward model, DPO the comparisons that it learned from; soups
average the weights of PPO's strongest policy (sparse, smallest kl_coef) and of its start. The judge scores them all. A
finished cell is not run again, and an interrupted one goes on from its last checkpoint. With --part 0/2 and --part 1/2
two processes share the work; the tables and the figures show what is there. Seconds are wall time, which depends on
what else runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from frontier_parts.cells import MemberMissing, Sources, measured
from frontier_parts.lines import LINES, place
from frontier_parts.report import report
from shares import add_part

from tokenmdp.files import write_text
from tokenmdp.runs.directory import claim
from tokenmdp.runs.settings import PRESETS, preset_settings

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="comparisons, for DPO")
parser.add_argument("--reward-model", help="directory of the learned reward model")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument(
    "--only", nargs="*", choices=list(LINES), default=list(LINES), metavar="LINE", help=" ".join(map(repr, LINES))
)
parser.add_argument("--updates", type=int, default=PRESETS["quick"].updates, help="of what plays episodes")
add_part(parser)
parser.add_argument("--table", action="store_true", help="only report what is there")


def main(arguments: list[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    if not args.table:
        if args.data is None or args.reward_model is None:
            parser.error("--data and --reward-model are needed to run anything")
        made_of = {
            "data": str(args.data.resolve()), "reward_model": str(Path(args.reward_model).resolve()),
            "updates": args.updates, "preset": preset_settings("quick", "ppo").config,
        }  # fmt: skip
        claim(args.out / "settings.json", "a frontier", made_of)
        sources = Sources(args.data, args.reward_model, args.out, args.updates)
        every = [
            (name, value, seed)
            for seed in range(1, args.seeds + 1)
            for name in args.only
            for value in LINES[name].values
        ]
        every.sort(key=lambda cell: cell[0] == "soup")  # most of their members are made by then
        mine = every[args.part]
        for number, (name, value, seed) in enumerate(mine, start=1):
            path, started = place(args.out, name, value, seed).with_suffix(".json"), time.perf_counter()
            if not path.exists():
                cell = f"{number}/{len(mine)} {name}, {LINES[name].knob} {value:g}, seed {seed}"
                print(cell, end="", flush=True)
                try:
                    found = measured(sources, name, value, seed)
                except MemberMissing as missing:
                    print(f": left out, for it needs {missing}; run that, then this again", flush=True)
                    continue
                write_text(path, json.dumps(found) + "\n")
                print(f": {time.perf_counter() - started:.0f} s", flush=True)
    report(args.out)


if __name__ == "__main__":
    main()
