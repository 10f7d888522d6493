"""evaluate.py and analyze.py on the device, each in a process of its own."""

import json

from gpu_models import DEVICE, few, gpu, note, run_of, script

pytestmark = gpu


def test_table1(tmp_path):
    """`experiment=table1 preset=quick images=100`, whole: features of 10,000 real pictures, table, figures, page.

    100 pictures are fewer than the features have dimensions, hence `force`.
    """
    small = few("images=12", "shard=6", "batch_size=6", "steps=2", "reference=scene:100000-100149", "n_bootstrap=10",
                "n_subsets=2")  # fmt: skip
    given = ("experiment=table1", "preset=quick", "images=100", "force=true", "wandb.mode=off", f"device={DEVICE}")
    script("evaluate", tmp_path, *given, *small)
    folder = run_of(tmp_path, "table1")
    rows = json.loads((folder / "results.json").read_text())["metrics"]
    assert (folder / "index.html").is_file() and (folder / "table.md").is_file()
    assert len({row["method"] for row in rows}) == 5
    note("table1", (folder / "table.md").read_text()[:2000])


def test_analyze(tmp_path):
    small = few("measured_steps=[0]", "steps=2", "where=mid", "seeds=0", 'prompts=[""]')
    script("analyze", tmp_path, f"device={DEVICE}", *small)
    folder = run_of(tmp_path, "analyze")
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) > 10 and (folder / "verdicts.csv").is_file() and (folder / "index.html").is_file()
