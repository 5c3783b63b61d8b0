"""Try to break it: kills, damaged files, full disks, power cuts, random calls. Prints how often each was survived.

    python benchmarks/reliability.py --kills 3 --damage 40 --full-disks 4 --episodes 2000 --power-cuts 1

Ctrl-C ends it: the line of every finished part has been printed by then, and there is no table.

Survived is

* a kill: the same command ends with status 0 and the scores of a run that nobody killed;
* damage: the command says in one line which file it is, or goes on with metrics that equal the checkpoint's history;
* a full disk (a limit on the size of a file stands in for it): one line, and the checkpoint from before still loads;
* a power cut (a copy of an ext4 image that nobody has synced; needs root and loop devices): the checkpoint loads;
* an episode: token rewards sum to the score, and what is refused is refused with an error of the documented kinds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np

TRAIN = ["train", "--preset", "smoke", "--num-envs", "8", "--eval-samples", "8", "--no-reexec"]
COMMAND = [sys.executable, "-m", "tokenmdp"]
UPDATES = 6
ALLOWED = (gym.error.Error, ValueError, TypeError)  # of a refused call


def history(run: Path) -> list[dict[str, float]]:
    """The records of a run's checkpoint."""
    return json.loads((run / "checkpoint" / "state" / "history.json").read_text())


def scores(run: Path) -> list[float]:
    """The mean score of every update."""
    return [record["score_mean"] for record in history(run)]


