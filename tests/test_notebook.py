"""The teaching notebook runs from top to bottom, and its outputs still agree with its text."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

pytest.importorskip("captum", reason="needs the attribution extra: pip install 'tokenmdp[attribution]'")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "credit_laboratory.ipynb"
SMALLER = {'"budget": 512': '"budget": 34', "linspace(0, 1, 11)": "linspace(0, 1, 3)"}


@pytest.fixture
def code():
    """The cells of Python, and what the committed file says of their run."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_and_its_text_holds(code, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.close("all")
    names, drawn = {"__name__": "__main__"}, 0
    cells = ["".join(cell["source"]) for cell in code]
    assert all(any(old in cell for cell in cells) for old in SMALLER)
    for cell in cells:
        for old, new in SMALLER.items():
            cell = cell.replace(old, new)
        exec(compile(cell, "<notebook>", "exec"), names)
        drawn += len(plt.get_fignums())  # what a notebook shows below the cell
        plt.close("all")
    assert drawn == 2
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    cosines = {line[0]: [float(number) for number in line[1:]] for line in lines if len(line) == 4 and "." in line[1]}
    assert cosines.keys() == {"sparse", "red", "uniform", "attention", "abc-d", "abc-d2"}
    for name, (full_return, reward_to_go, worst) in cosines.items():
        assert full_return == 1.0
        assert (reward_to_go, worst) == (1.0, 1.0) if name in ("sparse", "red") else worst < 0.9
    assert "red        largest change of Q 2.718, of the advantage 0.000" in printed
    assert "brilliant  reward +3.0" in printed


def test_the_committed_outputs_are_those_of_a_run(code):
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
