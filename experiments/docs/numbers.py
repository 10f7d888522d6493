"""The measured numbers of the docs: measured again, and written to the pages or compared with them.

    python -m experiments.docs.numbers --check             # make docs-numbers: exits 1 and lists what differs
    python -m experiments.docs.numbers                     # writes the pages
    python -m experiments.docs.numbers --only theory

Numbers stand between marks (`experiments/docs/marks.py`). docs/numbers.md says which page has its numbers from where.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.docs import counted, marks, plan, theory
from segresearch import runs
from segresearch.checkpoints.resolve import MINI

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
WEIGHTS = "weights"  # the mark of a page whose numbers depend on mini


class Part(NamedTuple):
    """Numbers of one page. measure: texts by the names of their marks."""

    page: str
    measure: Callable[[], dict[str, str]]


def weights() -> dict[str, str]:
    return {WEIGHTS: f"`{runs.fingerprint(MINI)}`"}


def of_theory() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as out:
        script = ROOT / "experiments" / "analyze.py"
        subprocess.run([sys.executable, script, "model=mini", f"out={out}"], cwd=ROOT, check=True)
        (folder,) = Path(out, "analyze").iterdir()
        return {**weights(), **theory.analysis(folder), **theory.notebook(ROOT)}


PARTS = {
    "theory": Part("theory.md", of_theory),
    "cost": Part("guidance.md", lambda: counted.cost(ROOT)),
    "plan": Part("evaluation.md", lambda: plan.plan((DOCS / "guidance.md").read_text(encoding="utf-8"))),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    wrong = 0
    for name in options.only:
        page = DOCS / PARTS[name].page
        measured = PARTS[name].measure()
        text = page.read_text(encoding="utf-8")
        differing = marks.differences(text, measured)
        for difference in differing:
            print(f"{page.name}: {difference}", file=sys.stderr)
        print(f"{name}: {len(measured)} texts of {page.name}, {len(differing)} differ", flush=True)
        if not options.check:
            runs.write(page, marks.written(text, measured))
        wrong += len(differing)
    if wrong and options.check:
        print("python -m experiments.docs.numbers writes what was measured; then read the text", file=sys.stderr)
    return int(bool(wrong and options.check))


if __name__ == "__main__":
    sys.exit(main())
