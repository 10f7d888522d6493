"""The energy bench end to end on a tiny random model: numbers against dense ones, identity, page, slips, mirror."""

import csv
import dataclasses
import itertools
import math
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import composed, contents, script
from omegaconf import OmegaConf
from PIL import Image

from segresearch import cli
from segresearch.analysis import measurements
from segresearch.analysis.analyze import analyze, shares
from segresearch.analysis.measurements import measure, short
from segresearch.analysis.recorder import Entry, Recording
from segresearch.config import AnalyzeConfig, conf_dir, settings, typed
from segresearch.errors import ConfigError
from segresearch.guidance import blur_matrix
from segresearch.pages import to_csv

SCRIPT = conf_dir().parent / "experiments" / "analyze.py"
SEG = {"kind": "perturbed", "scale": 1, "perturbation": {"kind": "seg", "sigma": 1}}


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    given = {
        "model": {"name": "tiny", "path": str(folder)},
        "sampler": {"name": "euler"},
        "schedule": {"name": "leading"},
        "prompts": ["", "red"],
        "seeds": 0,
        "steps": 3,
        "measured_steps": [0, -1],
        "size": [16, 24],
        "where": ["mid", "up.0.0"],
        "blur": {"sigmas": [1, "inf"], "boundaries": ["reflect", "exact"]},
        "keep": True,
        "device": "cpu",
        "out": str(tmp_path_factory.mktemp("runs")),
    }
    return typed(AnalyzeConfig, given)


