"""Commands on a model of another family than SDXL."""

import csv

import numpy as np
import pytest
from helpers import composed
from make_families import write_family
from make_models import make_controlnet
from PIL import Image

from segresearch.analysis.analyze import analyze
from segresearch.config import AnalyzeConfig
from segresearch.generate import generate


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory):
    """A tiny SD 1.5 with a ControlNet of its own."""
    folder = tmp_path_factory.mktemp("sd15") / "folder"
    make_controlnet(write_family("sd15", folder)).save_pretrained(folder / "controlnet" / "canny")
    return folder


def test_generate_runs_on_sd15_under_a_controlnet(sd15_folder, tmp_path):
    config = composed(
        "model=sd15", f"model.path={sd15_folder}", "model.dtype=float32", "model.controlnets.canny=canny",
        "guidance=seg_cfg", "compare=[none,pag,sag]", "controlnet=canny", "seeds=0-1", "steps=2", "size=[16,32]",
        "device=cpu", f"out={tmp_path}",
    )  # fmt: skip
    run = generate(config)
    assert run.sampled == 8 and run.grid.is_file()
    pixels = [np.asarray(Image.open(p)) for p in sorted((run.folder / "images").rglob("*seed0.png"))]
    assert len(pixels) == 4 and all(p.shape == (16, 32, 3) for p in pixels)
    assert generate(config).existing == 8


def test_the_energy_bench_runs_on_sd15(sd15_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("segresearch.analysis.energy_plots.draw", lambda *_: {})
    config = composed(
        "model=sd15", f"model.path={sd15_folder}", "model.dtype=float32", "seeds=0", "steps=2", "size=[32,48]",
        "measured_steps=[0]", "where=[mid,up.1.0]", "prompts=[red]", "blur.sigmas=[1,inf]", "blur.boundaries=[reflect]",
        "device=cpu", f"out={tmp_path}", name="analyze", kind=AnalyzeConfig,
    )  # fmt: skip
    rows = list(csv.DictReader((analyze(config).folder / "table.csv").open(encoding="utf-8")))
    assert {row["site"] for row in rows} == {
        "mid_block.attentions.0.transformer_blocks.0.attn1", "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    }  # fmt: skip
