"""Many cells side by side: what runs, what is kept, what is said, and what happens when one fails."""

import errno
import io
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console
from study_doubles import figures_not_drawn, make_result, paper_like

from tokenmdp import cli
from tokenmdp.cli import ablate
from tokenmdp.runs import display
from tokenmdp.study import scheduler
from tokenmdp.study.directory import declare, load_study
from tokenmdp.study.grid import expand
from tokenmdp.study.presets import PLANS
from tokenmdp.study.progress import Progress, Worker
from tokenmdp.study.results import StudyError, cell_file, write_result

SMOKE = PLANS["smoke"]
UNIX = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for a worker is a shell script")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes workers of shell scripts; each of four cells can be given a line to run instead of being finished."""
    study, ready = tmp_path / "study", tmp_path / "ready"
    cells = expand(SMOKE)
    declare(study, "smoke", cells, {})
    (study / "cells").mkdir()
    declare(ready, "smoke", cells, {})
    for cell in cells:
        double = replace(make_result(cell, paper_like(cell)), cell=cell)
        write_result(ready, double)

    def make(**lines):
        cases = "".join(f"  *{name}*) {line} ;;\n" for name, line in lines.items())
        script = tmp_path / "python"
        script.write_text(
            f'#!/bin/sh\necho "$4" >> {tmp_path}/started\ncase "$4" in\n{cases}'
            f'  *) cp {ready}/cells/"$4".json "$3"/cells/ ;;\nesac\n'
        )
        script.chmod(0o755)
        monkeypatch.setattr(scheduler.sys, "executable", str(script))
        return study, cells

    return make


def run(study, cells, **options):
    with (study.parent / "log").open("a") as log:
        console = Console(file=log, width=200)
        return scheduler.run_cells(study, cells, **{"jobs": 2, "device": "cpu", "console": console, **options})


def started(study):
    file = study.parent / "started"
    return file.read_text().split() if file.exists() else []


@UNIX
def test_finished_cells_are_never_run_again(stand_in):
    study, cells = stand_in()
    assert run(study, cells[:3]) == {}
    assert run(study, cells) == {}
    assert sorted(started(study)) == sorted(cell.id for cell in cells)
    log = (study.parent / "log").read_text()
    assert "3 of 3 cells done" in log
    assert "4 of 4 cells done" in log


@UNIX
def test_what_another_command_finishes_meanwhile_is_not_run(stand_in, tmp_path):
    last = expand(SMOKE)[-1]
    study, cells = stand_in(**{"sparse-4to7-s1": f'cp {tmp_path}/ready/cells/*.json "$3"/cells/'})
    assert run(study, cells, jobs=1) == {}
    assert started(study) == [cells[0].id]
    assert last.id in load_study(study).results
    assert "4 of 4 cells done" in (tmp_path / "log").read_text()


@UNIX
def test_what_earlier_attempts_left_is_swept_before_the_first_cell(stand_in, tmp_path):
    study, cells = stand_in(**{"sparse-4to7-s1": f'ls -A "$3"/cells > {tmp_path}/seen; exit 1'})
    for cell in cells[1:]:
        for suffix in (".error.txt", ".progress"):
            cell_file(study, cell.id, suffix).write_text("{}")
        old = study / "cells" / f".{cell.id}.json.x1y2z3"
        old.write_text("half")
        os.utime(old, (0, 0))
    new = study / "cells" / f".{cells[-1].id}.json.a1b2c3"
    new.write_text("half")  # another command is writing it
    run(study, cells, jobs=1)
    assert (tmp_path / "seen").read_text().split() == [new.name]
    os.utime(new, (0, 0))  # its writer was killed, and the cell is finished by now
    run(study, cells[-1:])
    assert {file.suffix for file in (study / "cells").iterdir()} == {".json", ".txt"}  # the new failure's


@UNIX
def test_a_study_that_is_gone_ends_the_run(stand_in, tmp_path):
    line = f"mv {tmp_path}/study {tmp_path}/moved; echo $$ > {tmp_path}/pid; exec sleep 60"
    study, cells = stand_in(**{"attention-4to7-s1": line})
    with pytest.raises(StudyError, match=r"study\.json is gone, so the running cells were ended; if .* was moved"):
        run(study, cells)
    assert not study.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    (tmp_path / "moved").rename(study)
    stand_in()
    assert run(study, cells) == {}


def full_disk(path, content):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@UNIX
def test_a_disk_too_full_for_traces_leaves_the_other_cells_going(stand_in, monkeypatch):
    study, cells = stand_in(**{"attention-4to7-s1": "echo 'OSError: No space left on device' >&2; exit 1"})
    monkeypatch.setattr(scheduler, "write_text", full_disk)
    assert list(run(study, cells).values()) == ["OSError: No space left on device"]
    assert len(load_study(study).results) == 3


