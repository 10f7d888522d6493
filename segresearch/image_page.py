"""What a generate run shows its images in: the blocks of its grid, and its page, which links the files beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from segresearch.config.expand import ImageSpec, Panel
from segresearch.image_grid import Block, cell_height, image_size
from segresearch.method_looks import look
from segresearch.pages import Cell, render

WIDEST = 8  # images beside each other where there is one method


@dataclass(frozen=True)
class PanelFiles:
    """A panel and its files in the order of its rows: images and their records by method, control images by control,
    and the images that sampling starts from ("image", and "mask" where there is one)."""

    panel: Panel
    images: Mapping[str, Mapping[Path, Mapping[str, Any]]]
    controls: Mapping[str, list[Path]]
    starts: Mapping[str, list[Path]] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, list[Path]]:
        """The columns before the methods, by head: what the images start from, and the control images."""
        heads = {"image": "start", "mask": "made anew: white"}
        controls = {f"control: {name}" if len(self.controls) > 1 else "control": p for name, p in self.controls.items()}
        return {heads[name]: paths for name, paths in self.starts.items()} | controls


def blocks(files: PanelFiles, limit: int, across: int) -> list[Block]:
    """The blocks of a panel, of at most `limit` rows: a column a method. One method alone is a sheet of its images.

    across: blocks beside each other.
    """
    rows, title = files.panel.rows[:limit], files.panel.title
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    if alone(files):
        return _sheet(files, rows, prompts, across)
    cells = list(zip(*files.given.values(), *files.images.values(), strict=True))[:limit]
    captions = [(f"seed {row.seed}", row.prompt) for row in rows]
    if not title and len(prompts) == 1 and prompts[0]:
        title, captions = f"“{prompts[0]}”", [(seed, "") for seed, _ in captions]
    return [Block(title, (*files.given, *files.images), captions, cells)]


def alone(files: PanelFiles) -> bool:
    """Whether there is one method, nothing beside it and more than one image."""
    return len(files.images) == 1 and not files.given and len(files.panel.rows) > 1


def _sheet(files: PanelFiles, rows: Sequence[ImageSpec], prompts: Sequence[str], across: int) -> list[Block]:
    ((method, images),) = files.images.items()
    paths = list(images)[: len(rows)]
    title = f"{files.panel.title}: {method}" if files.panel.title else method
    seeds = [[row.seed for row in rows if row.prompt == prompt] for prompt in prompts]
    if len(prompts) == 1:  # as many columns as rows
        title += f": “{prompts[0]}”" if prompts[0] else ""
        columns = min(WIDEST, math.ceil(math.sqrt(len(rows))))
        parts = [slice(start, start + columns) for start in range(0, len(rows), columns)]
        captions = [(_named([row.seed for row in rows[part]]), "") for part in parts]
        return [Block(title, [""] * columns, captions, [paths[part] for part in parts])]
    if all(some == seeds[0] for some in seeds) and 1 < len(seeds[0]) <= WIDEST:  # a row a prompt
        cells = [[path for path, row in zip(paths, rows) if row.prompt == prompt] for prompt in prompts]
        captions = [("", prompt) if prompt else ("no prompt", "") for prompt in prompts]
        return [Block(title, [f"seed {seed}" for seed in seeds[0]], captions, cells)]
    height = math.ceil(len(rows) / across)  # a prompt an image: beside each other
    captions = [(f"seed {row.seed}", row.prompt) for row in rows]
    parts = [slice(start, start + height) for start in range(0, len(rows), height)]
    return [
        Block(title if not part.start else "", [""], captions[part], [[path] for path in paths[part]])
        for part in parts
    ]


def _named(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def page(
    panels: Sequence[PanelFiles], folder: Path, title: str, note: str, facts: Mapping[str, str], limit: int
) -> str:
    """The page of a run in `folder`. note: what is the same for all images. facts: how they were made, by name. limit:
    rows shown."""
    tables = [_table(files, folder, limit) for files in panels]
    return render(title, [note], "images", panels=tables, facts=facts)


def _table(files: PanelFiles, folder: Path, limit: int) -> dict[str, Any]:
    rows = files.panel.rows[:limit]
    marks = [look(files.panel.methods[method]) for method in files.images]
    heads = [Cell(head) for head in files.given]
    heads += [Cell(method, mark=one.sign, color=one.color) for method, one in zip(files.images, marks)]
    columns = zip(heads, [*files.given.values(), *map(list, files.images.values())], strict=True)
    shown = [[_image(path, folder, head.text, row) for path, row in zip(paths, rows)] for head, paths in columns]
    return {
        "title": files.panel.title, "heads": heads, "alone": alone(files),
        "rows": [(row, cells) for row, *cells in zip(rows, *shown, strict=True)],
    }  # fmt: skip


def _image(path: Path, folder: Path, name: str, row: ImageSpec) -> dict[str, Any]:
    height, width = image_size(path)
    cell = cell_height(path)
    return {
        "src": quote(path.relative_to(folder).as_posix()), "width": round(cell * width / height), "height": cell,
        "small": height <= 192, "alt": ", ".join(filter(None, (name, f"seed {row.seed}", row.prompt))),
    }  # fmt: skip
