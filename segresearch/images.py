"""Pictures: PNGs that carry their settings, and labelled grids of them. Light: Pillow only, no torch.

A PNG's text chunk "segresearch" holds JSON. It is the whole record of the picture, so a grid that was mailed around
still says how it was made.
"""

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from segresearch.runs import plain, replacing

KEY = "segresearch"
END = b"IEND\xaeB`\x82"  # of a whole PNG
INK, QUIET, PAPER, RULE = "#16181d", "#5f6672", "#ffffff", "#d9dce1"
SPELLED = {"σ": "sigma", "τ": "tau", "γ": "gamma", "φ": "phi", "∞": "inf", "→": "->", "×": "x", "·": "-", "−": "-"}
FONTS = ("DejaVuSans.ttf", "Arial.ttf", "LiberationSans-Regular.ttf", "Helvetica.ttc")


def png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """`image` as a PNG with `settings` in its text chunk; the same input gives the same bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(plain(settings), ensure_ascii=False, sort_keys=True))
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write `image` to `path` atomically, as `png` makes it."""
    data = png(image, settings)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a PNG of ours, or None where there is no such file, it is damaged, or it carries none."""
    try:
        data = path.read_bytes()
        if not data.endswith(END):  # a cut file would be read as far as it goes
            return None
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            text = image.info.get(KEY)
        return json.loads(text) if text else None
    except (OSError, SyntaxError, ValueError):
        return None


@dataclass(frozen=True)
class Block:
    """A titled table of pictures: `heads` over the columns, captions (a bold line, a quiet text) beside the rows."""

    title: str
    heads: Sequence[str]
    captions: Sequence[tuple[str, str]]
    paths: Sequence[Sequence[Path]]  # [row][column]


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of the picture in a file."""
    with Image.open(path) as image:
        return (image.height, image.width)


def cell_size(path: Path) -> int:
    """Pixels a picture is drawn high: small ones by the whole factor that brings them to 96 or more, large ones 256."""
    height, _ = picture_size(path)
    return height * math.ceil(96 / height) if height <= 192 else min(height, 256)


@functools.cache
def _font(size: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, bool]:
    """A common font of the system, else Pillow's own; and whether it has Greek letters, which Pillow's lacks."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size), True
        except OSError:
            continue
    return ImageFont.load_default(size), False


class _Pen:
    """Text of one size on a picture (or on none, to measure)."""

    def __init__(self, size: int, draw: ImageDraw.ImageDraw | None = None):
        self.font, self.greek = _font(size)
        self.size, self.line = size, round(size * 1.3)
        self.draw = draw

    def spelled(self, text: str) -> str:
        return text if self.greek else "".join(SPELLED.get(c, c) for c in text)

    def width(self, text: str) -> int:
        return math.ceil(self.font.getlength(self.spelled(text)))

    def wrap(self, text: str, width: int) -> list[str]:
        """Lines of `text` no wider than `width` pixels; a word that is wider alone is cut."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            while self.width(word) > width and len(word) > 1:
                cut = max((n for n in range(1, len(word)) if self.width(word[:n]) <= width), default=1)
                lines.append(word[:cut])
                word = word[cut:]
            lines.append(word)
        return lines

    def write(self, x: int, y: int, text: str, fill: str = INK, bold: bool = False) -> None:
        assert self.draw is not None
        self.draw.text(
            (x, y), self.spelled(text), font=self.font, fill=fill, stroke_width=0.3 if bold else 0, stroke_fill=fill
        )


