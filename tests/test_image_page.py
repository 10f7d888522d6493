"""The grid and the page of a generate run: a column a method, one method alone as a sheet, links that lead on."""

import re
from urllib.parse import unquote

import pytest
from PIL import Image

from segresearch.config import GuidanceConfig
from segresearch.config.expand import ImageSpec, Panel
from segresearch.image_grid import draw_grid, text_width, wrap
from segresearch.image_page import PanelFiles, blocks, page

HOSTILE = '"><img src=x onerror=alert(1)>'


def files(folder, rows, names=("PAG",), title="", controls=()) -> PanelFiles:
    specs = tuple(ImageSpec(prompt, seed) for prompt, seed in rows)

    def saved(name):
        paths = [folder / "images" / f"{name}-{i} é#.png" for i in range(len(rows))]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40, 80, 120)).save(path)
        return paths

    images = {name: {path: {} for path in saved(number)} for number, name in enumerate(names)}
    panel = Panel(title, None, specs, dict.fromkeys(names, GuidanceConfig()))
    return PanelFiles(panel, images, {name: saved(name) for name in controls})


@pytest.mark.parametrize(("count", "shape"), [(2, [2]), (7, [3, 3, 1]), (64, [8] * 8), (70, [8] * 8 + [6])])
def test_one_method_alone_is_about_as_wide_as_high(count, shape, tmp_path):
    (block,) = blocks(files(tmp_path, [("a cube", i) for i in range(count)]), 80, 2)
    assert [len(paths) for paths in block.paths] == shape and block.title == "PAG: “a cube”"
    assert [path for paths in block.paths for path in paths] == sorted(tmp_path.rglob("*.png"), key=lambda p: int(
        p.stem.split("-")[1].split()[0]))  # fmt: skip
    sheet = draw_grid([block], "T", "", 96)
    assert sheet.width < 3 * sheet.height and sheet.height < 3 * sheet.width


def test_rows_are_prompts_where_all_have_the_same_seeds_and_pairs_stand_beside_each_other(tmp_path):
    (block,) = blocks(files(tmp_path, [(p, s) for p in ("", "a cube") for s in (3, 9)]), 64, 2)
    assert list(block.heads) == ["seed 3", "seed 9"] and block.captions == [("no prompt", ""), ("", "a cube")]
    pairs = [(f"prompt {i}", i) for i in range(5)]
    left, right = blocks(files(tmp_path, pairs, title="Alone"), 64, 2)
    assert (left.title, right.title) == ("Alone: PAG", "") and [len(b.paths) for b in (left, right)] == [3, 2]
    assert right.captions == [("seed 3", "prompt 3"), ("seed 4", "prompt 4")]
    assert [b.captions for b in blocks(files(tmp_path, [("", 1), ("", 5), ("", 4)]), 64, 2)][0][0] == ("seeds 1, 5", "")


@pytest.mark.parametrize("more", [{"names": ("PAG", "SEG")}, {"controls": ("canny",)}])
def test_several_columns_are_a_row_an_image(more, tmp_path):
    made = files(tmp_path, [("", 0), ("", 1)], **more)
    (block,) = blocks(made, 1, 2)
    assert list(block.heads) == ["control"] * ("controls" in more) + list(made.images)
    assert [len(paths) for paths in block.paths] == [2] and block.captions == [("seed 0", "")]


def test_the_page_links_its_images_and_names_what_they_are(tmp_path):
    panels = [files(tmp_path, [(HOSTILE, 0), ("", 1)], names=("PAG", HOSTILE)), files(tmp_path, [("", 0), ("", 1)])]
    text = page(panels, tmp_path, "T", "note", {"run": "x"}, 64)
    links = [unquote(link) for link in re.findall(r'src="([^"]+)"', text)]
    assert len(links) == 2 * 2 + 2 and all((tmp_path / link).is_file() for link in links)
    assert HOSTILE not in text and "onerror=alert(1)>" not in text and 'alt="PAG, seed 1"' in text
    assert text.count('class="gallery"') == 1 == text.count('class="images"')


LONG = "a red sphere left of a blue cube and " * 55


def test_a_long_prompt_is_shortened_in_the_grid_and_unfolds_on_the_page(tmp_path):
    several = files(tmp_path, [(LONG, 0), (f"{LONG} b", 1)], names=("PAG", "SEG"))
    sheet = draw_grid(blocks(several, 8, 2), "T", "", 96)
    assert sheet.height < 2 * 100 + 120 and sheet.width < 640 + 2 * 24
    for panel in (several, files(tmp_path, [(LONG, 0), (LONG, 1)])):  # beside the images, and as the title of a sheet
        sheet = draw_grid(blocks(panel, 8, 2), "T", "", 96)
        assert sheet.height < 2 * 100 + 160 and sheet.width < 640 + 2 * 24
        text = page([panel], tmp_path, "T", "note", {}, 8)
        assert text.count('<details class="long"><summary>a red sphere left') == 2 == text.count("…</summary>a red")
        assert f', {LONG}"' in text  # whole for who does not see the image
    assert "<details" not in page([files(tmp_path, [("a cube", 0), ("", 1)])], tmp_path, "T", "note", {}, 8)


@pytest.mark.parametrize("text", [LONG, "x" * 300, "σ " * 99])
def test_what_a_line_has_no_room_for_is_an_ellipsis(text):
    lines = wrap(text, 12, 90, 3)
    assert len(lines) == 3 and lines[-1].endswith("…") and max(text_width(line, 12) for line in lines) <= 90
    assert wrap("short", 12, 90, 3) == ["short"] and wrap("", 12, 90, 3) == []
