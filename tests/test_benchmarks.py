"""The speed benchmark: its counts and intervals are right, its clocks change nothing, and every part runs."""

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenmdp.intervals import Estimate
from tokenmdp.rollouts import collect
from tokenmdp.types import Episode

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "speed.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from speed_parts import command, peak_memory, timing, trl_process  # noqa: E402
from speed_parts.arithmetic import forward_flops, update_flops  # noqa: E402
from speed_parts.device_profile import own_time  # noqa: E402
from speed_parts.report import Finding  # noqa: E402
from speed_parts.rollout_clock import ClockedAgent  # noqa: E402
from speed_parts.shapes import SHAPES, make_agent, make_envs, make_policy, make_reward_model  # noqa: E402
from speed_parts.timing import Stopwatch, TimedReward, alternate, ratio_interval  # noqa: E402

CPU = torch.device("cpu")
SMOKE = SHAPES["smoke"]
SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6)


def sizes(shape):
    return shape.layers, shape.width, shape.vocab_size, shape.episodes, shape.prompt_tokens, shape.response_tokens


def counted(call):
    # The counter knows neither the fused attention kernel of a CPU nor oneDNN's products.
    plain = patch("tokenmdp.models.kernels.onednn._takes", lambda *_: False)
    with plain, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def not_json(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def one_process(monkeypatch):
    """Of the processes whose memory is measured the first one is started; the others would say much the same."""
    run, said = subprocess.run, []

    def start(command, **options):
        if peak_memory.__name__ not in command:
            return run(command, **options)
        if not said:
            said.append(run(command, **options))
        return said[0]

    monkeypatch.setattr(subprocess, "run", start)


PARTS = [
    pytest.param(part, marks=pytest.mark.long) if part in ("credit", "growth") else part  # start processes
    for part in command.PARTS
    if part != "trl"
]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_finds_something_and_writes_it(part, one_process, tmp_path):
    out = tmp_path / "speed.json"
    findings = command.main(["--smoke", part, "--threads", str(torch.get_num_threads()), "--out", str(out)])
    written = json.loads(out.read_text(), parse_constant=not_json)
    assert [finding["value"] for finding in written["findings"]] == [finding.interval.value for finding in findings]
    assert {finding.part for finding in findings} == {part}
    assert all(math.isfinite(finding.interval.value) and finding.interval.value > 0 for finding in findings)
    assert {finding.mark for finding in findings} == {""}  # marks apply only to the sizes of a full measurement
    assert written["machine"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == torch.get_num_threads()


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse(["trl", "gpu"])
    assert "'gpu' is not a part" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"layers": 3, "width": 32}, {"prompt_tokens": 7, "vocab_size": 91}])
def test_the_flop_formula_counts_what_the_policy_multiplies(changes):
    shape = replace(SMOKE, **changes)
    agent = make_agent(shape, make_envs(shape), "float32", "cpu")
    slots = shape.prompt_tokens + shape.response_tokens
    ids = torch.randint(1, shape.vocab_size, (shape.episodes, slots))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        executed = counted(lambda: agent.policy.evaluate(ids, mask, shape.prompt_tokens))
    assert forward_flops(*sizes(shape)) == executed


def test_the_update_multiplies_three_times_the_forward_in_every_epoch():
    shape = replace(SMOKE, layers=2, width=32, update_epochs=3)
    iteration = counted(ClockedAgent(shape, "float32", CPU).iteration)
    rollout = counted(ClockedAgent(shape, "float32", CPU).rollout)
    assert update_flops(shape) == iteration - rollout


@pytest.mark.parametrize("name", ["smoke", "bundled"])
def test_prompts_and_responses_have_the_lengths_of_their_shape(name):
    shape = replace(SHAPES[name], episodes=4, response_tokens=3)
    agent = make_agent(shape, make_envs(shape), "float32", "cpu")
    rollout, _ = collect(agent.envs, agent.policy, agent.reference, agent.generator)
    assert rollout.attention_mask.all()
    assert rollout.input_ids.shape == (4, shape.prompt_tokens + 3)


def test_models_have_the_sizes_of_their_shape():
    for shape in (SMOKE, SHAPES["4x256"]):
        config = make_policy(shape).config
        assert (config.n_layer, config.n_embd, config.vocab_size) == sizes(shape)[:3]
        assert len(make_envs(shape).unwrapped.tokenizer) == shape.vocab_size
    config = make_policy(SHAPES["bundled"]).config
    assert (config.n_layer, config.n_embd, config.vocab_size) == sizes(SHAPES["bundled"])[:3]


