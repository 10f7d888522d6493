"""The Python examples of README and the docs run, and print what the pages say."""

import re
from itertools import takewhile
from pathlib import Path

import pytest

from segresearch.guidance import GuidedDenoiser
from segresearch.sampling import initial_noise, sample

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Where the examples write."""
    monkeypatch.chdir(tmp_path)


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.parametrize("example", examples(README), ids=range(len(examples(README))))
def test_example_runs(example):
    names: dict = {}
    exec(example, names)
    assert names["x0"].isfinite().all()
    assert [path.name for path in sorted(Path().rglob("*.png"))] == [f"seed{i}.png" for i in range(4)] * (
        "save_images" in example
    )


@pytest.mark.parametrize("page", ["quickstart", "cookbook"])
def test_recipes_run_one_after_another(page):
    names: dict = {}
    for example in examples((ROOT / "docs" / f"{page}.md").read_text()):
        before = names.pop("x0", None)
        exec(example.replace("steps=10", "steps=2"), names)
        assert "x0" not in names or names["x0"].isfinite().all() and (names["x0"] is not before), example
    assert "sd" in names


def test_guidance_examples_run_one_after_another(capsys):
    """Each block prints what follows it, and each method that it makes changes the image."""
    page = (ROOT / "docs" / "guidance.md").read_text()
    names: dict = {}
    models: list[GuidedDenoiser] = []
    for example in examples(page):
        exec(example, names)
        after = page[page.index(example) + len(example) :].splitlines()[2:]  # after the closing fence
        printed = takewhile(lambda line: line.startswith("    "), after)
        assert capsys.readouterr().out.splitlines() == [line[4:] for line in printed]
        models += [m for m in names.values() if isinstance(m, GuidedDenoiser) and not any(m is old for old in models)]
    assert len(models) >= 12
    noise, plain = initial_noise([0], (4, 8, 8)), GuidedDenoiser(names["sd"].denoiser, {})
    unguided, *guided = (sample(m, noise, steps=2, conds=names["conds"]) for m in (plain, *models))
    for model, x0 in zip(models, guided, strict=True):
        assert x0.isfinite().all() and (x0 - unguided).abs().max() > 1e-2, model


def test_theory_prints_its_numbers(capsys):
    page = (ROOT / "docs" / "theory.md").read_text()
    (example,) = examples(page)
    exec(example, {})
    (printed,) = re.findall(r"```\n(.*?)```", page[page.index(example) + len(example) + 3 :], re.S)
    assert capsys.readouterr().out == printed
