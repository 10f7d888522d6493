"""Features of real images are computed once for the same images, and again where one changed."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segresearch.errors import ConfigError, InputError
from segresearch.evaluation.reference_images import CONTENTS, features, reference
from segresearch.metrics.features import Extractor, load_extractor
from segresearch.scenes.scenes import scenes


@pytest.fixture
def extractor():
    return counting("0123")


def counting(weights):
    """The mean colour of an image; `seen` lists the images that it was given."""
    seen = []

    def colour(images):
        seen.extend(range(len(images)))
        return images.double().mean((2, 3)).float()

    made = Extractor("colour", 3, weights, colour)
    object.__setattr__(made, "seen", seen)
    return made


def folder(path, colours):
    path.mkdir(parents=True)
    for i, colour in enumerate(colours):
        Image.new("RGB", (8, 8), colour).save(path / f"{i}.png")
    return str(path)


def test_the_same_images_are_computed_once_whatever_they_are_called(extractor, tmp_path):
    one = folder(tmp_path / "one", ["red", "blue", "lime"])
    first = features(reference(one), extractor, tmp_path / "runs")
    assert len(extractor.seen) == 3
    two = tmp_path / "two"
    two.mkdir()
    for i in range(3):  # the same bytes, other names
        shutil.copyfile(f"{one}/{i}.png", two / f"photo{i}.png")
    for text in (one, str(two), os.path.relpath(one)):
        assert torch.equal(features(reference(text), extractor, tmp_path / "runs"), first) and len(extractor.seen) == 3
    other = counting("4567")  # another network computes its own
    features(reference(one), other, tmp_path / "runs")
    assert len(other.seen) == 3


def test_a_file_that_changed_is_noticed_even_at_the_same_size_and_time(extractor, tmp_path):
    one = folder(tmp_path / "one", ["red", "blue"])
    features(reference(one), extractor, tmp_path / "runs")
    before = os.stat(f"{one}/1.png")
    Image.new("RGB", (8, 8), "cyan").save(f"{one}/1.png")
    os.utime(f"{one}/1.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy keeps it
    again = features(reference(one), extractor, tmp_path / "runs")
    assert len(extractor.seen) == 4 and again[1].tolist() == [0, 255, 255]
    after = os.stat(f"{one}/1.png")
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert reference(one).identity() == reference(one).identity()


def test_files_are_read_once_for_their_digests_and_an_odd_list_of_them_is_made_anew(extractor, tmp_path, monkeypatch):
    one, out = folder(tmp_path / "one", ["red", "blue"]), tmp_path / "runs"
    digest = reference(one).content(out)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert reference(one).content(out) == digest
    monkeypatch.undo()
    for text in ("[", "5", "[" * 100_000, '{"' + str(tmp_path / "one" / "0.png") + '": 5}'):
        (out / "reference" / CONTENTS).write_text(text)
        assert reference(one).content(out) == digest
    (tmp_path / "one" / "0.png").unlink()
    images = reference(folder(tmp_path / "three", ["red", "blue"]))
    (tmp_path / "three" / "1.png").unlink()
    with pytest.raises(ConfigError, match="reference: .*1.png: No such file"):
        images.content(out)
    scenes = reference("scene:0-3")
    assert scenes.content(out) == scenes.identity()  # of scenes nothing changed


def test_a_folder_of_rendered_scenes_is_the_reference_of_these_scenes(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    for i, pixels in enumerate(scenes(range(10_100_000, 10_100_006)).images):
        path = tmp_path / "real" / ("deep" if i > 3 else "") / f"{i}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    mini, files = load_extractor("mini"), str(tmp_path / "real")
    from_files, rendered = (features(reference(text), mini, str(tmp_path)) for text in (files, "scene:100000-100005"))
    assert torch.allclose(from_files.sum(0), rendered.sum(0), atol=1e-3) and len(from_files) == 6
    (tmp_path / "real" / "7.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="7.png"):
        features(reference(files), mini, str(tmp_path))


def test_files_of_any_mode_are_read_as_they_are_seen(tmp_path):
    """16-bit grey is scaled, transparent parts are white, EXIF turns; all as 8-bit RGB."""
    Image.fromarray(np.array([[0, 65535], [32768, 257]], dtype=np.uint16)).save(tmp_path / "0.png")
    Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(tmp_path / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (2, 1), "black").save(tmp_path / "2.jpg", exif=exif)
    Image.new("P", (1, 1)).save(tmp_path / "3.bmp")
    grey, transparent, turned, indexed = (batch for _, batch in reference(str(tmp_path)).batches())
    assert grey.shape == (1, 3, 2, 2) and grey[0, 0].tolist() == [[0, 255], [128, 1]]
    assert transparent[0, :, 0, 0].tolist() == [255, 255, 255]
    assert turned.shape == (1, 3, 2, 1) and indexed.shape == (1, 3, 1, 1)


def test_files_that_are_left_out_are_counted(tmp_path):
    one = folder(tmp_path / "one", ["red", "blue"])
    (tmp_path / "one" / "2.png").symlink_to("nowhere")
    (tmp_path / "one" / "a.gif").write_bytes(b"")
    (tmp_path / "one" / "notes.txt").write_bytes(b"")
    with pytest.warns(UserWarning, match="2.png is left out, of 2 files; readable .png, .jpg"):
        images = reference(one)
    assert len(images) == 2 and images.text == one and images.identity()


def test_an_image_that_cannot_be_read_or_measured_is_named(extractor, tmp_path):
    path = folder(tmp_path / "one", ["red", "blue"])
    png = Path(path, "1.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    cases = [(bomb, "more pixels than the limit"), (png[:45], "damaged or incomplete")]
    for data, words in [*cases, (b"text", "known format"), (b"", "empty")]:
        (tmp_path / "one" / "1.png").write_bytes(data)
        with pytest.raises(InputError, match=f"^{path}/1.png: .*{words}"):
            features(reference(path), extractor, tmp_path / "runs")

    def tiny(images):
        raise InputError("too small")

    Image.new("RGB", (8, 8)).save(f"{path}/1.png")
    with pytest.raises(InputError, match=f"^{path}/0.png: too small$"):
        features(reference(path), Extractor("tiny", 1, "0", tiny), tmp_path / "runs")