@given(SECONDS, st.floats(0.1, 10))
def test_a_constant_ratio_is_found_exactly(seconds, ratio):
    found = ratio_interval(ratio * np.array(seconds), seconds)
    np.testing.assert_allclose(found, [ratio] * 3, rtol=1e-6)


@given(SECONDS.flatmap(lambda left: st.tuples(st.just(left), st.lists(st.floats(1e-3, 1e3), min_size=len(left)))))
def test_the_reciprocal_ratio_has_the_reciprocal_interval(pair):
    left, right = pair[0], pair[1][: len(pair[0])]
    forward, backward = ratio_interval(left, right), ratio_interval(right, left)
    assert forward.low <= forward.value <= forward.high
    expected = [1 / backward.value, 1 / backward.high if backward.high else math.inf, forward.high]
    np.testing.assert_allclose(forward, expected, rtol=1e-6)


def test_the_interval_covers_the_true_ratio_nineteen_times_in_twenty():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        left, right = 2 * np.exp(0.3 * generator.normal(size=5)), np.exp(0.3 * generator.normal(size=5))
        found = ratio_interval(left, right)
        hits += found.low <= 2 <= found.high
    assert hits == pytest.approx(950, abs=25)


def test_one_repetition_says_nothing_about_the_spread():
    finding = Finding("trl", "smoke", "ratio", ratio_interval([3.0], [2.0]), "", at_least=2.5)
    assert finding.interval.value == pytest.approx(1.5)
    assert finding.measured == "1.500"
    assert finding.to_json()["interval"] == [0.0, None]


@pytest.mark.parametrize(
    ("marks", "interval", "verdict", "met"),
    [
        ({"at_least": 2.0}, (2.5, 2.2, 2.8), "met", True),
        ({"at_least": 2.0}, (2.5, 1.9, 3.2), "met, interval open", True),
        ({"at_least": 2.0}, (1.5, 1.2, 1.8), "not met", False),
        ({"at_most": 1.02}, (1.01, 1.0, 1.015), "met", True),
        ({"at_most": 1.02}, (1.03, 1.01, 1.05), "not met, interval open", False),
        ({}, (1.0, 0.9, 1.1), "", None),
    ],
)
def test_the_verdict_compares_with_the_mark(marks, interval, verdict, met):
    finding = Finding("part", "shape", "quantity", Estimate(*interval), "", **marks)
    assert (finding.verdict, finding.met) == (verdict, met)


def test_sides_take_turns_and_every_second_repetition_turns_around():
    order = []

    def side(name):
        def run():
            order.append(name)
            return {"seconds": float(len(order))}

        return run

    records = alternate({name: side(name) for name in "abc"}, repetitions=2, warmup=1)
    assert "".join(order) == "abccbaabc"
    assert [numbers["seconds"] for numbers in records["a"]] == [6, 7]


