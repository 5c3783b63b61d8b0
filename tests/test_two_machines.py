"""One run over two machines: two network namespaces that see each other through one cable."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long
ADDRESS = "10.77.0."
RUN = ["train", "--preset", "smoke", "--updates", "4", "--device", "cpu", "--dtype", "float32", "--no-reexec"]


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines():
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"tokenmdp{os.getpid()}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
        for place, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESS}{place + 1}/24", "dev", f"cable{place}")
            for device in (f"cable{place}", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_learn_what_one_learns(machines, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    train = ["-m", "tokenmdp", *RUN, "--out", "run"]
    launch += ["--master-addr", f"{ADDRESS}1", "--master-port", "29577"]
    running = []
    for place, name in enumerate(machines):
        (tmp_path / name).mkdir()
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *launch, "--node-rank", str(place), *train],
                cwd=tmp_path / name, env=environment | {"GLOO_SOCKET_IFNAME": f"cable{place}"},
                stdout=(tmp_path / f"{name}.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
            )
        )  # fmt: skip
    try:
        for one in running:
            one.wait(timeout=300)
    finally:
        for one in running:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)  # the launcher and what it has started
    outputs = [(tmp_path / f"{name}.log").read_text() for name in machines]
    assert [one.returncode for one in running] == [0, 0], "\n".join(outputs)
    assert "2 processes with 16 episodes each" in outputs[0]
    assert not (tmp_path / machines[1] / "run").exists(), "the second machine writes nothing"
    alone = [sys.executable, "-m", "tokenmdp", *RUN, "--out", str(tmp_path / "alone")]
    subprocess.run(alone, check=True, env=environment, capture_output=True)
    read = [(path / "metrics.jsonl").read_text() for path in (tmp_path / machines[0] / "run", tmp_path / "alone")]
    for ours, theirs in zip(*(map(json.loads, text.splitlines()) for text in read), strict=True):
        for name in ("score_mean", "kl", "entropy", "explained_variance"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-3), name
