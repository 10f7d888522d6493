"""A method has one colour and mark everywhere, and no two methods of the package share both."""

import itertools

import numpy as np
import pytest
from helpers import composed

from segresearch.config import EvaluateConfig, GuidanceConfig, conf_dir, typed
from segresearch.config.expand import methods
from segresearch.config.sweep import at_scale
from segresearch.method_looks import FAMILIES, LOOKS, MARKS, OWN, key_of, line, look

JOINED = {"sag_cfg", "pag_cfg", "seg_cfg", "seg_pag", "seg_pag_cfg", "sgg"}  # looks are of what is beside CFG
SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}
SIGHT = {  # Machado, Oliveira and Fernandes 2009, at full severity, in linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    "full": np.eye(3),
}


def linear(color: str) -> np.ndarray:
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    x, y, z = np.cbrt(np.array(to_xyz) @ rgb.clip(0.001, 1) / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_every_method_of_the_package_has_a_look_of_its_own():
    names = sorted(path.stem for path in (conf_dir() / "guidance").glob("*.yaml") if path.stem != "custom")
    labelled = ", ".join(f"{{guidance: {name}, label: {name}}}" for name in names)
    config = composed(f"compare=[{labelled}]", "guidance=none", name="evaluate", kind=EvaluateConfig)
    found = {guidance.label: guidance for guidance in config.compare}
    assert list(found) == names
    keys = {name: key_of(guidance) for name, guidance in found.items()}
    assert set(keys.values()) <= set(LOOKS)
    alone = [name for name in names if name not in JOINED]
    assert len({look(found[name])[:2] for name in alone}) == len(alone) > 50
    assert len({one[:2] for one in LOOKS.values()}) == len(LOOKS)
    assert {keys[name] for name in ("seg_cfg", "seg_pag", "seg_pag_cfg")} == {"seg"} and keys["pag_cfg"] == "pag"


def test_a_look_does_not_depend_on_label_scale_or_run():
    seg = typed(GuidanceConfig, {"terms": {"seg": SEG}})
    others = [at_scale(seg, 0.5), at_scale(seg, 3), typed(GuidanceConfig, {"label": "mine", "terms": {"other": SEG}})]
    assert {look(one) for one in (seg, *others, "seg")} == {look(seg)}
    alone = typed(GuidanceConfig, {"terms": {"seg": {**SEG, "scale": -1}}})
    assert look(alone) == look(seg) and look(methods([typed(GuidanceConfig, {})]).popitem()[1]) == look("none")
    narrow = typed(GuidanceConfig, {"terms": {"seg": {**SEG, "perturbation": {"kind": "seg", "sigma": 1}}}})
    assert line(narrow)["color"] == line(seg)["color"] and line(narrow)["alpha"] < line(seg)["alpha"] == 1


def test_a_method_of_your_own_keeps_its_mark():
    assert look("my_module.warm") == look("my_module.warm") and look("my_module.warm").color == OWN
    marks = {look(f"my_module.m{i}").mark for i in range(40)}
    assert len(marks) > 5 and marks <= set(MARKS)


@pytest.mark.parametrize("sight", SIGHT)
def test_families_are_told_apart_by_everyone(sight):
    seen = [lab(np.array(SIGHT[sight]) @ linear(color)) for color in FAMILIES]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15  # 2 is just noticed
    assert all(1.05 / (linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05) > 2.2 for color in FAMILIES)  # on white
