"""The teaching notebook runs from top to bottom, and its outputs still agree with its text."""

from pathlib import Path

import pytest

nbformat, nbclient, *_ = (
    pytest.importorskip(name, reason=f"{name} comes with the test extra: pip install 'tokenmdp[test]'")
    for name in ("nbformat", "nbclient", "ipykernel", "captum")
)

NOTEBOOK = Path(__file__).parents[1] / "examples" / "credit_laboratory.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_its_text_holds(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    lines = [line.split() for line in printed.splitlines()]
    cosines = {line[0]: [float(number) for number in line[1:]] for line in lines if len(line) == 4 and "." in line[1]}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert cosines.keys() == {"sparse", "red", "uniform", "attention", "abc-d", "abc-d2"}
    for name, (full_return, reward_to_go, worst) in cosines.items():
        assert full_return == 1.0
        assert (reward_to_go, worst) == (1.0, 1.0) if name in ("sparse", "red") else worst < 0.9
    assert "red        largest change of Q 2.718, of the advantage 0.000" in printed
    assert "brilliant  reward +3.0" in printed


def test_the_committed_outputs_are_those_of_a_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
