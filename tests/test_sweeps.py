"""Sweeps: every job is tried, what failed is said and coded, the same command resumes; the overview of all
runs."""

import csv
import errno
import io
import json
import re

import pytest
from helpers import one_figure, script

from segresearch import cli, sample_images
from segresearch.config import conf_dir
from segresearch.config.build import refuse_foreign
from segresearch.errors import CheckpointError, ConfigError
from segresearch.evaluation import evaluate as run
from segresearch.evaluation.compare_runs import overview

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")
CONF = conf_dir()
EXPERIMENTS = CONF.parent / "experiments"


def failing(faults):
    """A command that notes the steps it was called with and fails for some of them."""
    seen = []

    @cli.command("generate")
    def main(config):
        seen.append(config.steps)
        if config.steps in faults:
            raise faults[config.steps]

    return main, seen


def test_a_sweep_goes_on_past_jobs_that_fail_and_its_code_says_so(call):
    main, seen = failing({2: ConfigError("steps: 2 is odd"), 3: MemoryError("none left")})
    code, said = call(main, "-m", "steps=1,2,3,4", "seeds=5")
    lines = said.err.splitlines()
    assert code == 4 and seen == [1, 2, 3, 4] and len(lines) == 3 and all(s.startswith("error: ") for s in lines)
    assert lines[0] == "error: job 2 (steps=2): steps: 2 is odd"  # what is of this job
    assert "out of memory: none left" in lines[1]
    assert lines[2].startswith("error: 2 of 4 jobs failed (steps=2; steps=3); the same command makes")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (CheckpointError("no"), 3),
        (cli.Ended(4, "no"), 4),
        (MemoryError(), 5),
        (OSError(28, "No space left on device"), 5),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "runs"), 5),
        (OSError(30, "Read-only file system", "runs"), 5),
        (OSError(errno.EFBIG, "File too large", "runs"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 5),
        (PermissionError(errno.EPERM, "Operation not permitted", "runs"), 5),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 5),
        (FileNotFoundError(2, "No such file", "x"), 2),
    ],
)
def test_exit_codes_of_one_run_and_of_a_sweep_that_fails_whole(error, code, call):
    main, _ = failing({1: error, 2: error})
    ended, said = call(main, "steps=1")
    assert ended == code and said.err.count("\n") == 1
    ended, said = call(main, "-m", "steps=1,2")
    assert ended == code and said.err.count("\n") == 3 and "2 of 2 jobs failed" in said.err


def test_a_defect_in_one_job_keeps_its_traceback_and_the_others_run(call):
    main, seen = failing({1: ZeroDivisionError("oh")})
    code, said = call(main, "-m", "steps=1,2")
    assert code == 4 and seen == [1, 2] and "Traceback" in said.err and "ZeroDivisionError: oh" in said.err
    assert call(main, "-m", "steps=1")[0] == 1
    main, _ = failing({})
    assert call(main, "-m", "steps=1,2")[0] == 0


def test_an_interrupt_ends_the_whole_sweep(call):
    main, seen = failing({2: KeyboardInterrupt()})
    code, _ = call(main, "-m", "steps=1,2,3")
    assert code == 130 and seen == [1, 2]


