"""Labelled grids of images, drawn with Pillow: the same images and texts give the same pixels on every machine."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, QUIET, PAPER, RULE = "#16181d", "#5f6672", "#ffffff", "#d9dce1"
GAP, MARGIN, BLOCK_GAP = 4, 24, 36  # pixels between images, around the sheet, between blocks
MOST = 3  # lines of a title, and of a prompt beside an image that is lower
TITLE = 480  # pixels that a block's title may be wide, or as wide as the images


@dataclass(frozen=True)
class Block:
    """A titled table of images: `heads` over the columns, captions (a label and a text, perhaps "") beside the rows."""

    title: str
    heads: Sequence[str]
    captions: Sequence[tuple[str, str]]
    paths: Sequence[Sequence[Path]]  # [row][column]; the last row may be shorter


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of the image in a file."""
    with Image.open(path) as image:
        return (image.height, image.width)


def cell_height(path: Path) -> int:
    """Pixels an image is drawn high: small ones by the whole factor that brings them to 96 or more, large ones 256."""
    height, _ = image_size(path)
    return height * math.ceil(96 / height) if height <= 192 else min(height, 256)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: it has the Greek letters and signs of methods' names."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def line_height(size: int) -> int:
    return round(size * 1.3)


def text_width(text: str, size: int) -> int:
    return math.ceil(font(size).getlength(text))


def wrap(text: str, size: int, width: int, most: int | None = None) -> list[str]:
    """Lines of `text` no wider than `width` pixels; a word that is wider alone is cut. most: lines; what is left out is
    an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
            continue
        while text_width(word, size) > width and len(word) > 1:
            cut = max((n for n in range(1, len(word)) if text_width(word[:n], size) <= width), default=1)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    if most and len(lines) > most:
        last = lines[most - 1]
        while last and text_width(f"{last}…", size) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last.rstrip()}…"]
    return lines


def write(sheet: Image.Image, x: int, y: int, lines: list[str], size: int, ink: str = INK, bold: bool = False) -> None:
    for n, line in enumerate(lines):
        position, stroke = (x, y + n * line_height(size)), 0.3 if bold else 0
        ImageDraw.Draw(sheet).text(position, line, ink, font(size), stroke_width=stroke, stroke_fill=ink)


class Layout:
    """The measures of a block in pixels, for images `cell` high and small text of `size`."""

    def __init__(self, block: Block, cell: int, size: int):
        self.block, self.cell, self.size = block, cell, size
        sizes = {image_size(path) for row in block.paths for path in row}
        self.image_width = max(1, *(round(cell * width / height) for height, width in sizes))
        self.indent = max(text_width(label, size) for label, _ in block.captions) + 12
        if any(text for _, text in block.captions):
            self.indent = max(self.indent, min(self.image_width, 200))
        self.heads = [wrap(head, size + 1, self.image_width) for head in block.heads]
        most = max(MOST, cell // line_height(size) - 1)
        self.captions = [[label, *wrap(text, size, self.indent - 8, most)] for label, text in block.captions]
        self.rows = [max(cell, len(lines) * line_height(size)) + GAP for lines in self.captions]
        width = self.indent + len(block.heads) * (self.image_width + GAP)
        self.title = wrap(block.title, size + 4, max(width, TITLE), MOST)
        self.width = max([width, *(text_width(line, size + 4) for line in self.title)])
        self.title_height = len(self.title) * line_height(size + 4) + 10 if self.title else 0
        self.head_height = max(map(len, self.heads)) * line_height(size + 1) + 8

    def draw(self, sheet: Image.Image, x: int, y: int, above: int) -> None:
        """At (x, y) of `sheet`, its first row of images `above` pixels lower."""
        size = self.size
        if self.title:
            write(sheet, x, y, self.title, size + 4, bold=True)
            rule = y + len(self.title) * line_height(size + 4) + 2
            ImageDraw.Draw(sheet).line((x, rule, x + self.width - GAP, rule), fill=RULE)
        y += above
        lefts = [x + self.indent + column * (self.image_width + GAP) for column in range(len(self.heads))]
        for left, lines in zip(lefts, self.heads, strict=True):
            for n, line in enumerate(lines, -len(lines)):
                centred = left + (self.image_width - text_width(line, size + 1)) // 2
                write(sheet, centred, y - 6 + n * line_height(size + 1), [line], size + 1, bold=True)
        for lines, paths, height in zip(self.captions, self.block.paths, self.rows, strict=True):
            write(sheet, x, y, lines[:1], size, QUIET if lines[1:] else INK)
            write(sheet, x, y + line_height(size), lines[1:], size)
            for left, path in zip(lefts, paths):
                image = Image.open(path).convert("RGB")  # enlarged by a whole factor, its pixels stay squares
                resampling = Image.Resampling.LANCZOS if self.cell % image.height else Image.Resampling.NEAREST
                width = max(1, round(self.cell * image.width / image.height))  # narrower than the widest: in the middle
                place = (left + (self.image_width - width) // 2, y)
                sheet.paste(image.resize((width, self.cell), resampling), place)
            y += height


def draw_grid(blocks: Sequence[Block], title: str, note: str, cell: int, across: int = 2) -> Image.Image:
    """All `blocks` on one white sheet under `title` and `note`, `across` side by side, images `cell` pixels high."""
    size = max(12, min(20, cell // 8))
    layouts = [Layout(block, cell, size) for block in blocks]
    lines = [layouts[i : i + across] for i in range(0, len(layouts), across)]
    above = [max(b.title_height for b in line) + max(b.head_height for b in line) for line in lines]  # rows align
    heights = [most + max(sum(b.rows) for b in line) for line, most in zip(lines, above, strict=True)]
    widths = [sum(b.width + BLOCK_GAP for b in line) - BLOCK_GAP for line in lines]
    width = max(*widths, min(640, text_width(title, size + 9)))
    titles, notes = wrap(title, size + 9, width), wrap(note, size, width)
    note_top = MARGIN + len(titles) * line_height(size + 9)
    y = note_top + len(notes) * line_height(size) + BLOCK_GAP // 2
    height = y + sum(heights) + BLOCK_GAP * (len(lines) - 1) + MARGIN
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), PAPER)
    write(sheet, MARGIN, MARGIN, titles, size + 9, bold=True)
    write(sheet, MARGIN, note_top, notes, size, QUIET)
    for line, most, height in zip(lines, above, heights, strict=True):
        x = MARGIN
        for layout in line:
            layout.draw(sheet, x, y, most)
            x += layout.width + BLOCK_GAP
        y += height + BLOCK_GAP
    return sheet
