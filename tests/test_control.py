"""Control images: any mode, size or orientation is normalised or refused in one line; edges; depth; scenes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from segresearch.config import ControlConfig
from segresearch.config.expand import HELD_OUT
from segresearch.control_images.prepare import canny, control_image, depth, located_depth, scene_maps, to_tensor
from segresearch.errors import InputError
from segresearch.image_files import fit, open_image, open_map
from segresearch.scenes.scenes import depth_image, edge_image, scenes


def corners() -> Image.Image:
    """24 × 16: red, green, blue and white quarters, clockwise from the upper left."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12, 0] = pixels[:8, 12:, 1] = pixels[8:, 12:, 2] = 255
    pixels[8:, :12] = 255
    return Image.fromarray(pixels)


FINE = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}


def save(image: Image.Image, path, **options) -> None:
    image.save(path, **FINE.get(path.suffix[1:], {}), **options)


def quarters(image: Image.Image) -> list[tuple[int, ...]]:
    w, h = image.size
    left, right, top, bottom = w // 4, w - 1 - w // 4, h // 4, h - 1 - h // 4
    return [image.getpixel(at) for at in ((left, top), (right, top), (right, bottom), (left, bottom))]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def near(found, expected, by=3) -> bool:
    return bool((np.abs(np.array(found, int) - np.array(expected, int)) <= by).all())


@pytest.mark.parametrize(
    ("mode", "name", "by"),
    [
        ("RGB", "a.png", 0), ("RGB", "a.jpg", 8), ("RGB", "a.webp", 0), ("RGB", "a.bmp", 0), ("RGB", "a.ppm", 0),
        ("RGB", "a.tif", 0), ("P", "a.gif", 0), ("P", "a.png", 0), ("RGBA", "a.png", 0), ("CMYK", "a.tif", 0),
        ("CMYK", "a.jpg", 8), ("YCbCr", "a.jpg", 8), ("LAB", "a.tif", 255),
    ],
)  # fmt: skip
def test_colours_of_every_mode(tmp_path, mode, name, by):
    image = corners()
    image = Image.new("LAB", image.size) if mode == "LAB" else image.convert(mode)
    save(image, tmp_path / name)
    found = open_image(tmp_path / name)
    assert found.mode == "RGB" and found.size == (24, 16)
    assert near(quarters(found), [RED, GREEN, BLUE, WHITE], by)


def ramp(bits: type) -> np.ndarray:
    top = np.iinfo(bits).max if bits is not np.int32 else 65535
    return np.linspace(0, top, 16 * 24).reshape(16, 24).round().astype(bits)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (ramp(np.uint8), "a.png"), (ramp(np.uint16), "a.png"), (ramp(np.uint16), "a.tif"), (ramp(np.int32), "a.tif"),
        (ramp(np.uint16).astype(np.float32) / 65535, "a.tif"), (ramp(np.uint16), "a.ppm"),
    ],
)  # fmt: skip
def test_grey_of_every_depth(tmp_path, values, name):
    Image.fromarray(values).save(tmp_path / name)
    expected = np.linspace(0, 255, 16 * 24).reshape(16, 24)
    found = np.asarray(open_image(tmp_path / name))
    assert found.shape == (16, 24, 3) and near(found, expected[:, :, None], 1)
    assert len(np.unique(found)) > 200  # no clipping at 255
    mapped = to_tensor(open_map(tmp_path / name))
    deep = values.dtype != np.uint8
    exact = torch.linspace(0, 1, 16 * 24).view(1, 1, 16, 24).expand(1, 3, -1, -1)
    assert (mapped - exact).abs().max() < (1e-5 if deep else 2e-3)
    Image.fromarray(ramp(np.uint8)).convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(np.asarray(open_image(tmp_path / "bits.png")))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_parts_are_white_in_photos_and_black_in_maps(tmp_path, mode):
    file = tmp_path / "a.png"
    grey = Image.new("L", (8, 4), 99)
    if mode in ("RGBA", "LA"):
        alpha = Image.new("L", grey.size, 0)
        alpha.paste(255, (4, 0, 8, 4))
        image = grey.convert(mode)
        image.putalpha(alpha)
        image.save(file)
    else:
        grey.paste(0, (0, 0, 4, 4))
        clear = {"RGB": (0, 0, 0), "L": 0, "P": 0}[mode]
        image = grey.convert(mode)
        if mode == "P":
            clear = image.getpixel((0, 0))
        image.save(file, transparency=clear)
    for found, behind in ((open_image(file), 255), (open_map(file), 0)):
        assert found.getpixel((1, 1)) == (behind,) * 3 and found.getpixel((6, 1)) == (99,) * 3
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    half.save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png").getpixel((0, 0)) == (204,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_rotation_of_exif_is_applied(tmp_path, orientation, name):
    turns = Image.Transpose
    undo = {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
            6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270}  # fmt: skip
    stored = corners() if orientation == 1 else corners().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(stored, tmp_path / name, exif=exif)
    found = open_image(tmp_path / name)
    assert found.size == (24, 16) and near(quarters(found), [RED, GREEN, BLUE, WHITE], 8)


