"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(block):
    names: dict = {}
    exec(block, names)
    assert names["x0"].isfinite().all()


def test_there_are_examples():
    assert len(BLOCKS) >= 2
