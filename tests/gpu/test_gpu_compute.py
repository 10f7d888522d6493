"""CUDA graphs and compiled networks beside eager: the same values to rounding, whatever the guidance; what falls back.

On a CPU nothing is captured, so there these tests show the way back to eager calls.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_models import DEVICE, REAL, ROOT, composed, gpu, mini, note, only_cuda

from segresearch.analysis.recorder import Recorder
from segresearch.config.build import build_guidance
from segresearch.guidance import SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.models.controlnet import controlled
from segresearch.sampling import initial_noise, sample
from segresearch.scenes.scenes import depth_image, edge_image, scenes

pytestmark = [*gpu, pytest.mark.filterwarnings("ignore:compute.graph" if not REAL else "default")]
PROMPTS, SEEDS = ["a red cup", "two yellow cubes"], [5, 6]
METHODS = ("none", "seg", "pag", "cfg", "seg_pag_cfg", "sag", "sag_cfg")
NETS = ("", "canny", "canny, depth", "guess")


@pytest.fixture(scope="module")
def eager():
    return mini(precision="exact")


@pytest.fixture(scope="module")
def graphed():
    return mini(precision="exact", graph=True)


def captured(sd) -> int:
    return sum(graph is not None for graph in sd.denoiser.run.graphs.graphs.values())


def control(sd, nets: str) -> dict:
    if not nets:
        return {}
    held = scenes([10_000_004, 10_000_011])
    images = {"canny": edge_image(held.edges), "depth": depth_image(held.depth)}
    names = ["canny"] if nets == "guess" else nets.split(", ")
    return {"control": [controlled(sd.controlnets[n], images[n], 0.7, guess=nets == "guess") for n in names]}


def latents(sd, guidance: str, nets: str = "", steps: int = 4, **more) -> torch.Tensor:
    model = build_guidance(composed(f"guidance={guidance}").guidance, sd.denoiser)
    noise = initial_noise(SEEDS, sd.latent_shape())
    given = {"conds": sd.encode(PROMPTS), "seeds": SEEDS, **control(sd, nets), **more}
    return sample(model, noise, "dpmpp_2m", steps=steps, **given)


def check(name: str, graphed, expected, found, near: float) -> None:
    largest = float((expected - found).abs().max())
    note(f"graph against eager, latents: {name}", largest)
    assert expected.isfinite().all() and found.isfinite().all()
    if "sag" in name:  # its mask is a threshold, which a rounding may cross
        assert float((expected - found).abs().quantile(0.99)) <= near
    else:
        assert largest <= near
    assert not REAL or captured(graphed) > 0


@pytest.mark.parametrize("guidance", METHODS)
def test_graphs_of_every_method(guidance, eager, graphed):
    check(guidance, graphed, latents(eager, guidance), latents(graphed, guidance), 1e-3)


@pytest.mark.parametrize("nets", NETS[1:])
@pytest.mark.parametrize("guidance", ["cfg", "seg", "sag_cfg"])
def test_graphs_under_controlnets(guidance, nets, eager, graphed):
    check(f"{guidance}, {nets}", graphed, latents(eager, guidance, nets), latents(graphed, guidance, nets), 1e-3)


@pytest.mark.parametrize("sigma, boundary", [(1.0, "reflect"), (3.0, "exact"), (math.inf, "reflect")])
def test_graphs_with_every_blur_and_without_a_fork(sigma, boundary, eager, graphed):
    terms = {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(sigma, where="*", boundary=boundary), 1.0)}
    noise, found = initial_noise(SEEDS, eager.latent_shape()), {}
    for name, sd, fork in (("eager", eager, True), ("graph", graphed, True), ("unforked", graphed, False)):
        model = GuidedDenoiser(sd.denoiser, terms, fork=fork)
        found[name] = sample(model, noise, steps=4, conds=sd.encode(PROMPTS))
    check(f"seg {sigma} {boundary}", graphed, found["eager"], found["graph"], 1e-3)
    check(f"seg {sigma} {boundary}, no fork", graphed, found["eager"], found["unforked"], 1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_graphs_in_half_precision(dtype):
    kind = getattr(torch, dtype)
    eager, graphed = mini(dtype=kind), mini(dtype=kind, graph=True)
    check(dtype, graphed, latents(eager, "seg_cfg"), latents(graphed, "seg_cfg"), 5e-2)


def test_a_replay_follows_its_arguments(graphed, eager):
    """Other prompts and noise through the graphs of the first: not the first's picture again."""
    first = latents(graphed, "cfg")
    with torch.no_grad():
        other = {name: cond[[1, 0]] for name, cond in graphed.encode(PROMPTS).items()}
    given = {"conds": other}
    check("other prompts", graphed, latents(eager, "cfg", **given), latents(graphed, "cfg", **given), 1e-3)
    check("the first again", graphed, first, latents(graphed, "cfg"), 1e-3)
    assert not torch.equal(first, latents(graphed, "cfg", **given))


