"""Models and comparisons to TRL and back, where TRL is installed."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not (BENCHMARKS / "exchange_with_trl.py").exists():
    pytest.skip("needs a checkout, not an installed package", allow_module_level=True)
pytest.importorskip("trl", minversion="1.16", reason="exchanges models with TRL where it is installed")
sys.path.insert(0, str(BENCHMARKS))

import exchange_with_trl  # noqa: E402


@pytest.mark.long
def test_every_exchange_agrees_and_our_commands_read_what_trl_saved(tmp_path, capsys):
    exchange_with_trl.main(["--out", str(tmp_path / "exchange"), "--pairs", "16"])
    rows = capsys.readouterr().out.splitlines()
    for name, exchanges in (("sft", 6), ("dpo", 6), ("reward-model", 4)):
        assert sum(row.startswith(f"| {name} |") for row in rows) == exchanges
