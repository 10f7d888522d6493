"""The Python examples of README, docs/guidance.md and docs/theory.md run, and print what the pages say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.parametrize("example", examples(README), ids=range(len(examples(README))))
def test_example_runs(example):
    names: dict = {}
    exec(example, names)
    assert names["x0"].isfinite().all()


def test_guidance_prints_its_formula(capsys):
    page = (ROOT / "docs" / "guidance.md").read_text()
    example = examples(page)[0]
    exec(example, {})
    printed = page[page.index(example) + len(example) :].splitlines()[2:5]  # after the closing fence
    assert capsys.readouterr().out.splitlines() == [line[4:] for line in printed]


def test_theory_prints_its_numbers(capsys):
    page = (ROOT / "docs" / "theory.md").read_text()
    (example,) = examples(page)
    exec(example, {})
    (printed,) = re.findall(r"```\n(.*?)```", page[page.index(example) + len(example) + 3 :], re.S)
    assert capsys.readouterr().out == printed
