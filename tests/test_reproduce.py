"""Every kind of PNG is made again from what it carries; what cannot be is one line with its exit code."""

import base64
import re
import shutil

import numpy as np
import pytest
from helpers import one_figure, script
from matplotlib.figure import Figure
from PIL import Image

from segresearch import records
from segresearch.config import EvaluateConfig, GenerateConfig, typed
from segresearch.errors import ConfigError
from segresearch.evaluation import evaluate as run
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.sample_shards import Worker
from segresearch.generate import generate
from segresearch.models import load_model
from segresearch.plot_style import save
from segresearch.reproduce import recorded, reproduce

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")
SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}
CFG = {"kind": "cfg", "weight": 3}
CANNY = {"net": "canny", "image": "scene:0-", "preprocess": "canny"}


@pytest.fixture(scope="module")
def done(controlled_folder, tmp_path_factory):
    """A run under control, with CFG, SEG, SAG and prompts, in two panels."""
    given = {
        "model": {"name": "tiny", "path": str(controlled_folder)}, "sampler": {"name": "euler_ancestral"}, "steps": 2,
        "schedule": {"name": "karras", "rho": 5}, "negative": "blue", "seeds": "0-1", "batch_size": 3, "device": "cpu",
        "out": str(tmp_path_factory.mktemp("runs")), "prompts": ["", "red"],
        "panels": [
            {"title": "under control", "controls": {"canny": CANNY},
             "compare": [{}, {"label": "both", "terms": {"cfg": CFG, "seg": SEG}, "rescale": 0.5}]},
            {"title": "free", "compare": [{"label": "SAG", "sag": {"scale": 0.75}}]},
        ],
    }  # fmt: skip
    return generate(typed(GenerateConfig, given))


FILES = [
    "images/1-under-control/vanilla/prompt0-seed0.png",
    "images/1-under-control/both/prompt1-seed1.png",
    "images/2-free/sag/prompt1-seed0.png",
    "controls/1-under-control/canny/seed1.png",
    "grid.png",
]


@pytest.mark.parametrize("image", FILES)
def test_an_image_is_made_again(image, done, tmp_path):
    path = shutil.copy(done.folder / image, tmp_path / "sent.png")
    again = reproduce(path, device="cpu")
    assert again.largest <= (1 if image.startswith("images") else 8) and not again.notes
    assert "largest pixel difference" in str(again)
    with Image.open(path) as given:
        pixels = np.asarray(given.convert("RGB")).copy()
        pixels[0, 0, 0] ^= 0x40  # a changed pixel shows
        info = records.read_record(path)
    records.save_png(Image.fromarray(pixels), path, info)
    assert reproduce(path, device="cpu").largest >= 0x30


def test_other_weights_other_code_and_another_place_are_said(done, controlled_folder, tmp_path):
    path = tmp_path / "old.png"
    source = done.folder / FILES[2]
    record = records.read_record(source)
    record["model"] |= {"fingerprint": "0" * 12, "path": "gone"}
    record["code"] = "0.0.1"
    records.save_png(Image.open(source), path, record)
    again = reproduce(path, str(controlled_folder), "cpu")
    assert again.largest <= 1
    assert again.notes[0].startswith("other weights: 000000000000 when it was made, ")
    assert again.notes[1].startswith("other version of segresearch: 0.0.1 when it was made, ")