@UNIX
@figures_not_drawn()
def test_a_disk_too_full_for_the_report_hides_no_failed_cell(stand_in, monkeypatch, capsys):
    study, _ = stand_in(**{"sparse-4to7-s2": "echo 'MemoryError: too much' >&2; exit 1"})
    monkeypatch.setattr(ablate.terminal, "write_report", full_disk)
    assert cli.main(["ablate", "--preset", "smoke", "--out", str(study), "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert "failed: sparse, 4-8 tokens, seed 2: MemoryError: too much" in " ".join(shown.out.split())
    assert "No space left on device" in shown.err


@UNIX
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("kill -KILL $$", "killed by SIGKILL, which is how Linux ends a process when memory runs out"),
        ("echo Trace >&2; echo 'OSError: No space left on device' >&2; exit 1", "OSError: No space left on device"),
        ("exit 3", "ended with status 3 and no message"),
        ("echo half > $3/cells/$4.json", "delete it and the cell is run again"),
        ("true", "FileNotFoundError"),
    ],
)
def test_one_crash_leaves_the_others_going(stand_in, line, reason):
    study, cells = stand_in(**{"attention-4to7-s1": line})
    (failed,) = (cell for cell in cells if (cell.method, cell.seed) == ("attention", 1))
    errors = run(study, cells)
    assert errors.keys() == {failed.id}
    assert reason in errors[failed.id]
    assert all(cell_file(study, cell.id).exists() for cell in cells if cell is not failed)
    assert reason in (study.parent / "log").read_text()
    cell_file(study, failed.id).unlink(missing_ok=True)
    assert reason in load_study(study).errors[failed.id]
    stand_in()
    assert run(study, cells) == {}
    assert started(study).count(failed.id) == 2
    assert load_study(study).errors == {}


@UNIX
def test_a_terminal_shows_the_running_cells_and_keeps_the_line_of_a_failed_one(stand_in):
    progress = """echo '{"update": 2, "score": 1.5, "kl": 0.25}' > "$3"/cells/"$4".progress; sleep 0.8; exit 3"""
    study, cells = stand_in(**{"attention-4to7-s1": progress})
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert len(run(study, cells, console=screen)) == 1
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.file.getvalue())
    assert re.search(r"attention, 4-8 tokens +1 +2 of 3 +\+1\.50 +0\.25 +0:0\d", shown)
    assert "1 of 4 cells done" in shown
    assert shown.count("attention, 4-8 tokens, seed 1 failed: ended with status 3 and no message") == 1


@UNIX
def test_no_more_than_the_asked_number_run_at_once(stand_in, tmp_path):
    line = f"echo + >> {tmp_path}/running; sleep 0.3; echo - >> {tmp_path}/running; exit 1"
    study, cells = stand_in(s1=line, s2=line)
    assert len(run(study, cells, jobs=2)) == 4
    running = [1 if sign == "+" else -1 for sign in (tmp_path / "running").read_text().split()]
    assert max(sum(running[:count]) for count in range(len(running) + 1)) == 2


@UNIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interruption_ends_the_running_cells_and_keeps_the_finished(stand_in, tmp_path, monkeypatch, name):
    number = signal.Signals[name]
    monkeypatch.setattr(display, "_to_nowhere", lambda stream: None)  # or a terminal would show no more of the tests
    line = f"echo $$ > {tmp_path}/pid; exec sleep 60"
    study, cells = stand_in(s2=line)

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(study, cells, jobs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert len(list((study / "cells").glob("*.json"))) == 2
    assert {signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)} == {signal.SIG_DFL}


@UNIX
def test_nohup_overrules_the_end_of_the_terminal(stand_in):
    study, cells = stand_in(**{cell.id: "kill -HUP $PPID; sleep 0.1; exit 1" for cell in expand(SMOKE)[:1]})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert list(run(study, cells, jobs=1)) == [cells[0].id]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(load_study(study).results) == 3