def test_a_stopwatch_adds_up_what_is_inside(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(timing, "now", lambda device: next(clock))
    watch = Stopwatch(CPU)
    with watch:
        pass
    assert watch.around(lambda value: value + 1)(1) == 2
    assert (watch.stopped_at, watch.take(), watch.take()) == (10.5, 2.5, 0.0)


def test_a_clocked_agent_learns_what_the_plain_one_learns():
    clocked = ClockedAgent(SMOKE, "float32", CPU, credit="attention", real_reward=True)
    plain = make_agent(SMOKE, make_envs(SMOKE, make_reward_model(SMOKE, "cpu"), "attention"), "float32", "cpu")
    assert clocked.iteration()["tokens"] == SMOKE.tokens
    plain.learn(1)
    ours, theirs = ({**agent.history[0]} for agent in (clocked.agent, plain))
    for key in ("seconds", "tokens_per_second"):
        del ours[key], theirs[key]
    assert ours == theirs


def test_the_watch_on_a_reward_model_leaves_its_numbers():
    inner = make_reward_model(SMOKE, "cpu")
    watched = TimedReward(inner, Stopwatch(CPU))
    assert (watched.provides, watched.max_tokens) == (inner.provides, inner.max_tokens)
    ids = torch.randint(1, SMOKE.vocab_size, (2, 5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    ours, theirs = (
        model(Episode(ids, mask, mask[:, 2:]), needs=frozenset({"attention"})) for model in (watched, inner)
    )
    assert torch.equal(ours.score, theirs.score)
    assert torch.equal(ours.attention, theirs.attention)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    def write(text):
        path = tmp_path / "worker.py"
        path.write_text(text)
        monkeypatch.setattr(trl_process, "WORKER", path)

    return write


def test_the_other_process_answers_line_by_line(worker):
    worker(
        "import json, sys\n"
        "for number, line in enumerate(sys.stdin):\n"
        "    order = json.loads(line)\n"
        "    print(json.dumps({'versions': {'got': order.get('threads')}, 'seconds': number}), flush=True)\n"
    )
    with trl_process.TRLProcess(Path(sys.executable), {"threads": 3}) as trl:
        assert trl.versions == {"got": 3}
        assert [trl.iteration()["seconds"] for _ in range(2)] == [1, 2]
    assert trl.process.poll() is not None


def test_a_process_that_dies_says_why(worker):
    worker("raise SystemExit('no such trainer')")
    with pytest.raises(RuntimeError, match="no such trainer"):
        trl_process.TRLProcess(Path(sys.executable), {})


def test_a_finished_environment_is_used_again_and_other_pins_are_installed(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(trl_process.subprocess, "run", lambda command, **_: commands.append(command))
    first = trl_process.make_environment(tmp_path)
    assert len(commands) == 2
    assert commands[1][:3] == [first, "-m", "pip"]
    assert trl_process.make_environment(tmp_path) == first
    assert len(commands) == 2
    monkeypatch.setattr(trl_process, "PINS", ("trl==0.11.3",))
    trl_process.make_environment(tmp_path)
    assert commands[-1][-1] == "trl==0.11.3"


def test_the_profile_names_operations_with_and_without_the_changes(monkeypatch, capsys):
    script = str(BENCHMARKS / "profile_iteration.py")
    monkeypatch.setenv("TOKENMDP_REEXECUTED", "1")
    outputs = []
    for options in ([], ["--without-changes"]):
        monkeypatch.setattr(sys, "argv", [script, "--shape", "smoke", "--dtype", "float32", *options])
        runpy.run_path(script, run_name="__main__")
        outputs.append(capsys.readouterr().out)
    assert all("| aten::" in output for output in outputs)
    assert "aten::exponential_" not in outputs[0]  # the noise of the sampler that was replaced


def test_the_time_on_a_gpu_is_that_of_its_kernels():
    rows = [
        SimpleNamespace(key=key, device_type=device, is_user_annotation=named, self_device_time_total=1.0)
        for key, device, named in (
            ("cutlass_80_simt_sgemm", DeviceType.CUDA, False), ("aten::mm", DeviceType.CPU, False),
            ("Optimizer.step#Adam.step", DeviceType.CUDA, True), ("Memcpy DtoH", DeviceType.CUDA, False),
        )
    ]  # fmt: skip
    assert [own_time(row, "cuda") for row in rows] == [1, 0, 0, 1]


@pytest.mark.long
def test_the_check_of_a_gpu_finds_everything_on_a_cpu(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--out", tmp_path, "--device", "cpu", "--smoke"]
    subprocess.run(command, check=True, capture_output=True)
    found = {path.stem: json.loads(path.read_text(), parse_constant=not_json)["found"] for path in tmp_path.iterdir()}
    assert set(found) == {"machine", "tests", "ours", "plain", "profile"}
    for phase in ("machine", "ours", "plain", "profile"):
        assert not [finding for finding in found[phase].values() if isinstance(finding, dict) and "error" in finding]
    assert found["machine"]["a product"] == 4
    assert set(found["ours"]) == {
        "smoke float32 highest plain", "smoke float32 high plain", "smoke float32 high recorded",
        "smoke bfloat16 highest plain", "smoke bfloat16 highest copied", "smoke bfloat16 highest recorded",
    }  # fmt: skip
    assert all(finding["tokens_per_second"] > 0 for finding in (found["ours"] | found["plain"]).values())
    assert all(finding["kernels"] for finding in found["profile"].values())
    assert found["tests"]["exit status"] == 0


def test_trl_runs_in_a_given_python_or_in_an_environment_that_is_made(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "make_environment", lambda directory: directory / "made")
    monkeypatch.setattr(command.against_trl, "measure", lambda *arguments: asked.append(arguments[-1]) or [])
    command.main(["trl", "--smoke", "--trl-python", "other/python"])
    command.main(["trl", "--smoke", "--trl-venv", "venv"])
    assert asked == [Path("other/python"), Path("venv/made")]
