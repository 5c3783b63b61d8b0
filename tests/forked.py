"""Processes that begin with all that is imported here: one that imports models by itself takes seconds for that."""

import multiprocessing
import os
import sys

import pytest

from tokenmdp.cli import main

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="a copy of this process is made by fork")
PATIENCE = 300  # seconds, for a busy machine


def started(function, *arguments):
    """Call ``function`` in a copy of this process."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def exit_code(function, *arguments):
    """How a copy of this process ended that called ``function``; minus the signal if one killed it."""
    process = started(function, *arguments)
    process.join(PATIENCE)
    return process.exitcode


class Command:
    """The ``tokenmdp`` command in a copy of this process: what it writes can be read from `stdout` and `stderr`.

    Args:
        arguments: of the command.
        before: called in the copy, first.
    """

    def __init__(self, *arguments, before=lambda: None):
        pipes = [os.pipe() for _ in range(2)]
        self.process = started(self._run, pipes, arguments, before)
        for _, writer in pipes:
            os.close(writer)
        self.stdout, self.stderr = (os.fdopen(reader, "rb") for reader, _ in pipes)

    @staticmethod
    def _run(pipes, arguments, before):
        for number, (reader, writer) in enumerate(pipes, 1):
            os.close(reader)
            os.dup2(writer, number)
            os.close(writer)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        before()
        sys.exit(main(arguments))

    @property
    def runs(self):
        return self.process.is_alive()

    def send(self, signal):
        os.kill(self.process.pid, signal)

    def end(self):
        """Its exit code, and what it wrote, if nobody has closed that."""
        said = [pipe.read().decode() if not pipe.closed else "" for pipe in (self.stdout, self.stderr)]
        self.process.join(PATIENCE)
        return self.process.exitcode, "".join(said)
