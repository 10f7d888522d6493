"""Every kind of PNG is made again from what it carries; what cannot be is one line with its exit code."""

import base64
import json
import re
import shutil
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import one_figure, script
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from segresearch import records
from segresearch.config import EvaluateConfig, GenerateConfig, typed
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation import evaluate as run
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.sample_shards import Worker
from segresearch.foreign import refuse_foreign_files, refuse_foreign_targets
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
def test_an_image_is_made_again(image, done, controlled_folder, tmp_path):
    path = shutil.copy(done.folder / image, tmp_path / "sent.png")
    again = reproduce(path, str(controlled_folder), "cpu")
    assert again.largest <= (1 if image.startswith("images") else 8) and not again.notes
    assert "largest pixel difference" in str(again)
    with Image.open(path) as given:
        pixels = np.asarray(given.convert("RGB")).copy()
        pixels[0, 0, 0] ^= 0x40  # a changed pixel shows
        info = records.read_record(path)
    records.save_png(Image.fromarray(pixels), path, info)
    assert reproduce(path, str(controlled_folder), "cpu").largest >= 0x30


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


@pytest.mark.slow
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
    assert reproduce(tmp_path / "saved.png", str(controlled_folder), "cpu").largest <= 1
    with Image.open(tmp_path / "saved.png") as image:  # as a page shows a large one
        records.save_png(image.resize((32, 32), Image.Resampling.LANCZOS), tmp_path / "small.png", record)
    again = reproduce(tmp_path / "small.png", device="cpu", trust=True)
    assert again.largest <= 2 and "reduced from 64×64" in again.notes[0]
    figure = shutil.copy(whole.folder / "figures" / "quality.png", tmp_path / "figure.png")
    assert reproduce(figure, device="cpu", out=tmp_path / "runs", trust=True).largest == 0


def test_the_script_says_the_difference_and_its_code(done, controlled_folder, call, tmp_path):
    image, main = done.folder / FILES[0], script("reproduce").main
    code, said = call(main, image, "--device", "cpu", "--save", tmp_path / "again.png", "--model", controlled_folder)
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
        code, said = call(main, tmp_path / name, "--device", "cpu", "--trust")
        assert code == expected, name
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err


