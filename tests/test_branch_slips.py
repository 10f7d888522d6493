"""Slips in guidance end in one line that names the value."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from branches_alone import Halves, Other, Scaled, flipped, halved, sharper
from guidance_models import denoiser, noisy

from segresearch.guidance import (
    SEG,
    At,
    GuidedDenoiser,
    cfg,
    perturbed,
)  # fmt: skip
from segresearch.guidance.methods.adg import ADG
from segresearch.guidance.methods.nag import NAG


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: perturbed("t", At(halved, where="middle", site_kind="block"), 1.0), "'middle' matches no transfo"),
        (lambda: perturbed("t", At(halved, where="left", site_kind="ff"), 1.0), "'left' matches no feed-forward"),
        (lambda: perturbed("t", At(sharper, where=99, site_kind="cross"), 1.0), "99 matches no cross-attention site"),
        (lambda: perturbed("t", At(sharper, heads=[9], site_kind="cross"), 1.0), r"no head 9 at mid_block.*attn2"),
        (lambda: perturbed("t", At(halved, site_kind="blocks"), 1.0), "site_kind='blocks': sites are of the kinds em"),
    ],
)  # fmt: skip
def test_errors_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(denoiser(), {"t": build()})


def test_a_wrong_output_of_a_call_is_named():
    x, sigma, conds = noisy(1)
    wrong = At(lambda h, site, call: h[:, :2], where="mid.0.1", site_kind="block")
    with pytest.raises(ValueError, match=r"gave \(1, 2, 64\) at mid_block.attentions.0.transformer_blocks.1, expected"):
        GuidedDenoiser(denoiser(), {"t": perturbed("t", wrong, 1.0)})(x, sigma, conds)


@dataclass(frozen=True)
class Placeless:
    site_kind: ClassVar[str] = "block"

    def __call__(self, h, site, call):
        return call(h.flip(1))


@dataclass(frozen=True)
class PlacelessMemory:
    remembers: ClassVar[bool] = True

    def __call__(self, q, k, v, site, attend):
        return v


def test_a_class_without_a_place_keeps_its_kind():
    x, sigma, conds = noisy(1)
    a, b = (
        GuidedDenoiser(denoiser(), {"t": perturbed("t", p, 1.0)})(x, sigma, conds)
        for p in (Placeless(), At(flipped, site_kind="block"))
    )
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="give its class a field `where`"):
        perturbed("t", PlacelessMemory(), 1.0)


def scalar(pos, neg, step):
    return pos[:, :1, :1, :1]


@dataclass(frozen=True)
class Narrow(Halves):
    def join(self, denoised, like):
        return denoised[:1]


@dataclass(frozen=True)
class Torn(Halves):
    def split(self, z):
        return torch.cat([z, z[:1]])


def swapped():
    return {
        "a": perturbed("a", [Halves(), Other()], 1.0),
        "b": perturbed("b", [Other(), Halves()], 1.0),
    }


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: {"every": {"cnod": [SEG()]}}, "conds lacks 'cnod'"),
        (lambda: {"every": {"cond": SEG()}}, "give a list of perturbations"),
        (lambda: {"conditionings": {"x": 3}}, r"conditionings\['x'\] is 3"),
        (lambda: {"conditionings": {"x": Scaled("cnod", 1.0)}}, "conds lacks 'cnod'"),
        (lambda: {"conditionings": {"x": lambda *_: 5}}, r"conditionings\['x'\].*made int, not a Cond"),
        (lambda: {"terms": {"t": cfg(2.0, shape=scalar)}}, r"the shape of terms\['t'\] gave \(2, 1, 1, 1\)"),
        (lambda: {"terms": {"t": cfg(2.0, (200, 800))}}, r"\(200, 800\), and the model's sigmas are 0.02917 to 14.61"),
        (lambda: {"terms": {"t": cfg(2.0, (0, 0.01))}}, "it would never act"),
        (lambda: {"terms": {"t": perturbed("t", Narrow(), 1.0)}}, r"Narrow\(\).join gave \(1, 4, 8, 6\)"),
        (lambda: {"terms": {"t": perturbed("t", Torn(), 1.0)}}, r"Torn\(\).split made 3 rows of 2"),
        (lambda: {"post": [lambda guided, step: guided[:1]]}, r"gave \(1, 4, 8, 12\), expected \(2, 4, 8, 12\)"),
        (lambda: {"terms": {"cfg": cfg(2.0, pos="uncond", neg="cond", shape=ADG())}}, "needs pos='cond', the base"),
        (lambda: {"terms": {"t": perturbed("t", At(flipped, heads=[0], site_kind="block"), 1.0)}}, "has no heads"),
    ],
)
def test_slips_end_in_one_line(build, message):
    x, sigma, conds = noisy(2)
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(denoiser(), **{"terms": {}, **build()})(x, sigma, conds)


def test_texts_of_a_wrong_number_of_rows_are_refused():
    x, sigma, conds = noisy(2)
    conds["uncond"] = conds["uncond"][[0, 1, 0]]
    with pytest.raises(ValueError, match=r"conds\['uncond'\] has 3 rows for 2 images"):
        GuidedDenoiser(denoiser(), {}, every={"*": [NAG()]})(x, sigma, conds)


def test_a_view_of_another_network_in_either_order():
    model = GuidedDenoiser(denoiser(), swapped(), networks={"weak": denoiser()})
    x, sigma, conds = noisy(2)
    assert "rows per image" in str(model) and model(x, sigma, conds).isfinite().all()
