"""Shapes of terms and post-processors on a GPU that is not there: devices, values, and no copy from the CPU."""

import pytest
import torch
from combinations import POSTS, SHAPES_OF_TERMS, SIGMAS, branches, guided, plain_cfg, run_of, step_of
from fake_cuda import MODE, check_same, fake_cuda, sent

from segresearch.guidance.frequencies import high_pass, smooth
from segresearch.guidance.step import Step
from segresearch.sampling.memory import Past


def outputs(method, run, place) -> torch.Tensor:
    for sigma in SIGMAS[:2]:
        d = branches(dtype=torch.float32)
        step = step_of(d, sigma)
        scale = torch.full((3, 1, 1, 1), 4.0)
        x, sigmas, d, scale, mixed = place([step.x, step.sigma, d, scale, plain_cfg(d)])
        step = Step(x, sigmas, d, "cond", scale, Past(run, "method", sigma))
        out = method(mixed, step) if method in POSTS else guided(method, d, step)
    return out


@pytest.mark.parametrize("method", [*SHAPES_OF_TERMS, *POSTS], ids=repr)
def test_a_combination_stays_on_the_device(method):
    expected = outputs(method, run_of(), lambda values: values)
    run = run_of()
    with fake_cuda():
        out = outputs(method, run, sent)
    check_same(out, expected, rtol=1e-4, atol=1e-4)


def test_compiled_filters_send_nothing():
    with fake_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        z = torch.ones(1, 1, 6, 8, device="cuda")
        MODE.sends = []
        smooth(z), high_pass(z, 0.05)
        assert not MODE.sends