def test_a_recording_falls_back_and_is_the_same(eager, graphed):
    labels, found = [{"seed": seed} for seed in SEEDS], {}
    for name, sd in (("eager", eager), ("graph", graphed)):
        recorder = Recorder(sd.unet.site_heads, "mid", None, [0, 2], ["cond", "cond~seg"])
        x0 = latents(sd, "seg", attend=recorder.attend(labels))
        found[name] = (x0, recorder.recording)
    assert len(found["eager"][1]) == len(found["graph"][1]) > 0
    torch.testing.assert_close(found["graph"][0], found["eager"][0], rtol=0, atol=1e-3)
    for a, b in zip(found["eager"][1], found["graph"][1], strict=True):
        assert (a.site, a.step, a.branches) == (b.site, b.step, b.branches)
        torch.testing.assert_close(b.q, a.q, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(b.k, a.k, rtol=1e-4, atol=1e-3)


@only_cuda
def test_a_recording_says_that_it_is_not_captured():
    sd = mini(graph=True)
    recorder = Recorder(sd.unet.site_heads, "mid", None, [0])
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        latents(sd, "none", attend=recorder.attend([{"seed": s} for s in SEEDS]), steps=1)
    assert len(recorder.recording)


@only_cuda
def test_memory_of_graphs_is_bounded_and_freed():
    sd = mini(graph=True)
    start = torch.cuda.memory_reserved()
    for rows in range(1, 12):
        noise = initial_noise(range(rows), sd.latent_shape())
        model = GuidedDenoiser(sd.denoiser, {})
        sample(model, noise, steps=1, conds=sd.encode(["a cup"] * rows))
    kept, most = captured(sd), sd.denoiser.run.graphs.limit
    held = torch.cuda.memory_reserved() - start
    assert 0 < kept <= most
    sd.denoiser.run.graphs.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_reserved() - start
    note("graphs of mini, MiB held", round(held / 2**20, 1), left=round(left / 2**20, 1), graphs=kept)
    assert left <= max(held / 2, 64 * 2**20)


def test_sag_around_a_graphed_denoiser_at_the_edges_of_its_interval(eager, graphed):
    noise, found = initial_noise(SEEDS, eager.latent_shape()), []
    for sd in (eager, graphed):
        model = SelfAttentionGuidance(sd.denoiser, 0.75, interval=(0.5, 5.0))
        found.append(sample(model, noise, steps=6, conds=sd.encode(PROMPTS)))
    check("sag in an interval", graphed, *found, 1e-3)


def test_compiled_steps_are_eager_ones_to_rounding():
    """A tiny UNet, for compiling takes its time: plain, and forked under CFG and SEG; on a GPU captured as well."""
    command = [sys.executable, str(Path(__file__).with_name("compiled_steps.py")), DEVICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 if REAL else 900, cwd=ROOT)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    assert done.returncode == 0, f"ended with {done.returncode}: {last}"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == ["plain", "cfg, seg"]
    for line in lines:
        note(f"compiled against eager: {line['name']}", line["apart"], of=line["scale"], seconds=line["seconds"])
        assert line["compiled"], done.stderr[-500:]
        assert line["apart"] <= 1e-4 * line["scale"]
        assert line["graphs"] > 0 or not REAL, done.stderr[-500:]
