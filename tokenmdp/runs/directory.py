"""One training run on disk: settings, metrics and checkpoint; safe to interrupt and to resume.

run.json            the settings that define the run
metrics.jsonl       one record per update
tensorboard/        the same numbers
before.json         scores and samples of the policy before training
along/              what was measured of it as it trained: update-N.json
checkpoint/         the policy as `from_pretrained` reads it, with all state needed to resume
report/             curve, samples page and summary, written at the end
"""

from __future__ import annotations

import contextlib
import json
import logging
import operator
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmdp.files import BusyError, locked, make_directory, read_json, recover_directory, write_text
from tokenmdp.report.curves import read_metrics
from tokenmdp.wording import count

FORMAT = "tokenmdp-run"


TAGS = {  # of TensorBoard, which shows a group for each prefix; the names are Stable-Baselines3's
    "rollout": ("score_mean", "score_std", "kl", "response_length", "response_tokens", "ended_by_eos"),
    "train": (
        "loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm", "vf_grad_norm",
        "explained_variance", "learning_rate", "kl_coef", "minibatches", "epoch", "accuracy", "score_gap",
        "chosen_logratio", "rejected_logratio", "advantage_std",
    ),
    "time": ("seconds", "tokens_per_second"),
}  # fmt: skip
OTHER_TAGS = "credit"  # what the credit method reports


def tensorboard_tag(metric: str) -> str:
    """The metric's name in TensorBoard, behind its group.

    >>> tensorboard_tag("kl"), tensorboard_tag("loss"), tensorboard_tag("attention_mass")
    ('rollout/kl', 'train/loss', 'credit/attention_mass')
    """
    return next((f"{group}/{metric}" for group, names in TAGS.items() if metric in names), f"{OTHER_TAGS}/{metric}")


logger = logging.getLogger(__name__)


class RunError(RuntimeError):
    """The run directory cannot be used as asked; the message names the path and the remedy."""


