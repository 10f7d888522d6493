"""The diagnostics of weak branches: every number against a slow form of it, the limits, and a run with its page."""

import csv
import dataclasses
import html
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import composed, one_figure

from segresearch import cli
from segresearch.analysis import attention_diagnostics as attention
from segresearch.analysis import branch_diagnostics as diagnostics
from segresearch.analysis.attention_diagnostics import Share, common_share, estimate, mean_of
from segresearch.config import EvaluateConfig, GuidanceConfig, typed
from segresearch.config.build import build_guidance
from segresearch.config.expand import methods
from segresearch.config.schema import DiagnosticsConfig
from segresearch.errors import ConfigError
from segresearch.evaluation import branches
from segresearch.evaluation import evaluate as run
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.sample_shards import Worker
from segresearch.sampling import initial_noise

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")
GRID = (3, 5)
SEG = {"kind": "perturbed", "scale": -1, "perturbation": {"kind": "seg", "sigma": "inf"}}
PAG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "pag"}}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 2**18])
def test_attention_numbers_are_those_of_the_whole_map(monkeypatch, block):
    monkeypatch.setattr("segresearch.analysis.logit_statistics.BLOCK", block)
    w, n = GRID[1], 15
    q, k, v = (2 * drawn(4, 2, n, 6, seed=seed) for seed in range(3))
    probabilities = (q @ k.mT / math.sqrt(6)).softmax(-1)
    out = probabilities @ v
    found = attention.attention_shares(q, k, out, GRID)
    near = torch.tensor([[abs(a // w - b // w) <= 1 and abs(a % w - b % w) <= 1 for b in range(n)] for a in range(n)])
    entropy = -(probabilities * probabilities.log()).sum(-1)
    expected = {
        "keys": entropy.exp().mean((1, 2)), "near": (probabilities * near).sum(-1).mean((1, 2)),
        "own": probabilities.diagonal(dim1=2, dim2=3).mean((1, 2)),
    }  # fmt: skip
    for name, value in expected.items():
        assert torch.allclose(found[name].numerator, value, rtol=1e-5) and (found[name].denominator == 1).all()
    assert attention.near_chance(GRID) == pytest.approx(near.float().mean().item())
    deviation = (out - out.mean(2, keepdim=True)).square().sum((1, 2, 3))
    varying = found["varying"]
    assert torch.allclose(varying.numerator / varying.denominator, deviation / out.square().sum((1, 2, 3)), rtol=1e-4)


def test_uniform_attention_is_at_every_chance():
    k, v = drawn(2, 1, 15, 4), drawn(2, 1, 15, 4, seed=1)
    out = v.mean(2, keepdim=True).expand_as(v)
    found = attention.attention_shares(torch.zeros_like(k), k, out, GRID)
    assert torch.allclose(found["keys"].numerator, torch.tensor(15.0)) and estimate([found["varying"]]).value < 1e-6
    assert estimate([found["near"]]).value == pytest.approx(attention.near_chance(GRID), rel=1e-6)
    assert estimate([found["own"]]).value == pytest.approx(1 / 15, rel=1e-6)
    assert math.isnan(estimate([found["position"]]).value)  # these queries do not vary


def test_the_change_of_an_output_is_relative_to_it_in_every_image():
    out = drawn(3, 2, 15, 4)
    share = attention.relative_change(out * torch.tensor([1.0, 1.5, 0.0])[:, None, None, None], out)
    assert torch.allclose(share.numerator, torch.tensor([0.0, 0.5, 1.0]), atol=1e-6)


# --- estimates and errors -------------------------------------------------------------------------


def test_the_common_share_is_the_mean_over_pairs_and_has_no_bias():
    z = drawn(5, 3, 7) + 2
    flat = z.flatten(1)
    pairs = [float(flat[i] @ flat[j]) for i in range(5) for j in range(5) if i != j]
    assert estimate([common_share(z)]).value == pytest.approx(np.mean(pairs) / float(flat.square().sum(1).mean()))
    assert estimate([common_share(z[:1].expand(4, 3, 7))]).value == pytest.approx(1)
    assert math.isnan(estimate([common_share(z[:1])]).value)
    few = [estimate([common_share(drawn(2, 40, seed=seed))]).value for seed in range(300)]
    assert abs(np.mean(few)) < 4 * np.std(few) / math.sqrt(300)  # two images at a time, nothing in common


def test_errors_are_those_of_repeated_samples():
    means, ratios, commons = [], [], []
    for seed in range(400):
        x, y = drawn(30, seed=seed), 2 + 0.3 * drawn(30, seed=1000 + seed)
        z = drawn(30, 6, seed=2000 + seed) + torch.linspace(-1, 1, 6)
        means.append(estimate([mean_of(x[:10]), mean_of(x[10:])]))
        ratios.append(estimate([Share(x + y, y)]))
        commons.append(estimate([common_share(z)]))
    for found in (means, ratios, commons):
        spread = np.std([e.value for e in found])
        assert np.mean([e.error for e in found]) == pytest.approx(spread, rel=0.12)
    single = estimate([mean_of(torch.tensor([1.0]))])
    assert single.value == 1 and math.isnan(single.error) and single.images == 1


def test_a_direction_along_the_error_has_cosine_one_and_its_scale():
    plain, difference = drawn(3, 4, 2, 5), drawn(3, 4, 2, 5, seed=1)
    found = diagnostics.alignment_shares(plain + 3 * difference, plain, difference)
    assert estimate([found["cosine"]]).value == pytest.approx(1, abs=1e-5)
    assert estimate([found["best_scale"]]).value == pytest.approx(3, rel=1e-5)
    constant = difference.mean((2, 3), keepdim=True).expand_as(difference)
    assert estimate([diagnostics.direction_shares(plain, constant)["dc"]]).value == pytest.approx(1, rel=1e-5)
    centred = difference - difference.mean((2, 3), keepdim=True)
    assert estimate([diagnostics.direction_shares(plain, centred)["dc"]]).value == pytest.approx(0, abs=1e-6)


# --- methods --------------------------------------------------------------------------------------


def guidance(**settings) -> GuidanceConfig:
    return typed(GuidanceConfig, settings)


def test_the_difference_of_a_method_is_taken_at_scale_one_without_cfg():
    cfg = {"kind": "cfg", "weight": 5}
    alone = diagnostics.difference_alone(guidance(terms={"cfg": cfg, "seg": SEG}, rescale=0.5))
    assert list(alone.terms) == ["seg"] and alone.terms["seg"].scale == 1 and alone.rescale == 0
    assert diagnostics.difference_alone(guidance(terms={"cfg": cfg})).terms["cfg"].weight == 2  # w − 1 = 1
    assert diagnostics.difference_alone(guidance(sag={"scale": -1})).sag.scale == 1
    for without in (
        guidance(),
        guidance(terms={"seg": SEG, "pag": PAG}),
        guidance(terms={"seg": SEG}, sag={"scale": 1}),
    ):
        assert diagnostics.difference_alone(without) is None


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    given = {
        "model": {"name": "tiny", "path": str(folder)}, "sampler": {"name": "euler"}, "schedule": {"name": "leading"},
        "name": "study",
        "compare": [{}, {"label": "SEG", "terms": {"seg": SEG}}, {"label": "PAG", "terms": {"pag": PAG}}],
        "images": 3, "steps": 3, "size": [64, 64], "batch_size": 2, "shard": 3, "n_examples": 2, "distances": [],
        "reference": "scene:100000-100005", "n_bootstrap": 2, "n_subsets": 2, "force": True, "device": "cpu",
        "diagnostics": {"images": 4, "scenes": 3, "steps": [0, -1]}, "out": str(tmp_path_factory.mktemp("branches")),
    }  # fmt: skip
    return typed(EvaluateConfig, given)


def diagnosed(config, sd, **settings):
    asked = dataclasses.replace(config.diagnostics, **{"scenes": 0, **settings})
    config = dataclasses.replace(config, size=(32, 32))
    named = methods((*config.compare, config.guidance))
    return diagnostics.diagnose(sd, named, config, asked, lambda rows: [""] * len(rows))


@pytest.fixture(scope="module")
def measured(base, model):
    return diagnosed(base, model)


@torch.no_grad()
def test_numbers_are_those_of_the_guided_model_at_the_first_step(base, model, measured):
    found = {(n.method, n.site, n.quantity, n.step): n for n in measured}
    conds = model.encode([""], size=(32, 32))
    sigma = model.denoiser.sigmas.new_tensor([found["SEG", "", "rms", 0].sigma])
    x = torch.cat([initial_noise([seed], model.latent_shape((32, 32))) for seed in range(4)])
    sampled = build_guidance(base.compare[0], model)
    start = x * (sigma**2 + 1).sqrt()  # of the schedule `leading`
    plain = torch.cat([sampled(row[None], sigma, conds) for row in start])
    for method, scale in (("SEG", -1.0), ("PAG", 2.0)):
        guided = build_guidance(next(m for m in base.compare if m.label == method), model)
        difference = torch.cat([guided(row[None], sigma, conds) for row in start]) / scale - plain / scale
        rms = difference.square().mean((1, 2, 3)).sqrt()
        number = found[method, "", "rms", 0]
        assert number.value == pytest.approx(rms.mean().item(), rel=1e-3) and number.count == 4
        assert number.error == pytest.approx(rms.std().item() / 2, rel=1e-2)
        flat = difference.flatten(1)
        pairs = [float(flat[i] @ flat[j]) for i, j in ((0, 1), (2, 3))]  # within the batches of two
        common = np.mean(pairs) / float(flat.square().sum(1).mean())
        assert found[method, "", "common", 0].value == pytest.approx(common, abs=2e-3)
    mid = [site for site in model.unet.sites if site.startswith("mid_block")]
    assert {n[1] for n in found if n[2] == "change"} == set(mid) and {n[3] for n in found} == {0, 2}


def test_batches_do_not_change_what_is_measured(base, model, measured, unchecked):
    """But for the pairs, which are taken within a batch."""
    four = diagnosed(dataclasses.replace(base, batch_size=4), model)
    for a, b in zip(measured, four, strict=True):
        assert (a.method, a.site, a.quantity, a.step) == (b.method, b.site, b.quantity, b.step)
        if a.quantity not in ("common", "position"):
            assert a.value == pytest.approx(b.value, rel=2e-3, abs=3e-5)  # rounding, in a share of 1
    assert diagnostics.batches(5, 2).__next__() == range(0, 2)
    assert [list(rows) for rows in diagnostics.batches(5, 2)] == [[0, 1], [2, 3, 4]]  # none is left alone
    assert [list(rows) for rows in diagnostics.batches(1, 2)] == [[0]] and not list(diagnostics.batches(0, 2))


def test_a_branch_that_is_the_model_has_no_direction_and_changes_nothing(base, model):
    same = typed(
        GuidanceConfig, {"label": "same", "terms": {"seg": {**SEG, "perturbation": {"kind": "seg", "sigma": 0}}}}
    )
    found = diagnosed(dataclasses.replace(base, compare=(base.compare[0], same)), model, scenes=0)
    assert all(n.value == 0 for n in found if n.quantity == "change")
    assert not [n for n in found if n.quantity in diagnostics.DIRECTION]


@pytest.mark.slow
def test_methods_that_remember_see_every_step(base, model):
    emag = {"label": "EMAG", "terms": {"emag": {"kind": "perturbed", "scale": 1, "perturbation": {"kind": "emag"}}}}
    previous = {"kind": "difference", "pos": "cond", "neg": "cond", "scale": 1, "shape": {"kind": "sg_prev"}}
    both = typed(tuple[GuidanceConfig, ...], [{}, emag, {"label": "prev", "terms": {"p": previous}}])
    config = dataclasses.replace(base, compare=both)
    late = {(n.method, n.quantity): n.value for n in diagnosed(config, model, steps=(2,))}
    every = {(n.method, n.quantity, n.step): n.value for n in diagnosed(config, model, steps=(0, 1, 2))}
    for method in ("EMAG", "prev"):
        assert late[method, "rms"] == every[method, "rms", 2] > 0 and (method, "rms", 0) not in every


def test_what_cannot_be_diagnosed_is_one_line(base, model):
    none = dataclasses.replace(base, compare=(base.compare[0],))
    with pytest.raises(ConfigError, match="no method here has one difference"):
        diagnosed(none, model)
    adaptive = dataclasses.replace(base, sampler=dataclasses.replace(base.sampler, name="dpm_adaptive"))
    with pytest.raises(ConfigError, match="dpm_adaptive with these options chooses its own sigmas"):
        diagnosed(adaptive, model)
    for steps in ((3,), (-4,), ()):
        with pytest.raises(ConfigError, match="3 steps are 0 to 2"):
            dataclasses.replace(base, diagnostics=DiagnosticsConfig(steps=steps))


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(base, model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.outputs.plots, "draw", one_figure)
        yield evaluate(base, model, Worker())


def test_a_run_has_its_diagnostics_as_a_part_of_the_page(base, whole, model, monkeypatch):
    rows = list(csv.DictReader(io.StringIO((whole.folder / "diagnostics.csv").read_text())))
    assert len(rows) == len(whole.result.diagnostics) and {row["method"] for row in rows} == {"", "SEG", "PAG"}
    quantities = {row["quantity"] for row in rows}
    assert quantities >= {*diagnostics.ATTENTION, *diagnostics.DIRECTION, *diagnostics.ALIGNMENT, "change"}
    page = html.unescape((whole.folder / "index.html").read_text())
    assert "What the branches change" in page and all(question.title in page for question in branches.QUESTIONS)
    drawn_figures = {path.stem for path in (whole.folder / "figures").iterdir()}
    assert drawn_figures == {"quality", "branch_alone", *(f"branch_{q.key}" for q in branches.QUESTIONS)}
    assert page.count('class="plot zoom"') == 6 and page.count('alt="Quality"') == 1
    monkeypatch.setattr(branches, "diagnose", None)
    monkeypatch.setattr(run.results, "aggregate", None)
    assert evaluate(base, model, Worker()).result == whole.result  # the same command measures nothing again


@pytest.mark.slow
def test_diagnostics_are_there_whole_or_not_at_all(base, whole, model, tmp_path, monkeypatch):
    config = dataclasses.replace(base, out=str(tmp_path))
    measured = diagnostics.Diagnosis.numbers

    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.outputs.plots, "draw", one_figure)
    monkeypatch.setattr(run.outputs.branch_plots, "draw_branches", lambda *_: {})
    monkeypatch.setattr(diagnostics.Diagnosis, "numbers", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, model, Worker())
    assert not list(tmp_path.rglob("*diagnostics*"))
    with pytest.raises(cli.Ended, match="the diagnostics are missing") as caught:
        evaluate(dataclasses.replace(config, stage="reduce"), model, Worker())
    assert caught.value.code == 4
    second = evaluate(config, model, Worker(1, 2))
    assert second.result is None and "the first worker writes" in second.message
    monkeypatch.setattr(diagnostics.Diagnosis, "numbers", measured)
    done = evaluate(config, model, Worker())
    assert done.result == whole.result and done.folder.name == whole.folder.name
    (file,) = tmp_path.glob("shards/diagnostics-*.json")
    (original,) = Path(base.out).glob("shards/diagnostics-*.json")
    assert file.read_bytes() == original.read_bytes()
    file.write_text(file.read_text().replace('"value": 0', '"value": 1', 1))
    assert branches.read(file) == ()  # damage is as good as nothing, and mended
    evaluate(config, model, Worker())
    assert file.read_bytes() == original.read_bytes()


def test_a_run_without_diagnostics_has_the_name_it_had(base, whole, model, tmp_path):
    from segresearch.evaluation.spec import evaluation_spec, run_identity

    plain = evaluation_spec(dataclasses.replace(base, diagnostics=None))
    assert "diagnostics" not in run_identity(plain, "x") and "sweep" not in run_identity(plain, "x")
    assert run_identity(evaluation_spec(base), "x")["diagnostics"] == base.diagnostics


def test_real_images_are_the_scenes_of_the_prompts_or_the_reference(base, tmp_path):
    from PIL import Image

    from segresearch.evaluation.reference_images import reference
    from segresearch.evaluation.spec import evaluation_spec
    from segresearch.scenes.scenes import captions, scenes

    config = dataclasses.replace(base, prompts="scene:0-")
    found = branches.real_images(evaluation_spec(config), config.diagnostics, reference(config.reference), (64, 64))
    assert torch.equal(found.images, scenes(range(10_000_000, 10_000_003)).images)
    assert found.texts == captions(range(10_000_000, 10_000_003))
    spec = evaluation_spec(base)
    found = branches.real_images(spec, base.diagnostics, reference(base.reference), (32, 48))
    assert found.images.shape == (3, 3, 32, 48) and found.texts == [""] * 3
    for i in range(2):
        Image.new("RGB", (80, 60), (200, 10 * i, 0)).save(tmp_path / f"{i}.png")
    found = branches.real_images(spec, base.diagnostics, reference(str(tmp_path)), (32, 32))
    assert found.images.shape == (2, 3, 32, 32) and found.images[:, 0].float().mean() == 200
    asked = dataclasses.replace(base.diagnostics, scenes=0)
    assert branches.real_images(spec, asked, reference(base.reference), (64, 64)) is None


@pytest.mark.parametrize("model_name", ["mini", "sdxl"])
def test_the_experiment_has_every_method_alone(model_name):
    more = ["model.networks.weak=weak"] if model_name == "sdxl" else []
    config = composed("experiment=branches", f"model={model_name}", *more, name="evaluate", kind=EvaluateConfig)
    named = methods((*config.compare, config.guidance))
    alone = {name: diagnostics.difference_alone(method) for name, method in named.items()}
    assert len(named) == 22 and [name for name, one in alone.items() if one is None] == ["vanilla"]
    for name, method in named.items():
        acting = [*method.terms.values(), *filter(None, [method.sag])]
        assert [term.scale for term in acting] == [-1] * (name != "vanilla")
