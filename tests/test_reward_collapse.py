"""The example of reward collapse on a few prompts: it goes on where it was interrupted; its theory is the optimum."""

import json

import pytest
import reward_collapse

from tokenmdp.runs.directory import RunError


def test_the_optimum_of_x_ties_both_halves():
    assert reward_collapse.optimum("x", 4) == pytest.approx([1, 1, 0, 0], abs=1e-3)
    assert reward_collapse.distance({"closed": [1, 1, 0, 0], "open": [1, 0.5, 0.5, 0]}) == 0.25


@pytest.mark.long
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_collapse, "HELD_OUT", 4)
    monkeypatch.setattr(reward_collapse, "EVERY", 1)

    def run(name):
        reward_collapse.main(["--out", str(tmp_path / name), "--prompts", "4", "--responses", "3", "--epochs", "2"])
        return json.loads((tmp_path / name / "numbers.json").read_text())

    def stop(numbers):
        raise KeyboardInterrupt

    whole = run("whole")
    assert [[one["epoch"] for one in result["W1"]] for result in whole.values()] == [[1, 2], [3, 4]]
    assert (tmp_path / "whole" / "collapse.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(reward_collapse, "show", stop)  # after the model was saved
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    assert run("parts") == whole
    with pytest.raises(
        RunError, match=r"other settings \(epochs is 2, asked 18; prompts is 4, asked 6; .*choose another"
    ):
        reward_collapse.main(["--out", str(tmp_path / "whole"), "--prompts", "6"])
