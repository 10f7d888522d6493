"""Both notebooks run top to bottom on the embedded model."""

import runpy
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"


@pytest.mark.parametrize("name", ["energy_landscape", "lemmas"])
def test_a_notebook_runs(name, capsys):
    values = runpy.run_path(str(NOTEBOOKS / f"{name}.py"))
    assert len(values["recorder"].recording) > 0
    printed = capsys.readouterr().out
    assert "sigma_t" in printed and "nan" not in printed
