"""What the tests run on: shapes in signatures are checked, unless a test leaves that out."""

import pytest
import torch
import typecheck
from jaxtyping import TypeCheckError

from segresearch.guidance.postprocess import rescale

X, NARROW = torch.rand(1, 4, 2, 2), torch.rand(1, 4, 2, 1)  # which broadcast


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(TypeCheckError, match="rescale"):
        rescale(X / 2, NARROW, X, 0.5)


def test_a_fixture_leaves_the_check_out(unchecked):
    assert rescale(X / 2, NARROW, X, 0.5).shape == X.shape


def test_a_function_called_often_rests_until_the_next_test():
    for _ in range(typecheck.CALLS):
        rescale(X / 2, X, X, 0.5)
    assert rescale(X / 2, NARROW, X, 0.5).shape == X.shape
    typecheck.begin()
    with pytest.raises(TypeCheckError, match="rescale"):
        rescale(X / 2, NARROW, X, 0.5)
