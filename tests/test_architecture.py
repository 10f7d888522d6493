"""docs/architecture.md names every package, module, script and config group, and nothing that is not there."""

import re
from pathlib import Path

import pytest

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
