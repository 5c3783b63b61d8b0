"""Runs on a device that the CPU plays (pretend_device.py): nothing mixes, the numbers agree, the host rarely waits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from placement_cases import CONFIG, TOKENS
from torch.utils import backend_registration

from tokenmdp.credit import CREDIT_METHODS

TESTS = Path(__file__).parent
EPOCHS = CONFIG["update_epochs"]

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)


def in_own_process(directory, *names):
    """What placement_runs.py found; the device, once there, stays."""
    command = [sys.executable, TESTS / "placement_runs.py", directory, *names]
    subprocess.run(command, check=True)
    return json.loads((directory / "runs.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_own_process(tmp_path_factory.mktemp("runs"), "sparse", "credit", "recorded")


def both(found, name):
    """What a run gave there and here, if it ran."""
    assert "error" not in found[name], found[name]["error"]
    return found[name]["there"], found[name]["here"]


def assert_same_run(found, name):
    there, here = both(found, name)
    tolerance = 1e-2 if name in ("bfloat16", "copied") else 1e-4
    for ours, theirs in zip(there["history"], here["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance, rel=tolerance), name
    assert there["score"] == pytest.approx(here["score"], abs=tolerance), name


def test_the_device_refuses_tensors_of_two_devices(found):
    assert len(found["mistakes"]) == 4
    assert found["mistakes"][0].startswith("add of tensors on two devices: (3,) on cpu, (3,) on pretend:0")


def test_a_run_learns_saves_loads_and_evaluates_as_on_the_cpu(found):
    assert_same_run(found, "sparse")


def test_every_credit_method_is_where_its_models_are(found):
    there, here = both(found, "credit")
    assert list(there) == list(CREDIT_METHODS)
    for name, token_rewards in here.items():
        for ours, theirs in zip(there[name], token_rewards, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), name


def test_the_host_waits_once_per_token_and_once_per_minibatch(found):
    there, _ = both(found, "sparse")
    assert there["waits of a token"] == [1] * (TOKENS - 1)
    assert there["waits of a minibatch"] == [1] * EPOCHS * CONFIG["num_minibatches"]
    in_models = [(place, count) for _, place, count in there["waits"] if place.startswith("models/")]
    assert in_models == []
    reads = sum(count for kind, place, count in there["waits"] if kind in ("read", "item", "tolist"))
    assert reads <= TOKENS + EPOCHS + 9  # an order for each epoch; 9 for the whole update


def test_a_recorded_step_waits_no_more_often(found):
    assert_same_run(found, "recorded")
    there, _ = both(found, "recorded")
    assert set(there["waits of a token"]) == {1}


def test_the_reference_reads_all_rows_at_once_on_a_gpu_and_a_minibatch_of_them_on_a_cpu(found):
    there, here = both(found, "sparse")
    assert (there["reference forwards"], here["reference forwards"]) == (1, 2)


@pytest.mark.long
def test_every_option_runs_as_on_the_cpu(tmp_path):
    everything = in_own_process(tmp_path, "all")
    names = [name for name in everything if name != "mistakes"]
    assert len(names) > 20
    for name in names:
        assert_same_run(everything, name)
