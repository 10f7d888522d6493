"""Which errors end a script with one line, and which show their traceback."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import segresearch
from segresearch import errors
from segresearch.cli import explained

ROOT = Path(segresearch.__file__).parent


@pytest.mark.parametrize(
    "error, code",
    [
        (errors.InputError("blur sigma must be >= 0"), 2),
        (errors.ConfigError("steps: 0 is out of range"), 2),
        (errors.PackageError("k-diffusion is not installed"), 2),
        (errors.CheckpointError("model.safetensors is truncated"), 3),
        (errors.Ended(4, "2 of 3 shards are missing"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
        (ValueError("invalid literal for int() with base 10: 'x1'"), None),
        (ImportError("cannot import name 'blur'"), None),
        (TypeError("unsupported operand"), None),
        (RuntimeError("shapes do not match"), None),
        (KeyError("cond"), None),
    ],
)
def test_only_errors_of_a_user_have_a_code(error, code):
    assert explained(error)[0] == code


def test_the_package_raises_its_own_errors():
    """A bare ValueError would be told from a defect by nobody."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in ("ValueError", "ImportError", "Exception")
    ]
    assert not bare


DEFECT = """
def broken(q, k, v, site, attend):
    return attend(q, k, v * int("x1"), site)


def refused(q, k, v, site, attend):
    from segresearch.errors import InputError
    raise InputError("this method needs 2 heads")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, code, last", [
    ("broken", 1, "ValueError: invalid literal for int() with base 10: 'x1'"),
    ("refused", 2, "error: this method needs 2 heads"),
])  # fmt: skip
def test_a_defect_shows_its_traceback_and_a_refusal_one_line(tmp_path, name, code, last):
    (tmp_path / "own_method.py").write_text(DEFECT)
    given = [f"out={tmp_path}", "steps=1", "seeds=0", "guidance=custom",
             f"guidance.terms.custom.perturbation.target=own_method.{name}"]  # fmt: skip
    script = ROOT.parent / "experiments" / "generate.py"
    done = subprocess.run([sys.executable, str(script), *given], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT.parent}:{tmp_path}"})  # fmt: skip
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and lines[-1] == last
    assert ("Traceback" in done.stderr) == (name == "broken")
    assert name == "broken" or len(lines) == 1


def test_a_line_is_short_whatever_is_in_it():
    for text in ("x" * 9999, "a b " * 9999, "\n" * 9 + "y" * 500):
        line = explained(errors.InputError(f"label: {text!r} cannot be; give another"))[1]
        assert line.startswith("label: ") and line.endswith("give another") and len(line) <= 1010 and "..." in line