@pytest.fixture(scope="module")
def run(config, model):
    return analyze(config, model)


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, which take most of the time."""
    monkeypatch.setattr("segresearch.analysis.energy_plots.draw", lambda *_: {})


def rows_of(run) -> list[dict[str, str]]:
    return list(csv.DictReader((run.folder / "table.csv").open(encoding="utf-8")))


def test_the_table_holds_what_dense_logits_say(run):
    """Each number of one head and blur from the logits themselves, in fp64."""
    rows, recording = rows_of(run), Recording.open(run.folder / "recording")
    site = recording.sites[0]
    assert {r["grid"] for r in rows} == {"2x3", "4x6"} or {r["grid"] for r in rows} == {"2x3"}
    heads = {(r["site"], r["head"]) for r in rows}
    assert len(rows) == len(heads) * 2 * 2 * 2  # steps, sigmas, boundaries
    (entry,) = recording.select(site, step=2)
    q, k = entry.q[:, 1].double(), entry.k[:, 1].double()
    a = (k @ q.mT / math.sqrt(q.shape[-1])).flatten(0, 1)  # (image·key, query)
    h, w = entry.grid
    n = h * w
    for boundary in ("reflect", "exact"):
        matrix = torch.kron(blur_matrix(h, 1.0, boundary), blur_matrix(w, 1.0, boundary))
        smooth = a @ matrix.T
        (row,) = [
            r for r in rows
            if r["site"] == site and r["head"] == "1" and r["step"] == "2" and r["boundary"] == boundary
            and r["blur_sigma"] == "1"
        ]  # fmt: skip
        variance, after = a.var(1, correction=0), smooth.var(1, correction=0)
        rise = (smooth.log_softmax(1) - a.log_softmax(1)).sum(1)  # of log Π ξ
        margins = -rise - matrix.diagonal().log().sum(), -rise - 2 * torch.linalg.slogdet(matrix).logabsdet
        expected = {
            "spread": variance.mean().sqrt(),
            "mean_shift": ((smooth.mean(1) - a.mean(1)).abs() / variance.sqrt()).mean(),
            "variance_ratio": after.mean() / variance.mean(),
            "lse_fall": (a.logsumexp(1) - smooth.logsumexp(1)).mean(),
            "taylor_fall": (variance - after).mean() / 2,
            "log_product_after": smooth.log_softmax(1).sum(1).mean(),
            "eq20_margin": margins[0].mean() / n,
            "chain_margin": margins[1].mean() / n,
            "rank_share": torch.special.entr(a.softmax(1)).sum(1).exp().mean() / n,
            "eq20_holds": (margins[0] > 0).double().mean(),
            "chain_holds": (margins[1] > 0).double().mean(),
            "variance_holds": (after <= variance).double().mean(),
        }
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(float(value), rel=2e-3, abs=2e-5), (boundary, name)


def test_what_must_hold_holds_and_the_worst_column_is_named(run):
    lines = list(csv.DictReader((run.folder / "verdicts.csv").open(encoding="utf-8")))
    shares = {(v["claim"], v["axis"], v["boundary"], v["blur_sigma"]): float(v["share_holding"]) for v in lines}
    for axis in ("queries", "keys"):
        for claim in ("mean_kept", "variance_falls", "lse_falls"):
            assert shares[claim, axis, "exact", "1"] == 1
        assert shares["product_falls", axis, "exact", "1"] == 0 < shares["theorem_chain", axis, "exact", "inf"] == 1
    assert shares["mean_kept", "queries", "reflect", "1"] < 1 == shares["mean_kept_weighted", "queries", "reflect", "1"]
    assert shares["blur_commutes", "queries", "reflect", "1"] == 1
    recording = Recording.open(run.folder / "recording")
    _, summaries = measure(recording, [1.0], ["reflect"], recording.sites)
    claim = next(c for c in summaries if c.claim == "mean_kept" and c.axis == "queries")
    (entry,) = [e for e in recording.select(step=claim.worst["step"]) if short(e.site) == claim.worst["site"]]
    row = [image["prompt"] for image in entry.images].index(claim.worst["prompt"])
    q, k = entry.q[row, claim.worst["head"]].double(), entry.k[row, claim.worst["head"], claim.worst["key"]].double()
    a = q @ k / math.sqrt(len(k))
    matrix = torch.kron(*(blur_matrix(side, 1.0) for side in entry.grid))
    assert claim.smallest == pytest.approx(-float(((matrix @ a).mean() - a.mean()).abs()), rel=1e-3)


def test_the_page_stands_alone_and_figures_are_pictures(run):
    page = run.page.read_text(encoding="utf-8")
    names = sorted(path.stem for path in (run.folder / "figures").iterdir())
    assert names == ["attention", "energy", "field", "layers_exact", "layers_reflect", "limits", "regime_exact",
                     "regime_reflect", "sigma"]  # fmt: skip
    assert page.count('src="data:image/png;base64,') == len(names) and not re.search(r'(src|href)="(?!data:)', page)
    text = re.sub(r'src="[^"]*"', "", page)
    assert "Theorem 3.1" in text and "eq. (22)" in text.lower() and not re.search(r"\bnan\b", text)
    for path in (run.folder / "figures").iterdir():
        image = np.asarray(Image.open(path).convert("L"))
        assert min(image.shape) > 300 and image.std() > 5


def test_a_pipe_is_told_what_begins_and_how_far_it_is(config, model, undrawn, tmp_path, capfd, monkeypatch):
    from segresearch import progress

    monkeypatch.setattr(progress, "SHORTEST", 0.0)
    analyze(dataclasses.replace(config, out=str(tmp_path)), model)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "sampling 2 images" and any(re.match(r"sampling: \d+% of 2 images, ", line) for line in lines)
    (begins,) = [line for line in lines if re.fullmatch(r"measuring \d+ attentions under 4 blurs", line)]
    assert any(re.match(r"measuring: \d+% of \d+ attentions, ", line) for line in lines[lines.index(begins) :])


@pytest.mark.parametrize("name", ["table.csv", "index.html", "files.json"])
def test_a_file_of_a_finished_run_that_changes_is_named_and_written_again(
    config, run, model, undrawn, tmp_path, capsys, name
):
    few = dataclasses.replace(config, out=str(tmp_path), prompts=("",), keep=False)
    first = analyze(few, model)
    before = contents(first.folder)
    (first.folder / name).write_text("")
    again = analyze(few, model)
    assert not again.reused and contents(first.folder) == before and analyze(few, model).reused
    assert f"{first.folder / name}: changed or missing; all is measured again" in capsys.readouterr().err
    (first.folder / "files.json").unlink()  # as a run of an earlier version
    assert analyze(few, model).reused


def test_twice_measures_nothing_twice_and_config_yaml_is_the_run(run, config, monkeypatch):
    monkeypatch.setattr("segresearch.analysis.analyze.configured_model", None)
    again = analyze(config)
    assert again.reused and again.folder == run.folder and "there already" in str(again)
    given = settings(OmegaConf.create((run.folder / "config.yaml").read_text(encoding="utf-8")), AnalyzeConfig)
    assert analyze(dataclasses.replace(given, out=config.out)).folder == run.folder


def test_numbers_do_not_depend_on_the_batch(run, config, model, undrawn, tmp_path):
    alone = analyze(dataclasses.replace(config, batch_size=1, keep=False, out=str(tmp_path)), model)
    assert alone.folder.name == run.folder.name and not (alone.folder / "recording").exists()
    for mine, theirs in zip(rows_of(run), rows_of(alone), strict=True):
        for name, value in mine.items():
            if name.startswith("eq") or not re.fullmatch(r"-?[0-9.e+-]+", value):
                continue
            assert float(value) == pytest.approx(float(theirs[name]), rel=0.02, abs=0.02), name


def test_a_perturbed_branch_is_measured_under_its_perturbation(config, model, undrawn, tmp_path):
    guidance = typed(
        type(config.guidance), {"terms": {"seg": {**SEG, "perturbation": {**SEG["perturbation"], "where": -1}}}}
    )
    changes = {"guidance": guidance, "branch": "cond~seg", "where": -1, "measured_steps": (0,), "out": str(tmp_path)}
    smooth = rows_of(analyze(dataclasses.replace(config, **changes), model))
    plain = rows_of(analyze(dataclasses.replace(config, **{**changes, "branch": "cond"}), model))
    spread = [np.mean([float(row["spread"]) for row in rows]) for rows in (smooth, plain)]
    assert spread[0] < 0.9 * spread[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"branch": "cond~seg"}, "no branch 'cond~seg' under this guidance; there are cond"),
        ({"where": "middle"}, "matches no self-attention site"),
        ({"heads": (7,)}, "no head 7"),
        ({"size": (15, 16)}, "size="),
        ({"measured_steps": (3,)}, "no step 3; 3 steps are 0 to 2"),
    ],
)
def test_what_the_model_cannot_do_is_one_line_and_leaves_nothing(changes, words, config, model, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        analyze(dataclasses.replace(config, out=str(tmp_path), **changes), model)
    code, line = cli.explained(caught.value)
    assert code == 2 and "\n" not in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and len(list(tmp_path.rglob("*"))) <= 1


def test_settings_compose_and_slips_are_said():
    composed_here = partial(composed, name="analyze", kind=AnalyzeConfig)
    config = composed_here()
    assert config.blur.sigmas[-1] == math.inf and config.prompts[0] == "" and config.wandb.mode == "off"
    assert composed_here("guidance=seg_cfg", "branch='cond~seg'", "model=sdxl", "where=[mid,up.0]").branch == "cond~seg"
    for override, words in (
        ("measured_steps=[25]", "measured_steps: there is no step 25"),
        ("measured_steps=[]", "measured_steps: empty"),
        ("blur.sigmas=[1,1]", "names one twice"),
        ("blur.boundaries=[reflct]", "did you mean reflect"),
        ("wandb.mode=onlin", "did you mean online"),
        ("seeds=a", "seed"),
    ):
        with pytest.raises(ConfigError, match=words):
            analyze(composed_here(override))


def test_the_script_is_quick_to_help_and_says_slips_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["analyze.py", "blr.sigmas=[1]"])
    with pytest.raises(SystemExit) as caught:
        script("analyze").main()
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == "" and "did you mean blur?" in said.err and said.err.count("\n") == 1
    light = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'matplotlib', 'wandb'} & set(sys.modules)))"
    )
    call = [sys.executable, "-c", light, str(SCRIPT), "--help"]
    ended = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.endswith("[]\n") and "blur" in ended.stdout and list(tmp_path.iterdir()) == []


def test_csv_writes_infinities_and_names():
    rows = [{"a": math.inf, "b": 0.1234567891, "c": "x, y", "d": None}]
    assert to_csv(rows, digits=7) == 'a,b,c,d\ninf,0.1234568,"x, y",\n' and "0.1234567891" in to_csv(rows)
    assert short("up_blocks.0.attentions.1.transformer_blocks.3.attn1") == "up.0.1.3"


def test_entries_of_one_shape_are_measured_together_to_the_same_numbers(monkeypatch):
    """Columns of other entries change no number beyond rounding; rows and claims stay in the recording's order."""
    sites, entries = ("mid_block.0", "mid_block.1", "up_blocks.0.0"), []
    for step, (site, grid) in itertools.product((0, 4), zip(sites, ((2, 4), (2, 4), (3, 3)), strict=True)):
        g = torch.Generator().manual_seed(len(entries))
        kept = {name: 2 * torch.randn(2, 2, math.prod(grid), 4, generator=g) for name in "qk"}
        images = ({"prompt": "", "seed": 0}, {"prompt": "", "seed": 1})
        entries.append(Entry(site, grid, ("cond",), step, (1.0, 1.0), images, (0, 1), lambda kept=kept: kept))
    rows_of_call, inside, curvature = [], [], measurements.curvature

    def watched(q, k, axis, operator):
        inside.append(torch.get_num_threads())
        if operator.sigma == 0:  # before the blurs, once a call
            rows_of_call.append(len(q))
        return curvature(q, k, axis, operator)

    monkeypatch.setattr(measurements, "curvature", watched)
    torch.set_num_threads(2)
    try:
        rows, claims = measure(Recording(entries), [1.0, math.inf], ["reflect", "exact"], sites)
        assert set(inside) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert rows_of_call == [4, 2, 4, 2]  # two images an entry
    alone = [measure(Recording((e,)), [1.0, math.inf], ["reflect", "exact"], sites) for e in entries]
    assert [(r["site"], r["step"]) for r in rows] == [(e.site, e.step) for e in entries for _ in range(8)]
    for a, b in zip(rows, [row for single, _ in alone for row in single], strict=True):
        assert a == {k: pytest.approx(v, rel=1e-6, abs=1e-9) if isinstance(v, float) else v for k, v in b.items()}
    for a, *parts in zip(claims, *(single_claims for _, single_claims in alone), strict=True):
        assert {(a.claim, a.axis, a.boundary)} == {(b.claim, b.axis, b.boundary) for b in parts}
        assert a.count == sum(b.count for b in parts)
        assert a.medians == pytest.approx([median for b in parts for median in b.medians], rel=1e-6, abs=1e-5)
        assert a.smallest == pytest.approx(min(b.smallest for b in parts), rel=1e-6, abs=1e-5)


def test_the_verdict_on_keys_does_not_replace_that_on_queries():
    both = [SimpleNamespace(claim="mean_kept", axis=axis, boundary="exact", blur_sigma=math.inf, share=share)
            for axis, share in (("queries", 0.949), ("keys", 0.917))]  # fmt: skip
    assert shares(both) == {"mean_kept/queries/exact/sigma_inf": 0.949, "mean_kept/keys/exact/sigma_inf": 0.917}