def refuse_other_settings(what: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise RunError with every setting that differs, if one does; ``what`` begins the message.

    >>> refuse_other_settings("a run", {"config": {}}, {"config": {"lr": 2}})
    Traceback (most recent call last):
    tokenmdp.runs.directory.RunError: a run with other settings (config.lr was not given, asked 2); choose another --out
    """
    before, now = dict(_leaves(stored)), dict(_leaves(asked))
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if different:
        was = {name: f"is {before[name]!r}" if name in before else "was not given" for name in different}
        wanted = {name: f"asked {now[name]!r}" if name in now else "now it is not given" for name in different}
        changes = "; ".join(f"{name} {was[name]}, {wanted[name]}" for name in different)
        raise RunError(f"{what} with other settings ({changes}); choose another --out")


def _leaves(settings: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested settings, named by its dotted path."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{inside}{name}.")
        else:
            yield inside + name, value


def refuse_strangers(record: Path, what: str) -> None:
    """Raise RunError if a directory without its record holds something, hidden files apart; ``what`` it is not."""
    if record.exists() or not record.parent.is_dir():
        return
    if strangers := sorted(entry.name for entry in record.parent.iterdir() if not entry.name.startswith(".")):
        raise RunError(
            f"{record.parent} holds {', '.join(strangers[:3])} but no {record.name}, so it is not {what}; nothing "
            "there was touched: choose another --out"
        )


def claim(record: Path, what: str, content: Mapping[str, Any]) -> None:
    """Write the settings that decide what a directory holds, or refuse it where ``record`` has others.

    Raises:
        RunError: other settings, or files of something else.
    """
    make_directory(record.parent)
    content = json.loads(json.dumps(content))  # as it is read back
    with locked(record.parent):
        refuse_strangers(record, what)
        if record.exists():
            refuse_other_settings(f"{record.parent} holds {what}", read_json(record), content)
        else:
            write_text(record, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def claimed(record: Path, content: Mapping[str, Any]) -> Iterator[None]:
    """Write a directory's record if it does not exist; a block that fails before it wrote anything takes it back."""
    new = not record.exists()
    if new:
        write_text(record, json.dumps(content, indent=2) + "\n")
    try:
        yield
    except BaseException:
        if new and all(entry == record or entry.name.startswith(".") for entry in record.parent.iterdir()):
            record.unlink()
        raise


class RunDirectory:
    """A directory that holds exactly one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.before = self.path / "before.json"
        self.checkpoint = self.path / "checkpoint"
        self.report = self.path / "report"
        self._made = False  # by this object

    def check(self, settings: Mapping[str, Any], *, resume: bool) -> bool:
        """Whether the directory, held by `alone`, has a checkpoint that a run with ``settings`` may resume from.

        Raises:
            RunError: it holds something else, a run with other settings, or a run while ``resume`` is off.
        """
        refuse_strangers(self.record, "a tokenmdp run")
        if not self.record.exists():
            return False
        if not resume:
            raise RunError(f"{self.path} already holds a run; leave out --no-resume to go on, or choose another --out")
        stored = self.settings()
        if "ppo" in stored:
            raise RunError(f"an earlier version of tokenmdp wrote {self.record}; choose another --out")
        try:
            refuse_other_settings(f"{self.path} holds a run", stored, settings)
        except RunError:
            if not self._has_only_begun():
                raise
            logger.warning(
                "the run in %s failed before its first update, with other settings; it begins anew", self.path
            )
            shutil.rmtree(self.tensorboard, ignore_errors=True)
            for file in (self.before, self.record):  # the record last, as it says whose the others are
                file.unlink(missing_ok=True)
            return False
        return recover_directory(self.checkpoint).exists()

    def _has_only_begun(self) -> bool:
        """Whether nothing is here but what a run writes before its first update."""
        begun = {self.record.name, self.before.name, self.tensorboard.name}
        return {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")} <= begun

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training here until the block ends; the directory is created if it does not exist.

        Raises:
            RunError: another process trains here, or the path cannot be written.
        """
        self._probe()
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.path, wait=False))
            except (BusyError, FileNotFoundError) as error:  # or one that has just failed to start and removed it
                raise RunError(
                    f"another process trains in {self.path}; wait for it, or choose another --out"
                ) from error
            yield

    @contextlib.contextmanager
    def setting_up(self) -> Iterator[None]:
        """Remove the directory if the block fails, where `alone` made it and nothing is in it."""
        try:
            yield
        except BaseException:
            if self._made:
                with contextlib.suppress(OSError):  # it holds something
                    self.path.rmdir()
            raise

    def claimed(self, settings: Mapping[str, Any], threads: int) -> contextlib.AbstractContextManager[None]:
        """`claimed` for ``run.json``; a run goes on with the threads with which it began."""
        return claimed(self.record, {"format": FORMAT, "settings": dict(settings), "threads": threads})

    def threads(self) -> int | None:
        """The threads with which the run began; None: an older version did not write them."""
        threads = self._record().get("threads")
        return threads if isinstance(threads, int) and threads > 0 else None

    def settings(self) -> dict[str, Any]:
        """The settings in ``run.json``.

        Raises:
            RunError: there is none, or another program wrote it.
        """
        return dict(self._record()["settings"])

    def _record(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            RunError: there is none, or another program wrote it.
        """
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except OSError as error:
            holder = self.path.resolve().parent
            hint = f"; it lies in the run {holder}: pass that" if (holder / self.record.name).exists() else ""
            raise RunError(
                f"{self.path} is not a tokenmdp run: {self.record.name} cannot be read ({error})"
                f"{hint or '; pass the directory of a `tokenmdp train`'}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"{self.record} is damaged ({error}); move {self.path} away, or use its checkpoint/ directory directly"
            ) from error
        if (
            not isinstance(record, dict)
            or record.get("format") != FORMAT
            or not isinstance(record.get("settings"), dict)
        ):
            raise RunError(f"{self.record} was written by another program; choose another directory")
        return record

    def along(self, update: int) -> Path:
        """The file of what was measured after an update."""
        return self.path / "along" / f"update-{update}.json"

    def points(self, before: int) -> list[dict[str, Any]]:
        """What was measured as it trained, in updates below ``before``, in their order."""
        points = [read_json(path) for path in self.along(0).parent.glob("update-*.json")]
        return sorted((one for one in points if one["update"] < before), key=lambda one: one["update"])

    def restore_metrics(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Let ``metrics.jsonl`` hold exactly ``history``, the records of the checkpoint that the run goes on from.

        Records after it, which the run is about to produce again, are dropped. A file that lacks records or has others
        (a power cut, an editor, a partial copy) is written anew.

        Returns:
            What was wrong with the file, for the log; None: nothing.
        """
        wanted = [json.dumps(record) for record in history]  # as text: a NaN equals no NaN
        if not self.metrics.exists() and not wanted:
            return None
        try:
            found = [json.dumps(record) for record in read_metrics(self.metrics)]
        except FileNotFoundError:
            wrong = "is missing"
        except (OSError, ValueError, RecursionError) as error:
            wrong = f"is damaged ({error})"
        else:
            kept = found[: len(wanted)]
            same = sum(map(operator.eq, kept, wanted))
            wrong = "" if kept == wanted else f"has {same} of the {count(len(wanted), 'record')} as they were"
            if found == wanted:
                return None
        write_text(self.metrics, "".join(f"{record}\n" for record in wanted))
        return f"{self.metrics} {wrong}: written anew from the checkpoint's history" if wrong else None

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``; it is on disk when this returns."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _probe(self) -> None:
        """Make the directory and write a file in it, so that an hour of work is not lost at the first checkpoint."""
        try:
            self._made = not self.path.exists()
            make_directory(self.path)
            handle, name = tempfile.mkstemp(dir=self.path, prefix=".probe.")
            os.close(handle)
            os.unlink(name)
        except OSError as error:
            raise RunError(f"cannot write to the run directory {self.path} ({error}); pass a writable --out") from error
