"""Mutated files and folders load or end in one of the package's errors: no traceback, no hang, no memory beyond theirs.

The long form is benchmarks/fuzz.py.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fuzz import KINDS, Fuzz  # noqa: E402


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_end_in_errors_of_the_package(fuzz, kind):
    outcomes = [fuzz.run(kind, seed) for seed in range(40)]
    assert not [outcome for outcome in outcomes if outcome.failure]
    assert {outcome.result for outcome in outcomes} <= {"opened", "refused"}
