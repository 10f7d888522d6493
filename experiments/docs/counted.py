"""The table of costs of docs/guidance.md."""

import subprocess
import sys
from pathlib import Path


def cost(root: Path) -> dict[str, str]:
    """The table that `python benchmarks/methods.py` prints."""
    script = root / "benchmarks" / "methods.py"
    printed = subprocess.run([sys.executable, script], cwd=root, check=True, capture_output=True, text=True).stdout
    head = ["| method | rows, and the site where they fork | operations over a plain step |", "| --- | --- | ---: |"]
    return {"cost": "\n".join([*head, *(line for line in printed.splitlines() if line.startswith("| `"))])}
