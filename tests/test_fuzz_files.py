"""Mutated files and folders end in one of the package's errors, or load: no traceback, no hang, no memory beyond theirs.

The long form is benchmarks/fuzz.py.
"""

import pytest
from fuzz_files import Fuzz


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", ["header", "keys", "shapes", "json", "index", "tokenizer", "part", "controlnet"])
def test_mutations_end_in_errors_of_the_package(fuzz, kind):
    outcomes = [fuzz.run(kind, seed) for seed in range(40)]
    assert not [outcome for outcome in outcomes if outcome.failure]
    assert {outcome.result for outcome in outcomes} <= {"opened", "refused"}