@UNIX
def test_an_interruption_while_a_process_starts_ends_that_process_too(stand_in, tmp_path, monkeypatch):
    study, cells = stand_in(s1="exec sleep 60")
    started = []

    def start_and_interrupt(*arguments):
        started.append(start(*arguments))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # the handler runs here
        return started[-1]

    start = scheduler._start
    monkeypatch.setattr(scheduler, "_start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(study, cells, jobs=1)
    assert started[0].process.poll() is not None


@UNIX
def test_shards_share_a_study_and_the_last_one_reports(stand_in, monkeypatch, capsys):
    study, cells = stand_in()
    reported = []
    monkeypatch.setattr(ablate.terminal, "report", lambda out, grid, console: reported.append(grid))
    for shard in ("2/3", "1/3", "3/3"):
        assert not reported
        assert cli.main(["ablate", "--preset", "smoke", "--out", str(study), "--device", "cpu", "--shard", shard]) == 0
    assert reported == ["smoke"]
    assert sorted(started(study)) == sorted(cell.id for cell in cells)
    assert "are left to other shards" in " ".join(capsys.readouterr().out.split())


@UNIX
@figures_not_drawn()
def test_a_failed_cell_is_named_at_the_end_and_in_the_report(stand_in, capsys):
    study, _ = stand_in(**{"sparse-4to7-s2": "echo 'MemoryError: too much' >&2; exit 1"})
    assert cli.main(["ablate", "--preset", "smoke", "--out", str(study), "--device", "cpu"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "failed: sparse, 4-8 tokens, seed 2: MemoryError: too much" in output
    assert "3 of 4 cells" in output
    assert "MemoryError: too much" in (study / "report" / "index.html").read_text(encoding="utf-8")
    assert cli.main(["ablate", "--preset", "smoke", "--out", str(study), "--report-only"]) == 0
    assert len(started(study)) == 4


def test_the_time_left_follows_the_finished_cells_of_the_same_method(tmp_path):
    fast, slow, *_ = cells = [replace(cell, updates=10) for cell in expand(SMOKE)]
    assert (fast.method, slow.method) == ("sparse", "attention")
    progress = Progress(tmp_path, 1, 4, list(cells[2:]))
    assert progress.seconds_left() is None
    progress.add(fast, 10.0)
    assert progress.seconds_left() == pytest.approx(20)  # nothing else is known of attention
    progress.add(slow, 30.0)
    assert progress.seconds_left() == pytest.approx(40)
    assert str(progress) == "2 of 4 cells done, about 0:40 left"
    progress.jobs = 2
    assert progress.seconds_left() == pytest.approx(20)
    half = Worker(slow, None, 0, None, time.monotonic() - 15, {"update": 5})
    progress.running.append(half)
    assert half.share == 0.5
    assert progress.seconds_left() == pytest.approx(27.5, abs=0.1)
    begun = Worker(fast, None, 0, None, time.monotonic() - 4, {"update": 1})  # too early to tell
    assert begun.seconds_left(10.0) == pytest.approx(6, abs=0.1)
    half.started -= 45  # a slow one takes another minute, while the rest is done on the other core
    assert progress.seconds_left() == pytest.approx(60, abs=0.1)


def test_every_process_has_a_gpu_or_one_thread(monkeypatch):
    on_cpu = scheduler._environment({"HOME": "/"}, 1, "cpu")
    assert on_cpu["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu
    gpus = [
        scheduler._environment({"CUDA_VISIBLE_DEVICES": "2,5"}, slot, "cuda")["CUDA_VISIBLE_DEVICES"]
        for slot in range(3)
    ]
    assert gpus == ["2", "5", "2"]
    monkeypatch.setattr(scheduler.torch.cuda, "device_count", lambda: 2)
    assert scheduler.default_jobs("cuda") == 2
    assert scheduler._environment({}, 1, "cuda")["CUDA_VISIBLE_DEVICES"] == "1"


@UNIX
def test_one_gpu_is_pinned_and_the_worker_counts_from_it(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab")
    assert scheduler.default_jobs("cuda:1") == 1
    study, cells = stand_in(s1=f'echo "$CUDA_VISIBLE_DEVICES $6" >> {tmp_path}/device; exit 1')
    run(study, cells, device="cuda:1")
    assert set((tmp_path / "device").read_text().splitlines()) == {"GPU-ab cuda"}
    with pytest.raises(StudyError, match="--device 'cuda:2' names no GPU of the 2 here"):
        scheduler.default_jobs("cuda:2")


@UNIX
@pytest.mark.parametrize(
    ("words", "texts"), [([], [100]), (["--quality-texts", "7"], [7]), (["--quality-texts", "0"], [])]
)
def test_credit_quality_may_be_left_out(stand_in, monkeypatch, words, texts):
    study, _ = stand_in()
    asked = []
    monkeypatch.setattr(ablate, "measure_credit_quality", lambda out, num, device, console: asked.append(num))
    monkeypatch.setattr(ablate.terminal, "report", lambda out, grid, console: None)
    assert cli.main(["ablate", "--preset", "smoke", "--out", str(study), "--device", "cpu", *words]) == 0
    assert asked == texts
