"""generate under ControlNets, end to end on tiny random models: what is recorded, what identifies, what is refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import composed
from omegaconf import OmegaConf
from PIL import Image

from segresearch import cli, records
from segresearch.config import GenerateConfig, settings, typed
from segresearch.config.expand import HELD_OUT, control_images, panels
from segresearch.errors import ConfigError
from segresearch.generate import expand, generate
from segresearch.models import load_model
from segresearch.scenes.scenes import captions

SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}
CANNY = {"net": "canny", "image": "scene:0-", "preprocess": "canny"}
PHOTO = str(Path(__file__).resolve().parent.parent / "docs" / "demo.png")
DEPTH = {"net": "depth", "image": "scene:0-", "preprocess": "depth", "scale": 0.5}


@pytest.fixture(scope="module")
def model(controlled_folder):
    return load_model(controlled_folder, controlnet=["canny", "depth"])


@pytest.fixture
def config(controlled_folder, tmp_path):
    def made(**changes) -> GenerateConfig:
        given = {
            "model": {"name": "tiny", "path": str(controlled_folder)}, "sampler": {"name": "euler"}, "seeds": "0-1",
            "steps": 2, "schedule": {"name": "leading"}, "guidance": {"terms": {"seg": SEG}},
            "controls": {"canny": CANNY}, "device": "cpu", "out": str(tmp_path / "runs"), "batch_size": 3,
        }  # fmt: skip
        return typed(GenerateConfig, {**given, **changes})

    return made


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


def pixels_of(run) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((run.folder / "images").rglob("*.png"))])


def test_a_run_under_control_is_recorded_shown_and_not_made_twice(config, monkeypatch):
    run = generate(config(compare=[{}], prompts=["", "red"]))  # loads the ControlNets it names
    assert (run.sampled, run.existing) == (8, 0)
    shown = sorted(p.relative_to(run.folder) for p in (run.folder / "controls").rglob("*.png"))
    assert [str(p) for p in shown] == ["controls/canny/seed0.png", "controls/canny/seed1.png"]  # prompts share it
    first = np.asarray(Image.open(run.folder / shown[0]))
    assert first.shape == (16, 16, 3) and set(np.unique(first)) == {0, 255}
    said = records.read_record(run.folder / "images" / "vanilla" / "prompt1-seed1.png")
    assert said["controls"]["canny"] == {
        "net": "canny", "image": "scene:1", "preprocess": "canny", "low": 100.0, "high": 200.0, "depth_model": None,
        "scale": 1.0, "start": 0.0, "end": 1.0, "guess": False,
    }  # fmt: skip
    assert {len(mark) for mark in said["contents"]["canny"].values()} == {12}
    plain = generate(config(compare=[{}], prompts=["", "red"], controls={}))
    assert Image.open(run.grid).width > Image.open(plain.grid).width + 90  # one more column
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    monkeypatch.setattr("segresearch.generate.configured_model", None)
    again = generate(config(compare=[{}], prompts=["", "red"]))
    assert (again.sampled, again.folder) == (0, run.folder)
    (run.folder / shown[0]).unlink()
    generate(config(compare=[{}], prompts=["", "red"]))  # still without the model
    assert np.array_equal(np.asarray(Image.open(run.folder / shown[0])), first)
    del before[run.folder / shown[0]]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}.items() | {
        (path, stamp) for path, stamp in before.items() if path.is_dir()
    }


def test_config_yaml_of_a_controlled_run_is_the_run(config, model):
    both = config(panels=[{"controls": {"canny": CANNY}}, {"controls": {"depth": DEPTH}, "prompts": "red"}])
    run = generate(both, model)
    given = settings(OmegaConf.create((run.folder / "config.yaml").read_text()))
    again = generate(dataclasses.replace(given, out=both.out), model)
    assert again.folder == run.folder and again.sampled == 0


def test_control_acts_and_scale_0_is_no_control(config, model):
    plain, zero, steered = (
        pixels_of(generate(config(controls=c), model)) for c in ({}, {"canny": {**CANNY, "scale": 0}}, {"canny": CANNY})
    )
    assert np.array_equal(plain, zero) and np.abs(plain - steered).max() > 2
    both = pixels_of(generate(config(controls={"canny": CANNY, "depth": DEPTH}), model))
    other = pixels_of(generate(config(controls={"depth": DEPTH}), model))
    assert min(np.abs(both - one).max() for one in (plain, steered, other)) > 2
    late = pixels_of(generate(config(controls={"canny": {**CANNY, "start": 0.5}}), model))
    assert min(np.abs(late - one).max() for one in (plain, steered)) > 0


def test_every_image_has_its_own_control_whatever_the_batch(config, model, tmp_path):
    given = {"compare": [{"sag": {"scale": 0.75}}], "seeds": "0-3", "controls": {"canny": CANNY, "depth": DEPTH}}
    places = [{"batch_size": n, "out": str(tmp_path / str(n))} for n in (4, 1)]
    whole, single = (generate(config(**given, **place), model) for place in places)
    assert whole.folder.name == single.folder.name
    assert np.abs(pixels_of(whole) - pixels_of(single)).max() <= 1
    alone = generate(config(**given | {"seeds": "2", "controls": {
        "canny": {**CANNY, "image": "scene:2"}, "depth": {**DEPTH, "image": "scene:2-"}}}), model)  # fmt: skip
    assert np.abs(pixels_of(alone) - pixels_of(whole)[[2, 6]]).max() <= 1


def test_sizes_that_are_not_square_and_a_sampler_that_cuts_rows(config, model):
    churning = {"name": "euler", "options": {"s_churn": 0.5}}
    run = generate(config(size=(16, 24), sampler=churning, controls={"a": CANNY, "b": DEPTH}), model)
    assert {Image.open(path).size for path in run.folder.glob("controls/*/*.png")} == {(24, 16)}
    assert sorted(p.name for p in (run.folder / "controls").iterdir()) == ["a", "b"] and run.sampled == 2


def test_the_identity_is_of_what_the_control_image_shows(config, photo, tmp_path, controlled_folder):
    def place(**changes) -> str:
        asked = config(seeds="0", controls={"canny": {**CANNY, "image": str(photo), **changes}})
        return expand(asked).folder.name

    base = place()
    moved = tmp_path / "elsewhere" / "same.png"
    moved.parent.mkdir()
    shutil.copy(photo, moved)
    assert base == place(image=str(moved)) == place(image=[str(moved)]) == place(depth_model="unused")
    changes = [{"low": 50}, {"scale": 0.5}, {"start": 0.5}, {"end": 0.5}, {"guess": True}, {"preprocess": "none"},
               {"net": "depth"}, {"image": "scene:0"}, {"image": "scene:1"}]  # fmt: skip
    assert len({base, *(place(**change) for change in changes)}) == len(changes) + 1
    assert place(image="scene:1") == place(image="scene:1-") == place(image="scene:1", low=50)
    Image.new("RGB", (30, 20)).save(photo)
    assert place() != base
    assert place(image=str(moved), net=str(controlled_folder / "controlnet" / "canny")) == base


def test_guess_mode_is_for_the_conditional_branch(config, model):
    guided = {"terms": {"cfg": {"kind": "cfg", "weight": 3}}}
    plain, guess = (
        pixels_of(generate(config(guidance=guided, controls={"canny": {**CANNY, "guess": g}}), model))
        for g in (False, True)
    )
    assert np.abs(plain - guess).max() > 2


def test_a_map_of_ones_own_and_a_photo_in_turn(config, model, photo, tmp_path):
    Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)).save(tmp_path / "map.png")
    files = [str(tmp_path / "map.png"), str(photo)]
    run = generate(config(seeds="5-7", controls={"d": {**DEPTH, "preprocess": "none", "image": files}}), model)
    read = [records.read_record(p) for p in sorted((run.folder / "images").rglob("*.png"))]
    assert [record["controls"]["d"]["image"] for record in read] == [files[0], files[1], files[0]]
    shown = np.asarray(Image.open(run.folder / "controls" / "d" / "seed7.png"))
    assert np.abs(shown[:, :, 0].flatten() - np.linspace(0, 255, 256)).max() < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"net": "cany"}, "controls.canny.net: unknown controlnet 'cany': the model has canny, depth"),
        ({"net": "nobody/net"}, "hf download nobody/net"),
        ({"image": "none.png"}, "controls.canny.image: none.png: no such file"),
        ({"image": []}, "controls.canny.image: no image"),
        ({"image": ""}, "controls.canny.image: no image"),
        ({"image": "."}, "a folder, not an image"),
        ({"image": "scene:"}, "names no scenes"),
        ({"image": "scene:3-1"}, "names no scenes"),
        ({"image": "scene:-1"}, "names no scenes"),
        ({"image": "scene:9999999999"}, "names no scenes"),
        ({"image": "scene:0-2"}, "3 images, 2 seeds"),
        ({"low": 300}, "controls.canny.low: 300 is above high, 200"),
        ({"start": 0.5, "end": 0.5}, "controls.canny.start: 0.5 is not below end, 0.5"),
        ({"preprocess": "depth", "image": "a.png"}, "controls.canny.depth_model: missing, and a.png needs one"),
        ({"preprocess": "depth", "image": PHOTO, "depth_model": "no/such"}, "hf download no/such"),
        ({"preprocess": "depth", "image": "a.png", "depth_model": "no/such"}, "a.png: no such file"),
        ({"scale": "inf"}, "controls.canny.scale: inf is not finite"),
    ],
)
def test_what_cannot_be_is_one_line_before_an_image_is_made(config, model, change, words):
    with pytest.raises(ValueError) as caught:
        generate(config(controls={"canny": {**CANNY, **change}}), model)
    asset = "hf download" in words or "unknown controlnet" in words
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert cli.explained(caught.value)[0] == (3 if asset else 2)
    assert not list(Path(config().out).rglob("*.png"))


def test_a_model_loaded_without_the_controlnet_is_refused(config, controlled_folder):
    with pytest.raises(ConfigError, match="loaded without 'canny'"):
        generate(config(), load_model(controlled_folder, controlnet="depth"))


def test_types_of_controls_are_strict():
    control = GenerateConfig.__annotations__["controls"]
    cases = [
        ({"canny": {"net": "a"}}, "controls.canny.image: missing"),
        ({"canny": {**CANNY, "imag": 1}}, "did you mean image"),
        ({"canny": {**CANNY, "preprocess": "cany"}}, "did you mean canny"),
        ({"canny": {**CANNY, "start": 2}}, "start: 2 is out of range; it must be a number from 0 to 1"),
        ({"canny": {**CANNY, "low": -1}}, "low: -1 is out of range"),
        ({"canny": {**CANNY, "scale": "big"}}, "scale: 'big' is not a number"),
        ({"canny": {**CANNY, "image": 3}}, "image: 3 is not text or a list"),
        ({"canny": "photo.png"}, "'photo.png' is not a mapping of net, image"),
        ([CANNY], "is not a mapping"),
    ]
    for value, words in cases:
        with pytest.raises(ConfigError) as caught:
            typed(control, value, "controls")
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_images_are_named_one_for_each_seed():
    assert control_images("scene:12", 3, "x") == ("scene:12",) * 3
    assert control_images("scene:4-5", 3, "x") == ("scene:4", "scene:5", "scene:4")
    assert control_images("scene:7,1", 2, "x") == ("scene:7", "scene:1")
    assert control_images("scene:9-", 3, "x") == ("scene:9", "scene:10", "scene:11")
    assert control_images(("a.png", "scene:2"), 2, "x") == ("a.png", "scene:2")


def test_groups_controls_of_panels_and_captions():
    assert composed().controls == {} and composed("controlnet=none").controls == {}
    canny = composed("controlnet=canny", "controls.canny.image=photo.png", "controls.canny.scale=0.5").controls["canny"]
    assert (canny.net, canny.image, canny.preprocess, canny.scale) == ("canny", "photo.png", "canny", 0.5)
    both = composed("controlnet=canny_depth", "model=sdxl").controls
    assert [c.net for c in both.values()] == [
        "diffusers/controlnet-canny-sdxl-1.0",
        "diffusers/controlnet-depth-sdxl-1.0",
    ]
    assert all(c.scale == 0.5 for c in both.values())
    config = composed("controlnet=depth", "panels=[{controlnet: [canny, depth], controls: {canny: {scale: 3}}}, {}]")
    own, taken = panels(config)
    assert list(own.controls) == ["canny", "depth"] and own.controls["canny"].scale == 3
    assert list(taken.controls) == ["depth"]
    with pytest.raises(ConfigError, match=r"panels.0.controlnet: no controlnet 'cany'; did you mean canny\?"):
        composed("panels=[{controlnet: cany}]")
    (panel,) = panels(composed("prompts=scene:3-", "pairing=zip", "seeds=0-2"))
    assert [row.prompt for row in panel.rows] == captions([HELD_OUT + 3, HELD_OUT + 4, HELD_OUT + 5])


def test_figure_4_has_each_control_without_and_with_text():
    plan = panels(composed("experiment=fig4"))
    assert [list(panel.controls) for panel in plan] == [["canny"], ["depth"], ["canny"], ["depth"]]
    assert [bool(panel.rows[0].prompt) for panel in plan] == [False, False, True, True]
    for panel in plan:
        assert list(panel.methods) == ["σ = 0", "σ = 1", "σ = 2", "σ = 5", "σ = 10", "σ = ∞"]
        terms = [guidance.terms for guidance in panel.methods.values()]
        assert terms[0] == {} and [t["seg"].perturbation.sigma for t in terms[1:]] == [1, 2, 5, 10, float("inf")]
