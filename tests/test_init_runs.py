"""Runs that start from images: what is sampled, recorded and identified, in generate, evaluate and analyze."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import composed, one_figure
from PIL import Image

from segresearch import records
from segresearch.analysis.analyze import analyze
from segresearch.config import AnalyzeConfig, EvaluateConfig, GenerateConfig, typed
from segresearch.config.expand import HELD_OUT
from segresearch.errors import ConfigError
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.image_metrics import psnr
from segresearch.generate import expand, generate
from segresearch.guidance import GuidedDenoiser
from segresearch.init_images import identify_init, init_images, pixels
from segresearch.reproduce import reproduce
from segresearch.sample_images import to_uint8
from segresearch.sampling import ImageStart, initial_noise, sample
from segresearch.scenes.scenes import object_masks, scenes

SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}


@pytest.fixture
def config(folder, tmp_path):
    def made(kind=GenerateConfig, **changes):
        given = {
            "model": {"name": "tiny", "path": str(folder)}, "sampler": {"name": "euler"}, "steps": 4,
            "schedule": {"name": "leading"}, "guidance": {"terms": {"seg": SEG}}, "seeds": "0-1",
            "device": "cpu", "out": str(tmp_path / "runs"), "batch_size": 3,
        }  # fmt: skip
        given |= changes
        return typed(kind, {key: value for key, value in given.items() if value is not None})

    return made


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


@pytest.fixture
def mask(tmp_path):
    path = tmp_path / "mask.png"
    values = np.zeros((16, 16), np.uint8)
    values[:, 6:] = 255
    Image.fromarray(values).save(path)
    return str(path)


def arrays(run) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((run.folder / "images").rglob("*.png"))])


def test_it_is_sampling_by_hand(config, model, photo, mask):
    run = generate(config(guidance={}, init={"image": photo, "mask": mask, "strength": 0.75}), model)
    values = torch.from_numpy(np.asarray(Image.open(photo)).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    where = torch.from_numpy(np.asarray(Image.open(mask)).copy())[None, None] / 255
    start = ImageStart(model.encode_images(values), 0.75, model.latent_mask(where))
    conds = model.encode(["", ""])
    with torch.no_grad():
        latents = sample(
            GuidedDenoiser(model.denoiser, {}), initial_noise((0, 1), model.latent_shape()), steps=4, conds=conds,
            start=start,
        )  # fmt: skip
        expected = to_uint8(model.decode(latents)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(arrays(run), expected)


def test_records_identify_by_content_and_are_followed(config, model, photo, mask, tmp_path):
    init = {"image": photo, "mask": mask, "strength": 0.5, "draw": True, "paste": True}
    run = generate(config(init=init), model)
    path = next((run.folder / "images").rglob("*seed1.png"))
    said = records.read_record(path)
    assert said["init"] == {**init, "reduce": 1}
    assert set(said["init_contents"]) == {"image", "mask"} and {len(d) for d in said["init_contents"].values()} == {12}
    with pytest.raises(ConfigError, match="names the file .*png .init"):
        reproduce(path, model=said["model"]["path"])
    again = reproduce(path, trust=True)
    assert again.largest == 0 and not again.notes
    renamed = tmp_path / "other.png"
    renamed.write_bytes(open(photo, "rb").read())
    assert expand(config(init={**init, "image": str(renamed)})).folder == run.folder
    changes = ({"strength": 0.75}, {"draw": False}, {"paste": False}, {"reduce": 2}, {"mask": None, "paste": False})
    folders = {expand(config(init=init | change)).folder for change in changes}
    assert len(folders | {run.folder, expand(config()).folder}) == len(changes) + 2
    Image.fromarray(255 - np.asarray(Image.open(photo))).save(photo)
    assert expand(config(init=init)).folder != run.folder
    assert [note for note in reproduce(path, trust=True).notes if "contents of init image" in note]


def test_a_run_without_an_image_is_what_it_was(config):
    """The identity and the records of runs that start from noise know nothing of this."""
    run = expand(config())
    assert "init" not in json.dumps(run.identity)
    assert not any(
        key.startswith("init") for files in run.panels for r in files.images["SEG 2 σ=∞"].values() for key in r
    )


def test_each_seed_has_its_image_whatever_the_batch(config, model, tmp_path):
    init = {"image": "scene:3-", "mask": "scene:3-", "strength": 0.5}
    places = [{"batch_size": n, "out": str(tmp_path / str(n))} for n in (3, 1)]
    whole, single = (arrays(generate(config(init=init, seeds="0-2", size=(32, 48), **p), model)) for p in places)
    assert whole.shape == (3, 32, 48, 3) and np.abs(whole - single).max() <= 1
    alone = generate(config(init={**init, "image": "scene:4", "mask": "scene:4"}, seeds=1, size=(32, 48)), model)
    assert np.abs(arrays(alone)[0] - whole[1]).max() <= 1


def test_paste_gives_the_kept_pixels_back(config, model, photo, mask):
    init = {"image": photo, "mask": mask, "paste": True}
    pasted, plain = (arrays(generate(config(init={**init, "paste": p}), model)) for p in (True, False))
    original = np.asarray(Image.open(photo)).astype(int)
    assert np.array_equal(pasted[:, :, :6], np.stack([original[:, :6]] * 2))
    assert np.array_equal(pasted[:, :, 6:], plain[:, :, 6:]) and not np.array_equal(pasted, plain)


def test_the_page_shows_what_images_start_from(config, model, photo, mask):
    init = {"image": photo, "mask": mask, "strength": 0.75}
    folder = generate(config(init=init), model).folder
    whites = [np.asarray(Image.open(path)) for path in sorted((folder / "starts" / "mask").glob("*.png"))]
    assert len(whites) == 2 and (whites[0] == np.where(np.arange(16) < 6, 0, 255)).all()
    assert (np.asarray(Image.open(folder / "starts" / "image" / "seed0.png")) == np.asarray(Image.open(photo))).all()
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count('src="starts/') == 4 and "<th>start</th><th>made anew: white</th>" in page
    assert "strength 0.75, a mask" in page and "starts from one image and its noise" in page


def test_panels_have_their_own(config, model, photo, mask):
    panels = [
        {"title": "a", "init": {"image": photo, "strength": 0.5}},
        {"title": "b", "init": {"image": photo, "mask": mask}},
        {"title": "c"},
    ]
    run = generate(config(panels=panels), model)
    one = generate(config(init={"image": photo, "strength": 0.5}), model)
    assert run.sampled == 6 and np.array_equal(arrays(run)[:2], arrays(one))


def test_reduced_images(photo):
    (image,) = pixels([photo], (16, 16)).float() / 127.5 - 1
    init = typed(GenerateConfig, {
        "model": {"name": "m", "path": "p"}, "sampler": {"name": "euler"}, "schedule": {"name": "leading"},
        "init": {"image": photo, "reduce": 4},
    }).init  # fmt: skip
    reduced = init_images(init, [(photo,)], (16, 16)).images
    means = image.unflatten(1, (4, 4)).unflatten(3, (4, 4)).mean((2, 4))
    expected = torch.nn.functional.interpolate(means[None], size=(16, 16), mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(reduced, expected)
    with pytest.raises(ConfigError, match="init.reduce: 4 does not divide the sides of the images, 16×18"):
        init_images(init, [(photo,)], (16, 18))


def test_masks_of_scenes():
    """Exactly where the depth of the scene is not that of its floor and sky, and around it."""
    indices = [HELD_OUT + i for i in range(4)]
    drawn, exact, wide = scenes(indices), object_masks(indices), object_masks(indices, margin=4)
    assert exact.any((1, 2)).all() and not exact.all((1, 2)).any()
    depth = drawn.depth
    assert depth[exact].isfinite().all()
    around = torch.nn.functional.max_pool2d(exact.float()[:, None], 9, 1, 4)[:, 0].bool()
    assert torch.equal(wide, around)
    mirrored, there = depth.flip(2), exact.flip(2)  # the floor is as far on the left as on the right
    torch.testing.assert_close(depth[~exact & ~there], mirrored[~exact & ~there])
    assert (depth < mirrored)[exact & ~there].all()
    assert torch.equal(object_masks(indices[1:3]), exact[1:3])
    named = pixels(["scene:1", "scene:2"], (64, 64), masks=True)
    assert torch.equal(named[:, 0] == 255, wide[1:3])


def test_a_mask_may_be_grey_or_transparent(tmp_path):
    grey = Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8).repeat(8, 0).repeat(8, 1))
    deep = Image.fromarray(np.array([[0, 32000], [33000, 65535]], np.uint16).repeat(8, 0).repeat(8, 1))
    clear = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 8, 16, 16))
    expected = torch.zeros(1, 1, 16, 16)
    expected[..., 8:, :] = 1
    for name, image in (("grey", grey), ("deep", deep), ("clear", clear)):
        image.save(tmp_path / f"{name}.png")
        found = pixels([str(tmp_path / f"{name}.png")], (16, 16), masks=True) >= 128
        assert torch.equal(found.float(), expected), name


def test_a_mask_of_nothing_is_said(config, model, photo, tmp_path, capsys):
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    run = generate(config(seeds=0, init={"image": photo, "mask": str(tmp_path / "black.png")}), model)
    assert "black.png: a mask without white, so nothing is made anew" in capsys.readouterr().err
    values = pixels([photo], (16, 16)).float() / 127.5 - 1
    with torch.no_grad():
        expected = to_uint8(model.decode(model.encode_images(values)))[0].permute(1, 2, 0).numpy()
    assert np.abs(arrays(run)[0] - expected).max() <= 1


@pytest.mark.parametrize(
    "init, words",
    [
        ({"mask": "scene:0-"}, "init.mask: 'scene:0-' without an image"),
        ({"strength": 0.5}, "init.strength: 0.5 without an image"),
        ({"image": "scene:0-", "paste": True}, "init.paste: there is no mask"),
        ({"image": "scene:0-", "strength": 1.5}, "init.strength: 1.5 is out of range"),
        ({"image": "scene:0-", "strength": 0.2}, "init.strength: 0.2 of 4 steps leaves no step to sample; 0.25 is one"),
        ({"image": "scene:x"}, "init.image: 'scene:x' names no scenes"),
        ({"image": ["scene:0-2"]}, "init.image: each seed takes one image: 3 images, 2 seeds"),
        ({"image": "absent.png"}, "init.image: absent.png: no such file"),
        ({"image": "PHOTO", "mask": "absent.png"}, "init.mask: absent.png: no such file"),
        (
            {"image": "PHOTO", "mask": "WIDE"},
            r"wide.png has 24×16 pixels, its image .*photo.png has 16×16; give a mask",
        ),
        ({"image": "PHOTO", "reduce": 0}, "init.reduce: 0 is out of range"),
        ({"image": "PHOTO", "reduce": 3}, "init.reduce: 3 does not divide the sides of the images, 16×16"),
    ],
)
def test_errors_are_one_line(config, model, photo, tmp_path, init, words):
    Image.new("L", (24, 16), 255).save(tmp_path / "wide.png")
    files = {"PHOTO": photo, "WIDE": str(tmp_path / "wide.png")}
    init = {key: files.get(value, value) if isinstance(value, str) else value for key, value in init.items()}
    with pytest.raises(ConfigError, match=words) as error:
        generate(config(init=init), model)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_evaluate_measures_against_the_truth(config, model, folder, monkeypatch):
    monkeypatch.setattr("segresearch.evaluation.plots.draw", one_figure)
    given = {
        "seeds": None, "compare": [{}], "images": 4, "shard": 2, "batch_size": 2, "distances": ["mini"],
        "features": [], "text_alignment": "none", "reference": "scene:0-9", "size": [32, 32], "n_examples": 1,
        "wandb": {"mode": "off"}, "n_bootstrap": 2,
    }  # fmt: skip
    init = {"image": "scene:0-", "mask": "scene:0-", "strength": 0.5}
    result = evaluate(config(EvaluateConfig, init=init, **given), model).result
    names = {row.metric for row in result.frame.rows}
    assert {"psnr", "distance_to_truth-mini"} <= names
    truth = pixels([f"scene:{i}" for i in range(4)], (32, 32))
    anew = pixels([f"scene:{i}" for i in range(4)], (32, 32), masks=True) >= 128
    made = generate(config(guidance={}, seeds="0-3", init=init, size=[32, 32], batch_size=2), model)
    images = torch.from_numpy(arrays(made)).permute(0, 3, 1, 2).byte()
    expected = psnr(images, truth, anew).mean()
    assert result.frame["vanilla", "psnr"].value == pytest.approx(float(expected), rel=1e-5)
    longer = evaluate(config(EvaluateConfig, init=init, **{**given, "images": 6}), model)
    assert (longer.sampled, longer.existing) == (4, 8)  # the shards of the shorter run are those of the longer
    other = evaluate(config(EvaluateConfig, init={**init, "strength": 0.75}, **given), model)
    assert other.sampled == 8 and other.result.frame["vanilla", "psnr"].value != expected
    without = evaluate(config(EvaluateConfig, **given), model).result
    assert "psnr" not in {row.metric for row in without.frame.rows}


def test_psnr():
    images, truth = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8), torch.full((2, 3, 4, 4), 110, dtype=torch.uint8)
    truth[1, :, 0, 0] = 100
    where = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    where[:, :, 0, 0] = True
    assert psnr(images, truth)[0] == pytest.approx(10 * np.log10(255**2 / 100))
    found = psnr(images, truth, where)
    assert found[0] == pytest.approx(10 * np.log10(255**2 / 100)) and 68 < found[1] < 68.2


def test_analyze_from_an_image(config, model, photo, monkeypatch):
    monkeypatch.setattr("segresearch.analysis.energy_plots.draw", lambda *_: {})
    given = {"measured_steps": [0], "where": "mid", "prompts": [""], "guidance": {}, "batch_size": 2, "seeds": 0}
    runs = [analyze(config(AnalyzeConfig, init=init, **given), model) for init in ({}, {"image": photo})]
    tables = [(run.folder / "table.csv").read_text() for run in runs]
    first = [next(csv.DictReader(table.splitlines())) for table in tables]
    assert runs[0].folder != runs[1].folder and float(first[1]["sigma_t"]) < float(first[0]["sigma_t"])
    with pytest.raises(ConfigError, match="measured_steps: there is no step 3; 2 steps are 0 to 1"):
        config(AnalyzeConfig, init={"image": photo}, **{**given, "measured_steps": [3]})


def test_the_command_line(call, photo):
    from helpers import script

    code, out = call(
        script("generate").main,
        f"init.image={photo}",
        "init.strength=0.5",
        "steps=2",
        "seeds=0",
        "guidance=none",
        "out=r",
    )
    assert code == 0, out.err
    code, out = call(script("generate").main, "init.strength=0.5")
    assert code == 2 and out.err.strip() == "error: init.strength: 0.5 without an image; give init.image"
    assert composed("init.image=scene:0-").init.image == "scene:0-"
    assert dataclasses.asdict(composed().init)["image"] is None
    assert identify_init(composed().init, []).digests == {}