def draw_grid(blocks: Sequence[Block], title: str, note: str, cell: int, across: int = 2) -> Image.Image:
    """All `blocks` on one white sheet under `title` and `note`, `across` side by side, pictures `cell` pixels high.

    Enlarging is by whole factors without smoothing (pixels stay pixels), anything else is resampled with Lanczos.
    """
    gap, margin, pad = 4, 24, 36
    size = max(12, min(20, cell // 8))
    heads, small, large, huge = _Pen(size + 1), _Pen(size), _Pen(size + 4), _Pen(size + 9)
    shapes = []
    for block in blocks:
        with Image.open(block.paths[0][0]) as first:
            wide = max(1, round(cell * first.width / first.height))
        caption = max(small.width(first) for first, _ in block.captions) + 12
        caption = max(caption, min(wide, 200)) if any(rest for _, rest in block.captions) else caption
        head_lines = [heads.wrap(h, wide) for h in block.heads]
        captions = [(a, small.wrap(b, caption - 8)) for a, b in block.captions]
        rows = [max(cell, (1 + len(b)) * small.line) + gap for _, b in captions]
        shapes.append((wide, caption, head_lines, captions, rows))
    lines = [range(i, min(i + across, len(blocks))) for i in range(0, len(blocks), across)]
    above: dict[
        int, int
    ] = {}  # room for title and column heads, the same for blocks side by side, so that their rows align
    for line in lines:
        titled = large.line + 10 if any(blocks[i].title for i in line) else 0
        most = max(len(words) for i in line for words in shapes[i][2])
        above |= dict.fromkeys(line, titled + most * heads.line + 8)
    widths = [s[1] + len(b.heads) * (s[0] + gap) for s, b in zip(shapes, blocks, strict=True)]
    widths = [max(w, large.width(b.title)) for w, b in zip(widths, blocks, strict=True)]
    heights = [above[i] + sum(s[4]) for i, s in enumerate(shapes)]
    width = 2 * margin + max(sum(widths[i] for i in line) + pad * (len(line) - 1) for line in lines)
    width = max(width, 2 * margin + min(640, huge.width(title)))
    title_lines, note_lines = huge.wrap(title, width - 2 * margin), small.wrap(note, width - 2 * margin)
    top = margin + len(title_lines) * huge.line + len(note_lines) * small.line + pad // 2
    height = top + sum(max(heights[i] for i in line) + pad for line in lines) - pad + margin

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    heads, small, large, huge = (_Pen(p.size, draw) for p in (heads, small, large, huge))
    y = margin
    for text in title_lines:
        huge.write(margin, y, text, bold=True)
        y += huge.line
    for text in note_lines:
        small.write(margin, y, text, QUIET)
        y += small.line
    y = top
    for line in lines:
        x = margin
        for i in line:
            _draw_block(sheet, blocks[i], shapes[i], (x, y, above[i]), cell, gap, widths[i], (heads, small, large))
            x += widths[i] + pad
        y += max(heights[i] for i in line) + pad
    return sheet


def _draw_block(
    sheet: Image.Image,
    block: Block,
    shape: tuple,
    at: tuple[int, int, int],
    cell: int,
    gap: int,
    width: int,
    pens: tuple,
) -> None:
    wide, caption, head_lines, captions, rows = shape
    heads, small, large = pens
    x0, y, above = at
    if block.title:
        large.write(x0, y, block.title, bold=True)
        y += large.line + 2
        large.draw.line((x0, y, x0 + width - gap, y), fill=RULE)
    y = at[1] + above
    for column, words in enumerate(head_lines):
        left = x0 + caption + column * (wide + gap)
        for n, word in enumerate(reversed(words)):
            heads.write(left + (wide - heads.width(word)) // 2, y - 6 - (n + 1) * heads.line, word, bold=True)
    for row, (first, rest) in enumerate(captions):
        small.write(x0, y, first, INK if not rest else QUIET)
        for n, word in enumerate(rest, start=1):
            small.write(x0, y + n * small.line, word)
        for column, path in enumerate(block.paths[row]):
            with Image.open(path) as image:
                whole = cell % image.height == 0
                resampling = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
                picture = image.convert("RGB").resize((wide, cell), resampling)
            sheet.paste(picture, (x0 + caption + column * (wide + gap), y))
        y += rows[row]
