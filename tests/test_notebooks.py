"""Both notebooks run top to bottom on the embedded model, and are notebooks: text, cells, no logic."""

import ast
import re
import runpy
from pathlib import Path

import pytest
from matplotlib.figure import Figure

NOTEBOOKS = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"


@pytest.mark.parametrize("name", ["energy_landscape", "lemmas"])
def test_a_notebook_runs_and_holds_no_logic(name, capsys):
    path = NOTEBOOKS / f"{name}.py"
    text = path.read_text()
    cells = re.split(r"^# %%", text, flags=re.M)[1:]
    assert len(cells) >= 10 and sum(cell.startswith(" [markdown]") for cell in cells) >= 4
    assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.While)]
    last = [ast.parse(cell).body[-1] for cell in cells if not cell.startswith(" [markdown]")]
    values = runpy.run_path(str(path))
    assert len(values["recorder"].recording) > 0 and "nan" not in capsys.readouterr().out
    shown = [
        eval(ast.unparse(node.value), values)
        for node in last
        if isinstance(node, ast.Expr) and "print" not in ast.unparse(node)
    ]  # noqa: E501
    assert len(shown) >= 2 and all(isinstance(figure, Figure) for figure in shown)
