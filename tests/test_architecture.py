"""docs/architecture.md names every package, module, script and config group, and nothing that is not there."""

import re
import sys
from pathlib import Path

import pytest
from guidance_models import denoiser, noisy

from segresearch.guidance import SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models.attention import sdpa
from segresearch.sampling import sample

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MAP = TEXT[TEXT.index("## Folder map") : TEXT.index("## Interfaces")]


def section(package: str) -> str:
    """The lines of the map below `package`/."""
    lines = MAP.splitlines()
    start = next(i for i, text in enumerate(lines) if text.startswith(f"  {package}/"))
    end = next(i for i, text in enumerate(lines) if i > start and not text.startswith("    "))
    return "\n".join(lines[start:end])


PACKAGES = sorted(p.parent.name for p in (ROOT / "segresearch").glob("*/__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_of_a_package_is_in_its_part(package):
    modules = {p.name for p in (ROOT / "segresearch" / package).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b\w+\.py\b", section(package))) == modules


def test_modules_scripts_and_groups_are_in_the_map():
    names = set(re.findall(r"[\w.]+", MAP))
    modules = {p.name for p in (ROOT / "segresearch").glob("*.py")} - {"__init__.py"}
    scripts = {p.name for p in (ROOT / "experiments").glob("*.py")}
    groups = {p.name for p in (ROOT / "conf").iterdir() if p.is_dir()}
    assert not (modules | scripts | groups | set(PACKAGES)) - names


def test_no_two_modules_have_one_name():
    names = [p.name for p in (ROOT / "segresearch").rglob("*.py") if p.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_the_way_from_sample_to_attention_is_short_and_described():
    """Files on the stack of the innermost attention of CFG + SEG, over all its calls."""
    package, files = ROOT / "segresearch", {}

    def attend(q, k, v, site):
        frame = sys._getframe()
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(package):
                files[path.relative_to(package).as_posix()] = len(path.read_text(encoding="utf-8").splitlines())
            frame = frame.f_back
        return sdpa(q, k, v, site)

    model = GuidedDenoiser(denoiser(), {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(), 2.0)})
    x, _, conds = noisy(1, sigma=1.0)
    sample(model, x, steps=1, conds=conds, attend=attend)
    paragraph = next(text for text in TEXT.split("\n\n") if text.startswith("From `sample` to"))
    assert set(re.findall(r"`(\w+/\w+\.py)`", paragraph)) == set(files)
    assert len(files) <= 12 and sum(files.values()) <= 2500
