"""The figures of the measured effects: distances with their errors, and pictures of the same seeds side by side."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from experiments.mini.common import replace_file
from experiments.mini.effects import Place, Setting, complete, stored
from experiments.mini.effects_table import Row, order

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SHOWN = 10  # pictures of each setting
COLORS = {"vanilla": "#5f6672", "CFG": "#b8860b", "SEG": "#1f5fa8", "PAG": "#b03a2e", "SAG": "#2e7d4f"}


def method(row: Row) -> str:
    return row.guidance.split()[0]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Left: Fréchet distance of every setting, by what it is conditioned on. Right: against the distance to vanilla."""
    shown = [r for r in rows if r.group != "real"]
    floor = next(r for r in rows if r.group == "real")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, max(4.0, 0.24 * len(shown) + 1.5)), width_ratios=(3, 2))
    labels = [f"{r.group}: {r.guidance}" for r in shown]
    for y, r in enumerate(shown):
        error = 0 if math.isnan(r.frechet_error) else 2 * r.frechet_error
        left.barh(y, r.frechet, xerr=error, color=COLORS.get(method(r), "#5f6672"), height=0.7, ecolor="#16181d")
    left.axvline(floor.frechet, color="#16181d", linestyle=":", linewidth=1)
    left.set_yticks(range(len(shown)), labels, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel(f"Fréchet distance, N = {floor.n} (bars: two standard errors; dotted: real scenes)")
    marks = "o^sDvPX*"
    groups = list(dict.fromkeys(r.group for r in shown))
    for r in shown:
        x = 0 if math.isnan(r.distance) else r.distance
        error = 0 if math.isnan(r.frechet_error) else r.frechet_error
        mark = marks[groups.index(r.group) % len(marks)]
        right.errorbar(x, r.frechet, error, fmt=mark, color=COLORS.get(method(r), "#5f6672"), markersize=5)
        right.annotate(r.guidance, (x, r.frechet), (4, 3), textcoords="offset points", fontsize=6)
    for name, mark in zip(groups, marks):
        right.plot([], [], mark, color="#5f6672", label=name)
    if shown:
        right.legend(fontsize=7)
    right.set_xlabel("feature distance to the vanilla picture of the same seed")
    right.set_ylabel("Fréchet distance")
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    replace_file(path, content.getvalue())


def samples(place: Place, settings: Sequence[Setting], count: int, path: Path) -> None:
    """The first pictures of every setting, a row each."""
    there = {s: s for s in settings if complete(place.folder(s), count)}
    groups = dict.fromkeys(s.group for s in there)
    listed = [s for group in groups for s in order(settings, group, there)]  # type: ignore[arg-type]
    if not listed:
        return
    label, side = 190, 64
    sheet = Image.new("RGB", (label + SHOWN * (side + 2), len(listed) * (side + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, setting in enumerate(listed):
        images, _ = next(stored(place.folder(setting), count))
        strip = torch.nn.functional.pad(images[:SHOWN], (0, 2, 0, 2), value=255)
        pixels = strip.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # (b, 3, h, w) -> (h, b·w, 3)
        sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)), (label, y * (side + 2)))
        words = setting.guidance.replace("σ", "sigma").replace("∞", "inf")
        pen.multiline_text((4, y * (side + 2) + 18), f"{setting.group}\n{words}", fill="#16181d")
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    replace_file(path, content.getvalue())
