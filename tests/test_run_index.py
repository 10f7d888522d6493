"""The index of runs in words, and the link to the latest."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from segresearch import runs
from segresearch.config import GenerateConfig, typed
from segresearch.config.compose import written_config
from segresearch.generate import OF_A_CALL
from segresearch.run_index import caption, lines, note

GIVEN = {
    "model": {"name": "tiny", "path": "x"}, "sampler": {"name": "euler"}, "schedule": {"name": "leading"},
    "compare": [{}, {"terms": {"cfg": {"kind": "cfg", "weight": 2}}, "sag": {"scale": 1}}],
    "guidance": {"label": "SEG <b>"}, "prompts": ["a red ring"], "steps": 7,
}  # fmt: skip


def run(out, name, folder, opened="grid.png", age=0, text=None):
    place = out / name / folder
    place.mkdir(parents=True)
    config = written_config(typed(GenerateConfig, GIVEN), OF_A_CALL) if text is None else text
    (place / "config.yaml").write_text(config)
    os.utime(place / "config.yaml", (1e9 - age, 1e9 - age))
    (place / opened).write_text("")
    return place


def test_runs_are_listed_in_words_the_newest_first_and_odd_folders_are_left_out(tmp_path):
    old, new = run(tmp_path, "demo", "1" * 12, age=100), run(tmp_path, "shots", "2" * 12, opened="index.html")
    for i, text in enumerate(("5", "[", "a: " * 3, "{model: 5, sampler: 6}", "{" * 3000, "panels: 5")):
        run(tmp_path, "odd", str(i), text=text)
    found = lines(tmp_path)
    assert [(line.name, line.opened) for line in found] == [("shots", "index.html"), ("demo", "grid.png")]
    assert found[0].words == "no guidance, cfg 2 + sag 1, SEG <b>; “a red ring”; tiny, euler, 7 steps"
    note(old, tmp_path)
    note(new, tmp_path)
    assert (tmp_path / "latest").resolve() == new.resolve() and (tmp_path / "latest").is_symlink()
    page = (tmp_path / "index.html").read_text()
    assert 'href="shots/222222222222/index.html"' in page and "SEG &lt;b&gt;" in page
    assert page.index("shots") < page.index("demo/")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    note(new, "/proc/nowhere")  # what cannot be written is left


def test_files_of_the_users_own_are_left_alone(tmp_path):
    new = run(tmp_path, "demo", "1" * 12)
    (tmp_path / "index.html").write_text("mine")
    (tmp_path / "latest").write_text("mine")
    note(new, tmp_path)
    assert (tmp_path / "index.html").read_text() == (tmp_path / "latest").read_text() == "mine"
    (tmp_path / "latest").unlink()
    (tmp_path / "index.html").unlink()
    note(new, tmp_path)
    assert "1 run, the newest first" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "latest").resolve() == new.resolve()


def test_captions_of_panels_and_of_many_methods():
    config = yaml.safe_load(written_config(typed(GenerateConfig, GIVEN), OF_A_CALL))
    config["panels"] = [{"compare": [{"label": f"m{i}"} for i in range(9)]}]
    config["prompts"] = ["a", "b"]
    assert caption(config).endswith("m3 and 6 more; 2 prompts; tiny, euler, 7 steps")


def test_the_same_run_is_waited_for_and_ranges_are_shared(tmp_path):
    held = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "held\n"
    with runs.locked(tmp_path, "demo/1", wait=False) as mine, runs.locked(tmp_path, "demo/2", wait=False) as other:
        assert not mine and other
    held.kill()
    with runs.locked(tmp_path, "demo/1") as mine:  # a lock ends with its process
        assert mine
    held.wait()


HOLDING = f"""
import sys, time
sys.path.insert(0, {str(Path(runs.__file__).resolve().parents[1])!r})
from segresearch import runs
with runs.locked(sys.argv[1], "demo/1"):
    print("held", flush=True)
    time.sleep(60)
"""