@pytest.mark.parametrize("junk", [b"Exif\0\0garbage", b"Exif\0\0II*\0", b""])
def test_damaged_exif_is_passed_over(tmp_path, junk):
    save(corners(), tmp_path / "a.jpg", exif=junk)
    assert near(quarters(open_image(tmp_path / "a.jpg")), [RED, GREEN, BLUE, WHITE], 8)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_of_several_frames_the_first_is_taken(tmp_path, name):
    save(corners(), tmp_path / name, save_all=True, append_images=[corners().rotate(180)])
    assert near(quarters(open_image(tmp_path / name)), [RED, GREEN, BLUE, WHITE], 3)


def refusals(tmp_path):
    corners().save(tmp_path / "whole.png")
    corners().resize((240, 160)).save(tmp_path / "whole.jpg")
    png, jpg = (tmp_path / "whole.png").read_bytes(), (tmp_path / "whole.jpg").read_bytes()
    contents = {
        "cut.png": (png[: len(png) // 2], "damaged or incomplete"),
        "start.png": (png[:20], "damaged or incomplete"),
        "cut.jpg": (jpg[: len(jpg) // 2], "damaged or incomplete"),
        "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "damaged or incomplete"),
        "empty.png": (b"", "empty"),
        "text.png": (b"not an image at all", "not an image of a known format"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    }
    for name, (data, words) in contents.items():
        (tmp_path / name).write_bytes(data)
        yield tmp_path / name, words
    for name, value, words in (
        ("big.tif", np.full((4, 4), 70000, np.int32), "integer values from 70000"),
        ("negative.tif", np.full((4, 4), -1, np.int32), "integer values from -1"),
        ("float.tif", np.full((4, 4), 7.5, np.float32), "float values from 7.5"),
        ("nan.tif", np.full((4, 4), np.nan, np.float32), "values that are not finite"),
    ):
        Image.fromarray(value).save(tmp_path / name)
        yield tmp_path / name, words
    yield tmp_path, "a folder"
    yield tmp_path / "none.png", "no such file"
    yield "https://example.org/a.png", "download it first"
    yield "/dev/null", "not a file"


def test_what_is_no_image_is_refused_in_one_line_with_its_name(tmp_path):
    seen = 0
    for path, words in refusals(tmp_path):
        for call in (open_image, open_map):
            with pytest.raises(ValueError) as caught:
                call(path)
            said = str(caught.value)
            assert words in said and "\n" not in said and str(path).split("/")[-1] in said
            seen += 1
    assert seen == 32


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    for limit in (1199, 400):  # Pillow warns above the limit, and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=f"more pixels than the limit of {limit:,}; save it smaller"):
            open_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert open_image(tmp_path / "a.png").size == (40, 30)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (3, 40), (40, 3), (1, 1), (32, 48)])
def test_fit_keeps_the_aspect_and_the_centre(size):
    image = fit(corners(), size)
    assert image.size == size[::-1]
    if min(size) >= 8:
        assert near(quarters(image), [RED, GREEN, BLUE, WHITE], 40)
    if size == (16, 24):
        assert np.array_equal(image, corners())
    with pytest.raises(ValueError, match="at least 1"):
        fit(corners(), (0, 8))


def test_fit_cuts_sides_evenly_and_small_images_are_enlarged():
    wide = np.zeros((10, 30), np.float32)
    wide[:, 10:20] = 1
    assert (np.asarray(fit(Image.fromarray(wide), (10, 10))) == 1).all()
    assert (np.asarray(fit(Image.fromarray(wide.T.copy()), (10, 10))) == 1).all()
    one = fit(Image.new("RGB", (1, 1), (9, 8, 7)), (12, 20))
    assert one.size == (20, 12) and one.getcolors() == [(240, (9, 8, 7))]
    assert fit(Image.new("L", (5000, 1)), (16, 16)).size == (16, 16)
    squashed = Image.fromarray(np.ascontiguousarray(wide[:, ::3]))  # shows what `wide` does
    assert (np.asarray(fit(squashed, (4, 4), aspect=3.0))[:, 1:3] > 0.9).all()


def test_tensors_are_rgb_from_0_to_1():
    x = to_tensor(corners())
    assert x.shape == (1, 3, 16, 24) and x.dtype == torch.float32 and x[0, :, 2, 2].tolist() == [1, 0, 0]
    overshoot = to_tensor(Image.fromarray(np.array([[-0.1, 0.5, 1.2]], np.float32)))
    assert torch.equal(overshoot[0, 1], torch.tensor([[0, 0.5, 1]]))


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (2, 3), (1, 1), (1, 9)])
def test_edges_of_images_of_any_size(size):
    x = canny(fit(corners(), size))
    assert x.shape == (1, 3, *size) and set(x.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    if min(size) > 9:
        h, w = size
        assert x[0, 0, :, w // 2 - 2 : w // 2 + 2].any(dim=1).float().mean() > 0.8  # the upright line
        assert not x[0, 0, : h // 2 - 2, : w // 2 - 2].any()  # nothing in a plain part
    assert not canny(Image.new("RGB", size[::-1], (7, 99, 200))).any()


def test_thresholds_of_canny():
    soft = Image.fromarray(np.linspace(0, 250, 64, dtype=np.uint8)[None].repeat(64, 0))
    assert not canny(soft).any() and canny(soft, 5, 10).any()
    for low, high in ((-1, 5), (9, 5), (0, float("nan"))):
        with pytest.raises(ValueError, match="0 <= low <= high"):
            canny(soft, low, high)


@pytest.fixture(scope="module")
def estimator(tmp_path_factory):
    """A depth estimator of random weights."""
    folder = tmp_path_factory.mktemp("depth") / "dpt"
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, head_in_index=-1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DPTForDepthEstimation(config)
    torch.nn.init.constant_(model.head.head[4].weight, 1e3)  # so that the last ReLU cuts nothing, and it varies
    model.save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_depth_is_inverse_normalised_and_as_large_as_asked(estimator):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    before = torch.get_rng_state()
    x = depth(photo, estimator)
    assert torch.equal(before, torch.get_rng_state())
    assert x.shape == (1, 3, 40, 60) and x.min() == 0 and x.max() == 1 and torch.equal(x[:, 0], x[:, 2])
    square = depth(photo, estimator, (32, 32))
    assert square.shape == (1, 3, 32, 32) and square.min() == 0 and square.max() == 1
    middle = fit(Image.fromarray(x[0, 0].numpy()), (32, 32))  # the same cut
    assert np.corrcoef(np.asarray(middle).flat, square[0, 0].numpy().flat)[0, 1] > 0.95
    assert depth(Image.new("RGB", (1, 1)), estimator, (16, 8)).shape == (1, 3, 16, 8)
    with torch.no_grad():
        inputs = DPTImageProcessor.from_pretrained(estimator)(images=photo, return_tensors="pt")
        raw = DPTForDepthEstimation.from_pretrained(estimator).eval()(**inputs).predicted_depth[0]
    expected = torch.nn.functional.interpolate(raw[None, None], (40, 60), mode="bicubic", antialias=True)[0, 0]
    assert np.corrcoef(expected.numpy().flat, x[0, 0].numpy().flat)[0, 1] > 0.99  # near (large) is bright


def test_a_depth_estimator_that_is_not_there_or_not_whole(estimator, tmp_path):
    def said(model) -> str:
        with pytest.raises(ValueError) as caught:
            depth(corners(), model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "hf download nobody/nothing --include" in said("nobody/nothing")
    assert "no such folder" in said(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "no preprocessor_config.json, *.safetensors there" in said(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((estimator / "preprocessor_config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((estimator / "model.safetensors").read_bytes())
    assert "not a depth estimator of transformers" in said(tmp_path)
    (tmp_path / "config.json").write_bytes((estimator / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    assert "not a depth estimator of transformers" in said(tmp_path)
    assert located_depth(estimator) == estimator


def control(**changes) -> ControlConfig:
    return ControlConfig(**{"net": "canny", "image": "scene:0-", **changes})


@pytest.mark.parametrize("size", [(64, 64), (32, 48)])
def test_control_images_of_scenes_are_their_exact_maps(size):
    made = scenes([HELD_OUT + 3], size=size)
    assert torch.equal(control_image(control(preprocess="canny"), "scene:3", size), edge_image(made.edges))
    assert torch.equal(control_image(control(preprocess="depth"), "scene:3", size), depth_image(made.depth))
    assert torch.equal(control_image(control(), "scene:3", size), made.images.float() / 255)
    both = scene_maps(["scene:7", "scene:3"], "canny", size)
    assert torch.equal(both[1:], edge_image(made.edges)) and not torch.equal(both[0], both[1])


def test_control_images_of_files(tmp_path, estimator):
    corners().save(tmp_path / "a.png")
    file, size = str(tmp_path / "a.png"), (8, 8)
    edges = control_image(control(preprocess="canny", low=50.0), file, size)
    assert torch.equal(edges, canny(fit(corners(), size), 50, 200))
    near = control_image(control(preprocess="depth", depth_model=str(estimator)), file, size)
    assert torch.equal(near, depth(corners(), estimator, size))
    assert torch.equal(control_image(control(), file, (16, 24)), to_tensor(corners()))
    Image.fromarray(ramp(np.uint16)).save(tmp_path / "deep.png")
    deep = control_image(control(), str(tmp_path / "deep.png"), (16, 24))
    assert len(deep[0, 0].unique()) == 16 * 24  # more than 8 bits of it arrive


def test_a_depth_model_runs_no_code_of_its_folder(estimator, tmp_path):
    folder = shutil.copytree(estimator, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForDepthEstimation": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\nclass OwnConfig: pass\nclass Own: pass\n")
    with pytest.raises(InputError) as error:
        depth(Image.new("RGB", (32, 32)), folder)
    assert "\n" not in str(error.value) and not (tmp_path / "PWNED").exists()
