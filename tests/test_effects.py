"""The measured effects: settings and their names, pictures that resume, scores reduced to a table."""

import json
import math

import numpy as np
import pytest
import torch

from experiments.mini import effects, effects_table
from experiments.mini.effects import INF, SETTINGS, Place, Setting, batches, complete, make_images
from experiments.mini.effects_table import BEGIN, END, markdown, mean_error, number, order, reduce, with_error
from experiments.mini.export_vision import export_attributes, export_vision
from segresearch.data.scenes import scenes
from segresearch.evaluation import Namer, VisionTower
from segresearch.models.locate import MINI


@pytest.fixture
def place(tmp_path):
    """`mini` with a small random vision tower and classifier beside its own parts."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in MINI.iterdir():
        if path.name not in ("vision", "attributes"):
            (folder / path.name).symlink_to(path)
    torch.manual_seed(0)
    tower, namer = VisionTower(8, 8, [64, 96]), Namer(8)
    torch.save({"weights": tower.state_dict()}, tmp_path / "clip.pt")
    torch.save({"weights": namer.state_dict(), "config": '{"width": 8}'}, tmp_path / "namer.pt")
    export_vision(folder, tmp_path / "clip.pt")
    export_attributes(folder, tmp_path / "namer.pt")
    return Place(str(folder), tmp_path / "runs", steps=1)


def test_settings_have_names_of_their_own_and_a_vanilla_before_them():
    assert len({s.name for s in SETTINGS}) == len(SETTINGS) == len(set(SETTINGS))
    for i, s in enumerate(SETTINGS):
        assert s.vanilla in SETTINGS[: i + 1] and s.vanilla.guidance == "vanilla"
        assert s.name.isascii() and " " not in s.name and "/" not in s.name
    assert Setting(text=True, weight=4, seg=1).name == "text-CFG-4-SEG-sigmainf-s1"
    assert Setting(control="canny", sag=0.75).group == "canny, no text"


def test_batches_cover_every_picture_once():
    assert [i for rows in batches(120) for i in rows] == list(range(120))
    assert batches(20) == [range(20)]


def test_folders_depend_on_setting_weights_and_sampling(place, tmp_path):
    one = place.folder(Setting())
    assert one == place.folder(Setting()) and one.parent == tmp_path / "runs" / "effects"
    others = [place.folder(Setting(seg=1)), Place(place.model, place.runs, steps=2).folder(Setting())]
    others += [Place(place.model, place.runs, steps=1, dtype="float32").folder(Setting())]
    assert len({one, *others}) == 4
    assert not place.available(Setting(control="nothing"))


def test_pictures_are_keyed_by_their_number_and_scale_zero_is_vanilla(place):
    whole = Place(place.model, place.runs, steps=2, dtype="float32")
    model = effects.load(whole, [])
    plain = effects.pictures(model, Setting(), range(3), 2)
    assert plain.dtype == torch.uint8 and plain.shape == (3, 3, 64, 64)
    again = effects.pictures(model, Setting(seg=0.0, pag=0.0), range(2, 3), 2)
    assert (again[0].int() - plain[2].int()).abs().max() <= 1
    for setting in (Setting(sag=0.75), Setting(text=True, weight=4, seg=1)):
        assert not torch.equal(effects.pictures(model, setting, range(2, 3), 2)[0], plain[2])


def test_control_images_are_those_of_the_scenes():
    held = scenes(range(effects.FIRST + 3, effects.FIRST + 5))
    edges, depth = (effects.control_images(kind, range(3, 5)) for kind in ("canny", "depth"))
    assert torch.equal(edges[:, 0] > 0, held.edges) and depth.shape == (2, 3, 64, 64)
    assert depth.min() == 0 and depth.max() == 1


def noise_pictures(model, setting, rows, steps):
    made = [torch.Generator().manual_seed(1000 * SETTINGS.index(setting) + i) for i in rows]
    return torch.stack([torch.randint(0, 256, (3, 64, 64), generator=g, dtype=torch.uint8) for g in made])


def test_images_resume_and_parts_share_them(place, monkeypatch):
    calls = []
    monkeypatch.setattr(effects, "load", lambda *_: None)
    monkeypatch.setattr(effects, "BATCH", 2)

    def counted(model, setting, rows, steps):
        calls.append((setting, rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noise_pictures(model, setting, rows, steps)

    monkeypatch.setattr(effects, "pictures", counted)
    some = SETTINGS[:2]
    with pytest.raises(KeyboardInterrupt):
        make_images(place, some, 6, (0, 2))
    assert not any(p.name.startswith(".") for p in place.runs.rglob("*"))
    make_images(place, some, 6, (1, 2))
    make_images(place, some, 6, (0, 2))
    assert all(complete(place.folder(s), 6) for s in some)
    assert len(calls) == 7 and len(set(calls)) == 6  # only the interrupted batch was made again
    make_images(place, some, 6, (0, 1))
    assert len(calls) == 7


def test_the_table_is_reduced_from_the_pictures(place, monkeypatch, tmp_path):
    monkeypatch.setattr(effects, "load", lambda *_: None)
    monkeypatch.setattr(effects, "pictures", noise_pictures)
    monkeypatch.setattr(effects_table, "REFERENCE", range(effects.FIRST + 500, effects.FIRST + 540))
    monkeypatch.setattr(effects_table, "GROUP", 10)
    some = [SETTINGS[1], SETTINGS[0], Setting(text=True)]
    make_images(place, some[:2], 40, (0, 1))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "effects.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    text = effects_table.write_table(place, some, 40, 5, docs)
    page = (docs / "effects.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page and text in page
    rows = json.loads((docs / "effects" / "effects.json").read_text())["rows"]
    assert [(r["group"], r["guidance"]) for r in rows] == [
        ("real", "held-out scenes"), ("real", "through the VAE"), ("no text", "vanilla"), ("no text", "SEG σ=∞ s=1"),
    ]  # fmt: skip
    real, _, vanilla, seg = rows
    assert vanilla["against_vanilla"] is None and vanilla["distance"] is None
    assert seg["against_vanilla"] == pytest.approx(seg["frechet"] - vanilla["frechet"])
    assert seg["distance"] > 0 and seg["n"] == 40 and seg["frechet_error"] > 0 and seg["seconds"] >= 0
    assert real["edges"] > 0.7 > vanilla["edges"]
    assert len((docs / "effects" / "effects.csv").read_text().splitlines()) == 5
    for name in ("effects.png", "samples.png"):
        assert (docs / "effects" / name).read_bytes().startswith(b"\x89PNG")
    assert markdown(reduce(place, some, 40, 5)) in text  # from the stored scores, the same


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "effects.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="marks"):
        effects_table.write_table(Place("mini", tmp_path), SETTINGS, 40, 5, tmp_path)
    assert page.read_text() == "text" and not (tmp_path / "effects").exists()


def test_numbers_are_written_with_their_errors():
    assert with_error(1.234, 0.056) == "1.23 ± 0.06" and with_error(1.0, math.nan) == "1.00" and number(math.nan) == ""
    mean, error = mean_error(np.array([1.0, math.nan, 3.0]))
    assert (mean, error) == (2.0, 1.0) and math.isnan(mean_error(np.array([math.nan]))[0])
    some = [Setting(seg=2), Setting(pag=1), Setting(seg=1, sigma=INF), Setting(seg=1, sigma=2), Setting()]
    ordered = [s.guidance for s in order(some, "no text", dict.fromkeys(some))]
    assert ordered == ["vanilla", "PAG s=1", "SEG σ=2 s=1", "SEG σ=∞ s=1", "SEG σ=∞ s=2"]
