"""Progress of a training run on a terminal or in a log file, and Ctrl-C between two updates."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenmdp.wording import clock, visible

LOG_SECONDS = 10.0  # at most one line in this time where the output is a file
ECHO_SECONDS = 2.0  # within this time a second signal may be the first one, passed on by a launcher


CLOSED_STATUS = 141  # 128 + SIGPIPE, as the shell reports programs whose output nobody reads any more


class OutputClosed(SystemExit):
    """Standard output was a pipe whose reader has ended, as in ``tokenmdp credits | head -1``."""

    def __init__(self) -> None:
        super().__init__(CLOSED_STATUS)


class MessageConsole(Console):
    """A console that shows control characters in messages as marks, and ends quietly when its reader does."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's; paths and names are not markup, which would swallow "[b]", and cannot move the cursor."""
        super().print(*(visible(item) if isinstance(item, str) else item for item in objects), **options)

    def on_broken_pipe(self) -> None:
        """What rich calls when the reader of a pipe has ended."""
        self.quiet = True
        discard_broken_output()
        raise OutputClosed


def make_console() -> Console:
    """A console for standard output with at least 256 colours where it is a terminal.

    A bare ``TERM=xterm``, usual in containers, counts as 16 colours, which would leave no shades in a heat map;
    terminals that call themselves so have shown 256 for twenty years.
    """
    console = MessageConsole(markup=False)
    return MessageConsole(markup=False, color_system="256") if console.color_system == "standard" else console


def accept_any_text() -> None:
    r"""Let standard output and error write what their encoding lacks as ``\xe9`` instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_broken_output() -> None:
    """Drop what standard output and error can no longer write, so that the interpreter does not complain at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _to_nowhere(stream)
        except AttributeError:  # None: it was closed before the program began
            pass


def ending_signals() -> list[signal.Signals]:
    """What asks a command to end beside Ctrl-C: SIGTERM, and the end of the terminal unless ``nohup`` ignores it."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, signal.SIGHUP]


def discard_terminal(number: int) -> None:
    """After the signal of its end, drop what is written to a terminal from now on: writing would raise an error."""
    if sys.platform == "win32" or number != signal.SIGHUP:
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and stream.isatty():
            _to_nowhere(stream)


@contextlib.contextmanager
def termination_is_an_interrupt() -> Iterator[None]:
    """A batch system's request to end is handled as Ctrl-C, and so is the end of the terminal."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        discard_terminal(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _to_nowhere(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


SHOWN = {  # metric -> its short name, and how it is written
    "score_mean": ("score", "+z.2f"),
    "kl": ("KL", "z.2f"),
    "alignment": ("alignment", ".2f"),
    "entropy": ("entropy", "z.2f"),
    "explained_variance": ("EV", "z.2f"),
    "epoch": ("epoch", ".2f"),
    "loss": ("loss", "z.3f"),
    "accuracy": ("accuracy", ".2f"),
}


def summary(metrics: Mapping[str, Any]) -> str:
    """The numbers to watch; EV is the explained variance of the critic, where there is one.

    >>> summary(
    ...     {"score_mean": 1, "kl": -0.0001, "entropy": 2.25, "explained_variance": 0.618, "tokens_per_second": 812.4}
    ... )
    'score +1.00  KL 0.00  entropy 2.25  EV 0.62  812 tokens/s'
    """
    shown = metrics.keys() - ({"loss"} if "score_mean" in metrics else set())
    known = [f"{name} {metrics[key]:{form}}" for key, (name, form) in SHOWN.items() if key in shown]
    return "  ".join([*known, f"{metrics['tokens_per_second']:.0f} tokens/s"])


class TrainingDisplay:
    """A live bar on a terminal, a line now and then in a file."""

    def __init__(self, console: Console, done: int, updates: int) -> None:
        self.console, self.done, self.updates = console, done, updates
        self.progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task("", total=updates, completed=done, numbers="next update ...")

    def __enter__(self) -> TrainingDisplay:
        self.started = time.monotonic()
        self.logged = -LOG_SECONDS
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, metrics: Mapping[str, Any]) -> None:
        """After an update."""
        update = int(metrics["update"])
        self.progress.update(self.bar, completed=update, numbers=summary(metrics))
        elapsed = time.monotonic() - self.started
        if not self.console.is_terminal and (elapsed - self.logged >= LOG_SECONDS or update == self.updates):
            self.logged = elapsed
            left = elapsed / (update - self.done) * (self.updates - update)
            self.console.print(
                f"update {update}/{self.updates}  {summary(metrics)}  {clock(elapsed)} ETA {clock(left)}",
                highlight=False,
                soft_wrap=True,
            )


class Interruption:
    """Turns the first Ctrl-C into a request to stop after the current update.

    So it does with a termination request and with the end of the terminal (SIGHUP, unless ``nohup`` ignores it).
    Stopping in the middle of an update would leave weights and optimizer half changed. A second Ctrl-C does stop at
    once; the run then resumes from the last checkpoint.

    Args:
        console: says what happens.
        patient: overlook a second one within `ECHO_SECONDS`: launchers of several processes pass on the first twice.
    """

    def __init__(self, console: Console, patient: bool = False) -> None:
        self.console, self.patient = console, patient
        self.asked, self.asked_at = False, 0.0

    def __enter__(self) -> Interruption:
        self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, *ending_signals())}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        discard_terminal(number)
        if self.asked:
            if self.patient and time.monotonic() - self.asked_at < ECHO_SECONDS:
                return
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.asked, self.asked_at = True, time.monotonic()
        again = f" after {ECHO_SECONDS:.0f} seconds" if self.patient else ""
        with contextlib.suppress(OutputClosed):  # Ctrl-C has ended what read the output, too
            self.console.print(f"finishing this update, then saving (Ctrl-C again{again} leaves at once)")
