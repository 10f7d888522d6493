"""benchmarks/gpu.sh without a GPU: time limits, tables, sections of RESULTS.md."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from cuda_plan import Part, plan, run_part, warm_up  # noqa: E402
from cuda_tables import tables  # noqa: E402
from harness import bounded, with_sections, with_start  # noqa: E402


def test_a_process_ends_at_its_limit_with_the_reason(tmp_path):
    log = tmp_path / "log"
    start = time.monotonic()
    assert bounded([sys.executable, "-c", "import time; time.sleep(60)"], 0.3, log) == "stopped after 0 s"
    assert time.monotonic() - start < 20
    code = "import sys; print('some'); sys.exit('no such kernel')"
    assert bounded([sys.executable, "-c", code], 20, log) == "ended with 1: no such kernel"
    assert bounded([sys.executable, "-c", "import os; print(os.environ['A'])"], 20, log, A="7") == ""
    assert log.read_text().endswith("7\n")


def test_a_part_that_fails_is_recorded(tmp_path):
    done = run_part(Part("odd, one", "no_such_part", 60, {"device": "cpu"}), tmp_path, 60)
    assert done["results"] is None and "KeyError: 'no_such_part'" in done["failed"]


def test_compiled_parts_are_warmed_up():
    names = {part.name for part in plan("cuda", False)}
    warmed = [part for part in warm_up("cuda", False) if part.arguments["ways"]]
    assert {f"warm-up: {n}" for n in names if n.startswith("compiled")} == {part.name for part in warmed}
    assert all(part.arguments["rounds"] == 0 and part.arguments["batch"] in (1, 8) for part in warmed)
    assert json.dumps([part.arguments for part in plan("cuda", False)])


STEPS = {
    "px": 1024, "batch": 1, "dtype": "bfloat16", "first": {}, "failed": {},
    "flops": {"unguided": 6e12, "CFG+SEG": 16e12},
    "times": {"unguided, eager": [0.04] * 3, "unguided, graph": [0.0125] * 3, "CFG+SEG, graph": [0.04] * 3,
              "diffusers UNet, compiled": [0.02] * 3},
}  # fmt: skip


def test_goals_have_verdicts_and_ratios_need_the_ceiling():
    parts = {"ceiling": {"results": {"bfloat16": 8e14}}, "steps, batch 1": {"results": STEPS, "failed": ""}}
    text = "\n".join(tables(parts))
    assert "12.50 ms, graph" in text and "1.20 × (40.00 ms, graph)" in text and "1.60 ×" in text
    assert text.count("reached") + text.count("missed") == 3
    assert "CFG+SEG / unguided, graph" in text  # 6e12 / 0.0125 is 60 % of the ceiling
    parts["ceiling"] = {"results": {"bfloat16": 16e14}}
    assert "CFG+SEG / unguided" not in "\n".join(tables(parts))


def test_a_stopped_part_shows_its_results_until_then():
    stopped = {"results": {**STEPS, "times": {"unguided, eager": [0.04]}}, "failed": "stopped after 90 s"}
    failed = {"results": None, "failed": "ended with 1: no memory"}
    text = "\n".join(tables({"steps, batch 8": stopped, "trials": failed}))
    assert "40.00" in text and "steps, batch 8 stopped after 90 s" in text and "trials ended with 1: no memory" in text


OLD = "# Measured\n\ntable\n\n# Measured, more\n\n## Part\n\n# On a GPU: A, commit 1\n\nold\n\n# Scenes\n\nhere\n"


@pytest.mark.parametrize("text", ["", "# Measured\n\ntable\n", OLD])
def test_sections_of_gpus_stay_and_are_replaced_by_their_own(text):
    one = with_sections(text, "# On a GPU: A, commit 1\n\nnew")
    assert one.count("# On a GPU: A, commit 1\n\nnew\n") == 1 and "old" not in one
    assert one.count("here") == text.count("here") and one.count("table") == text.count("table")
    two = with_sections(one, "# On a GPU: B, commit 1\n\nother")
    assert two.startswith(one.rstrip()) and two.endswith("other\n")
    again = with_start(two, "# Measured\n\nanew")
    assert again.startswith("# Measured\n\nanew\n\n# On a GPU: A") and again.endswith("other\n")
    assert again.count("# Measured") == 1 and again.count("here") == text.count("here")