def train(out: Path, updates: int, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [*COMMAND, *TRAIN, "--updates", str(updates), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def kills(folder: Path, tries: int) -> Iterator[bool]:
    """SIGKILL at a random moment, then the same command again."""
    expected = folder / "unbroken"
    began = time.monotonic()
    train(expected, UPDATES)
    seconds = time.monotonic() - began
    for number in range(tries):
        out = folder / f"killed-{number}"
        process = subprocess.Popen(
            [*COMMAND, *TRAIN, "--updates", str(UPDATES), "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.2, 1.0) * seconds)
        finally:
            process.kill()
            process.wait()
        yield train(out, UPDATES).returncode == 0 and scores(out) == scores(expected)


def damage(folder: Path, tries: int) -> Iterator[bool]:
    """A file of a run is flipped, cut, emptied, deleted or filled with something else; then the run goes on."""
    whole = folder / "whole"
    train(whole, 4)
    files = [path for path in whole.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    for number in range(tries):
        out = folder / "damaged"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        file = out / random.choice(files).relative_to(whole)
        content = bytearray(file.read_bytes())
        kind = ("flip", "cut", "empty", "delete", "other")[number % 5]
        if kind == "delete":
            file.unlink()
        else:
            if kind == "flip":
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            elif kind == "cut":
                del content[random.randrange(len(content)) :]
            file.write_bytes({"empty": b"", "other": b"[" * 5000}.get(kind, bytes(content)))
        yield quiet_end(out, 5)


def quiet_end(out: Path, updates: int) -> bool:
    """Whether the command, in this process, goes on whole or refuses in one line."""
    from tokenmdp.cli import main

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main([*TRAIN, "--updates", str(updates), "--out", str(out)])
    except BaseException as error:  # what would be a traceback
        print(f"  {type(error).__name__}: {error}")
        return False
    if status == 130:
        raise KeyboardInterrupt
    if status == 0:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return records == history(out) and len(records) == updates
    message = said.getvalue()
    fine = status == 2 and message.count("error: ") == 1 and "please report" not in message
    if not fine:
        print(f"  status {status}: {message[-500:]}")
    return fine


def full_disks(folder: Path, tries: int) -> Iterator[bool]:
    """No file may grow beyond a random size, so that a write fails somewhere."""
    whole = folder / "before"
    train(whole, 4)
    biggest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for number in range(tries):
        out = folder / f"full-{number}"
        shutil.copytree(whole, out)
        size = int(biggest * random.uniform(0.05, 0.95))
        limit = lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
        ended = train(out, 8, preexec_fn=limit)
        said = ended.stdout + ended.stderr
        kept = train(out, 9)
        yield ended.returncode == 2 and "Traceback" not in said and kept.returncode == 0 and len(history(out)) == 9


def power_cuts(folder: Path, tries: int) -> Iterator[bool]:
    """What the disk holds at the moment after a finished checkpoint."""
    for number in range(tries):
        image, after = folder / f"disk-{number}.img", folder / f"after-{number}.img"
        place = folder / f"mounted-{number}"
        place.mkdir()
        image.touch()
        os.truncate(image, 64 << 20)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        with mounted(image, place):
            train(place / "run", UPDATES)
            shutil.copyfile(image, after)  # nobody syncs: the power goes now
        with mounted(after, place):  # the journal is replayed
            yield train(place / "run", UPDATES + 1).returncode == 0 and len(history(place / "run")) == UPDATES + 1


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """An image's files at ``place``. Ctrl-C does not reach the commands themselves, so nothing stays mounted."""
    try:
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True, start_new_session=True)
        yield
    finally:
        if place.is_mount():  # lazily: a process that was ended may still hold a file
            subprocess.run(["umount", "--lazy", str(place)], check=True, start_new_session=True)


def episodes(count: int) -> Iterator[bool]:
    """Random calls of a single and a batched environment, some of them wrong; one entry per episode that ends."""
    from tokenmdp.wrappers import UniformReward, vector

    rng = np.random.default_rng(random.randrange(2**32))
    single = UniformReward(gym.make("tokenmdp:TextGen-Toy-v0", disable_env_checker=True))
    batch = vector.UniformReward(gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=16, autoreset_mode="SameStep"))
    single.reset(seed=0)
    batch.reset(seed=0)
    wrong = (-1, 32, 2.5, None, "good", 10**30, [1, 2], True, np.nan)
    bad_resets = ({"options": "x"}, {"seed": -1}, {"options": {"prompt": None, "response_prefix": 3}}, {"seed": "a"})
    ended = 0
    while ended < count:
        if rng.random() < 0.05:
            for call in (
                lambda: single.step(wrong[rng.integers(len(wrong))]),
                lambda: batch.step([wrong[rng.integers(len(wrong))]] * 16),
                lambda: single.reset(**bad_resets[rng.integers(len(bad_resets))]),
                lambda: batch.reset(**bad_resets[rng.integers(len(bad_resets))]),
            ):
                try:
                    call()
                except ALLOWED:
                    continue
                except Exception as error:
                    print(f"  {type(error).__name__}: {error}")
                yield False  # it was let through
        *_, terminated, _, info = single.step(int(rng.integers(32)))
        if terminated:
            ended += 1
            yield abs(float(info["token_rewards"].sum() - info["score"])) < 1e-5
            single.reset()
        infos = batch.step(rng.integers(32, size=16))[-1].get("final_info", {})
        for row in np.flatnonzero(infos.get("_score", ())):
            ended += 1
            yield abs(float(infos["token_rewards"][row].sum() - infos["score"][row])) < 1e-5


def main() -> None:
    """Run all parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damage", type=int, default=300)
    parser.add_argument("--full-disks", type=int, default=10)
    parser.add_argument("--power-cuts", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "kills (SIGKILL)": (kills(folder, arguments.kills), arguments.kills),
            "damaged files": (damage(folder, arguments.damage), arguments.damage),
            "full disks": (full_disks(folder, arguments.full_disks), arguments.full_disks),
            "power cuts": (power_cuts(folder, arguments.power_cuts), arguments.power_cuts),
            "episodes of random calls": (episodes(arguments.episodes), arguments.episodes),
        }
        lines = []
        for what, (trials, asked) in parts.items():
            if not asked:
                continue
            if what == "power cuts" and (os.geteuid() != 0 or shutil.which("mkfs.ext4") is None):
                lines.append(f"| {what} | 0 | needs root and mkfs.ext4 |")
                continue
            random.seed(arguments.seed)
            try:
                results = list(trials)
            except subprocess.CalledProcessError as error:
                lines.append(f"| {what} | 0 | {error.cmd[0]} failed here |")
                continue
            lines.append(f"| {what} | {len(results)} | {sum(results)} |")
            print(lines[-1], flush=True)
    print("\n".join(["", "| what | tried | survived |", "|---|---|---|", *lines]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