@pytest.mark.slow
def test_a_sweep_of_evaluations_its_resume_and_its_overview(call, folder, model, monkeypatch, tmp_path):
    monkeypatch.setattr(run.outputs.plots, "draw", one_figure)
    load, loaded = run.image_metrics, []
    monkeypatch.setattr(run, "image_metrics", lambda *a: loaded[0] if loaded else loaded.append(load(*a)) or loaded[0])
    monkeypatch.setattr(run, "configured_model", lambda *_: model)
    scale = "guidance.terms.seg.scale"
    sweep = (
        "-m", f"model.path={folder}", "size=[64,64]", "images=2", "distances=[]", "steps=1,2",
        f"{scale}=0.5,1", "force=true",
        "reference=scene:100000-100005", "n_bootstrap=2", "n_subsets=2", "device=cpu", "wandb.mode=off", "shard=2",
        "batch_size=2", "n_examples=2",
    )  # fmt: skip
    sampled, made = sample_images.sample, []

    def counted(*arguments, **keywords):
        made.append("once")
        found = sampled(*arguments, **keywords)
        return found * float("nan") if len(made) == 5 else found  # pictures of the third job

    monkeypatch.setattr(sample_images, "sample", counted)
    code, said = call(script("evaluate").main, *sweep)
    assert code == 4 and said.out.count("page: ") == 3 and said.err.count("error: job 3 ") == 1, said
    monkeypatch.setattr(sample_images, "sample", lambda *a, **k: made.append("again") or sampled(*a, **k))
    code, said = call(script("evaluate").main, *sweep)
    assert code == 0 and said.out.count("page: ") == 4 and 0 < made.count("again") <= 2

    code, said = call(script("overview").main, "evaluate")
    assert code == 0 and said.err == ""
    found = overview("evaluate", tmp_path / "runs")
    assert set(found.differing) == {scale, "steps"}
    assert len(found.runs) == 4 and not found.unfinished and not found.notes()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "runs/evaluate/overview.csv").read_text())))
    assert {(row[scale], row["steps"]) for row in rows} == {(s, n) for s in ("0.5", "1.0") for n in "12"}
    page = (tmp_path / "runs/evaluate/overview.html").read_text()
    assert page.count("<tr") == 9 and len(set(re.findall(r'href="(\w+)/index.html"', page))) == 4 and "http" not in page
    for name in set(re.findall(r'href="(\w+)/index.html"', page)):
        assert (tmp_path / "runs/evaluate" / name / "index.html").is_file()
    assert f"| run | {' | '.join(found.differing)} | method |" in (tmp_path / "runs/evaluate/overview.md").read_text()
    assert said.out.startswith("| run |")


def values(method: str, n: int, distance: float | None) -> list[dict]:
    """The frame of one method, as results.json has it."""
    return [{"method": method, "metric": "n", "value": n, "error": None},
            {"method": method, "metric": "fd-mini", "value": distance, "error": None}]  # fmt: skip


def test_the_overview_of_runs_that_lack_results_and_of_none(tmp_path, call):
    for i, text in enumerate((json.dumps({"metrics": values("a", 3, 1.5)}), "{", None)):
        place = tmp_path / "runs" / "mine" / str(i)
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(f"steps: {i}\nprompts: [{', '.join(['a red cube'] * 9)}]\nout: {i}\n")
        if text is not None:
            (place / "results.json").write_text(text)
    found = overview("mine", tmp_path / "runs")
    assert found.unfinished == ("1", "2") and found.differing == () and "Without results yet: 1, 2." in found.markdown()
    (tmp_path / "runs/mine/1/results.json").write_text(json.dumps({"metrics": values("a<b", 4, None)}))
    found = overview("mine", tmp_path / "runs")
    assert found.differing == ("steps",) and "equal N" in found.notes()[0] and "a&lt;b" in found.page()
    for name, words in (("min", "did you mean mine?"), ("nothing", "no runs of it in runs (there are mine)")):
        code, said = call(script("overview").main, name)
        assert code == 2 and words in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "guidance=pag,none1"], "guidance: no 'none1'; did you mean none"),
        (["-m", "stesp=1,2"], "stesp: no such setting; did you mean steps?"),
        (["draws=3"], "draws: now called n_bootstrap"),
        (["judges=mini"], "judges: now called metrics"),
        (["model.strengths.seg=2"], "model.strengths: now called scales"),
        (["weights.caption=x"], "weights.caption: now called text_alignment"),
        (["guidance.terms.seg.window=[0,1]"], "guidance.terms.seg.window: now called interval"),
        (["compare=[{guidance: seg, terms: {seg: {window: [0, 1]}}}]"], "seg.window: now called interval"),
        (["experiment=windows"], "experiment: 'windows' is now called intervals"),
        (["guidance=custom", "guidance.terms.custom.perturbation.target=???"], "perturbation.target: missing"),
    ],
)
def test_what_hydra_cannot_do_is_one_line_before_any_job(arguments, words, call):
    code, said = call(script("evaluate").main, *arguments)
    assert code == 2 and said.out == "" and words in said.err, said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1


def test_no_config_names_a_target_outside_the_project():
    for path in sorted(CONF.rglob("*.yaml")):
        text = path.read_text()
        assert "_target_" not in text, path
        for target in re.findall(r"\bkind: custom, target: *([^\s,}]+)", text):
            assert target.strip("'") == "???" or target.startswith("segresearch."), path


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "torch.load", "builtins.eval", "hydra.utils.call",
                                    "segresearch.evaluation.plots.Figure"])
def test_settings_of_unknown_origin_name_no_function_of_others(target):
    with pytest.raises(ConfigError, match="not a part of segresearch or a file of your own"):
        refuse_foreign(target, "a record")