def test_a_record_does_not_import_what_a_stranger_names(done, tmp_path):
    record = records.read_record(done.folder / FILES[2])
    perturbation = {"kind": "custom", "target": "subprocess.Popen", "options": {"args": ["touch", str(tmp_path / "x")]}}
    record["guidance"] = {"terms": {"a": {**SEG, "perturbation": [perturbation]}}}
    records.save_png(Image.new("RGB", (16, 16)), tmp_path / "a.png", record)
    with pytest.raises(ConfigError, match="calls subprocess.Popen; look at that function"):
        reproduce(tmp_path / "a.png", device="cpu")
    perturbation["target"] = "segresearch.runs.write"
    with pytest.raises(ConfigError, match="calls segresearch.runs.write; look at that function"):
        refuse_foreign_targets(record, tmp_path / "a.png", trust=False)
    with pytest.raises(ConfigError, match="not a part of segresearch or a file of your own"):
        reproduce(tmp_path / "a.png", device="cpu", trust=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("generate", "prompts"), "secrets.txt", r"secrets.txt (generate.prompts); look at it, then add --trust"),
        (("generate", "panels"), [{"prompts": "../a.txt"}], "../a.txt (generate.panels.0.prompts)"),
        (("generate", "controls"), {"canny": CANNY | {"image": "photo"}}, "photo (generate.controls.canny.image)"),
        (("generate", "controls"), {"canny": CANNY | {"net": "~/net"}}, "~/net (generate.controls.canny.net)"),
        (("generate", "guidance"), {"networks": {"weak": {"path": "../w"}}}, "../w (generate.guidance.networks.weak"),
        (("generate", "model"), {"path": "photo"}, "photo (generate.model.path); give --model"),
        (("generate", "model"), {"path": "mini", "tokenizer": "/etc"}, "/etc (generate.model.tokenizer)"),
        (("generate", "anything"), ["x", ["..\\x"]], "..\\x (generate.anything.1.0)"),
    ],
)
def test_a_record_opens_no_file_that_the_user_did_not_name(keys, value, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("secrets.txt", "photo", "a word"):
        (tmp_path / name).write_text("mine")
    honest = {"model": {"name": "tiny", "path": "mini"}, "prompts": ["secrets.txt", "a word", "/imagine a/b"],
              "controls": {"canny": CANNY}, "negative": "photo", "name": "photo",
              "guidance": {"label": "../1"}}  # fmt: skip
    record = {"generate": honest}
    refuse_foreign_files(record, tmp_path / "sent.png", None)
    record[keys[0]] = honest | {keys[1]: value}
    with pytest.raises(ConfigError, match=re.escape(words)):
        refuse_foreign_files(record, tmp_path / "sent.png", None)
    if keys[1] == "model" and "tokenizer" not in value:
        refuse_foreign_files(record, tmp_path / "sent.png", "photo")


def sent(path, text, size=(16, 16)):
    """A PNG whose record is any text."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(records.KEY, text)
    Image.new("RGB", size).save(path, pnginfo=info)
    return path


def test_records_of_other_shapes_are_one_line(done, controlled_folder, tmp_path, monkeypatch):
    """Every part of three kinds of records in turn as a value of another kind: followed, or refused in one line."""
    monkeypatch.setattr("segresearch.generate.generate", lambda config: done)
    monkeypatch.setattr("segresearch.control_images.prepare.control_png", lambda *_: Image.new("RGB", (16, 16)))
    path, refused = tmp_path / "sent.png", 0
    for name in (FILES[0], FILES[3], "grid.png"):
        record, tried = records.read_record(done.folder / name), set()
        waiting = [()]
        while waiting:
            keys = waiting.pop()
            node = record
            for key in keys:
                node = node[key]
            waiting += [(*keys, key) for key in (node if isinstance(node, dict) else ()) if len(keys) < 2]
            for odd in (5, "x", {"a": 5}, None) if keys else ():
                copy = json.loads(json.dumps(record))
                holder = copy
                for key in keys[:-1]:
                    holder = holder[key]
                holder[keys[-1]] = odd
                tried.add(keys)
                try:
                    reproduce(sent(path, json.dumps(copy)), str(controlled_folder), "cpu")
                except InputError as error:
                    refused += "\n" not in str(error)
        assert len(tried) > 5
    assert refused > 50


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, "[" * 200_000, '{"guidance": ' * 90 + "5" + "}" * 90, "5", "{",
                                  '{"guidance": {}, "seed": 1' + "0" * 5000 + "}"])  # fmt: skip
def test_deep_and_broken_records_are_one_line(text, call, tmp_path):
    code, said = call(script("reproduce").main, sent(tmp_path / "sent.png", text))
    assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_a_pixel_bomb_is_refused_before_it_is_decoded(call, tmp_path, monkeypatch):
    path = sent(tmp_path / "bomb.png", "{}")
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    code, said = call(script("reproduce").main, path)
    assert code == 2 and "more pixels than" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("change", [{"size": [16, 2**40]}, {"size": [2**19, 2**19]}])
def test_a_record_of_an_image_far_larger_than_the_file_is_refused(change, done, controlled_folder, tmp_path):
    record = records.read_record(done.folder / FILES[0]) | change
    with pytest.raises(ConfigError, match="its record makes images of .* pixels, the file has 16 × 16"):
        reproduce(sent(tmp_path / "sent.png", json.dumps(record)), str(controlled_folder), "cpu")
    record = {"generate": {"sizes": [[16, 16], [16, 2**30]]}, "settings": {}}
    with pytest.raises(ConfigError, match="its record makes images of 16 × 1073741824 pixels"):
        reproduce(sent(tmp_path / "sent.png", json.dumps(record)), str(controlled_folder), "cpu")


def test_what_is_no_file_is_said(call, tmp_path):
    assert f"{tmp_path}: not a file" in call(script("reproduce").main, tmp_path)[1].err
    assert "none.png: no such file" in call(script("reproduce").main, "none.png")[1].err


@pytest.mark.parametrize("kind", ["evaluate", "analyze"])
def test_a_record_starts_no_tracking(kind, tmp_path, monkeypatch):
    part = {"name": "mini"}
    given = {"model": {"name": "mini", "path": "mini"}, "sampler": part, "schedule": part, "reference": "scene:0-9",
             "wandb": {"mode": "online", "project": "of a stranger"}}  # fmt: skip
    if kind == "analyze":
        given.pop("reference")
    (tmp_path / "figures").mkdir()
    records.save_png(Image.new("RGB", (8, 8)), tmp_path / "figures/quality.png", {"figure": "quality", kind: given})
    seen = []

    def called(config):
        seen.append(config)
        return SimpleNamespace(folder=tmp_path)

    where = {"evaluate": "segresearch.evaluation.evaluate.evaluate", "analyze": "segresearch.analysis.analyze.analyze"}
    monkeypatch.setattr(where[kind], called)
    assert reproduce(tmp_path / "figures/quality.png", device="cpu").largest == 0
    assert seen[0].wandb.mode == "off"