def test_images_and_figures_of_an_evaluation_are_made_again(controlled_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run.outputs.plots, "draw", one_figure)
    given = {
        "model": {"name": "tiny", "path": str(controlled_folder)},
        "sampler": {"name": "euler"}, "schedule": {"name": "leading"},
        "compare": [{}, {"label": "SEG", "terms": {"seg": SEG}}], "prompts": ["red", ""], "controls": {"canny": CANNY},
        "images": 3, "steps": 2, "size": [64, 64], "batch_size": 2, "shard": 2, "n_examples": 3,
        "text_alignment": "none",
        "features": ["mini"], "distances": [], "reference": "scene:100000-100005", "n_bootstrap": 2, "n_subsets": 2,
        "force": True, "device": "cpu", "out": str(tmp_path / "runs"),
    }  # fmt: skip
    config = typed(EvaluateConfig, given)
    whole = evaluate(config, load_model(controlled_folder, controlnet=["canny"]), Worker())
    shown = re.findall(
        r'alt="([^"]*, seed \d)" src="data:image/png;base64,([^"]*)"', (whole.folder / run.outputs.PAGE).read_text()
    )
    assert len(shown) == 6
    (tmp_path / "saved.png").write_bytes(base64.b64decode(dict(shown)["SEG, seed 2"]))
    record = recorded(tmp_path / "saved.png")
    assert (record["method"], record["seed"], record["prompt"]) == ("SEG", 2, "red")
    assert record["controls"]["canny"]["image"] == "scene:2" and record["run"] == whole.folder.name
    assert reproduce(tmp_path / "saved.png", device="cpu").largest <= 1
    with Image.open(tmp_path / "saved.png") as image:  # as a page shows a large one
        records.save_png(image.resize((32, 32), Image.Resampling.LANCZOS), tmp_path / "small.png", record)
    again = reproduce(tmp_path / "small.png", device="cpu")
    assert again.largest <= 2 and "reduced from 64×64" in again.notes[0]
    figure = shutil.copy(whole.folder / "figures" / "quality.png", tmp_path / "figure.png")
    assert reproduce(figure, device="cpu", out=tmp_path / "runs").largest == 0


def test_the_script_says_the_difference_and_its_code(done, call, tmp_path):
    image, main = done.folder / FILES[0], script("reproduce").main
    code, said = call(main, image, "--device", "cpu", "--save", tmp_path / "again.png")
    assert code == 0 and re.fullmatch(r"largest pixel difference: [01] of 255 \(.*\)\n", said.out)
    assert records.read_record(tmp_path / "again.png") == records.read_record(image)
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.open(image).save(tmp_path / "stripped.png")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:-20])
    save(Figure(figsize=(1, 1)), tmp_path / "figure.png")
    old = records.read_record(done.folder / "grid.png")
    old.pop("generate")
    records.save_png(Image.new("RGB", (4, 4)), tmp_path / "old.png", old)
    records.save_png(Image.new("RGB", (4, 4)), tmp_path / "half.png", {"guidance": {}, "seed": 0})
    gone = records.read_record(image)
    gone["model"] = {**gone["model"], "path": "gone"}
    records.save_png(Image.new("RGB", (16, 16)), tmp_path / "gone.png", gone)
    net = records.read_record(image)
    net["controls"]["canny"]["net"] = "nobody/net"
    records.save_png(Image.new("RGB", (16, 16)), tmp_path / "net.png", net)
    other = records.read_record(image)
    records.save_png(Image.new("RGB", (15, 16)), tmp_path / "other.png", other)
    for name, expected, words in (
        ("none.png", 2, "no such file"),
        ("plain.png", 2, "no record in it"),
        ("stripped.png", 2, "no record in it"),
        ("cut.png", 2, "no record in it"),
        ("figure.png", 2, "no record in it"),
        ("old.png", 2, "an older version wrote it"),
        ("half.png", 2, "its record cannot be followed: sampler: missing"),
        ("other.png", 2, "15×16 pixels, but its record makes 16×16"),
        ("gone.png", 3, "gone: no such file or folder"),
        ("net.png", 3, "hf download nobody/net"),
    ):
        code, said = call(main, tmp_path / name, "--device", "cpu")
        assert code == expected, name
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err


def test_a_record_does_not_import_what_a_stranger_names(done, tmp_path):
    record = records.read_record(done.folder / FILES[2])
    perturbation = {"kind": "custom", "target": "subprocess.Popen", "options": {"args": ["touch", str(tmp_path / "x")]}}
    record["guidance"] = {"terms": {"a": {**SEG, "perturbation": [perturbation]}}}
    records.save_png(Image.new("RGB", (16, 16)), tmp_path / "a.png", record)
    with pytest.raises(ConfigError, match="calls subprocess.Popen; look at that function"):
        reproduce(tmp_path / "a.png", device="cpu")
    with pytest.raises(ConfigError, match="not a part of segresearch or a file of your own"):
        reproduce(tmp_path / "a.png", device="cpu", trust=True)
    assert not (tmp_path / "x").exists()
