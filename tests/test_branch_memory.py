"""What methods and perturbations remember, and random choices keyed by image."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from branches_alone import Averaged, Scaled, close
from guidance_models import denoiser, noisy

from segresearch.guidance import (
    Branch,
    GuidedDenoiser,
    SelfAttentionGuidance,
    Term,
    cfg,
    perturbed,
)  # fmt: skip
from segresearch.models.attention import sdpa
from segresearch.sampling import sample
from segresearch.sampling import sigmas as schedule
from segresearch.sampling.draws import bits, chosen, normal, permutation, uniform
from segresearch.sampling.memory import Past, Run

# --- memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembered:
    """Notes what it finds of earlier sigmas, and keeps its own sigma."""

    notes: list

    __hash__ = object.__hash__

    def __call__(self, pos, neg, step):
        self.notes.append((step.past.sigma, step.past.read()))
        step.past.write(step.past.sigma)
        return pos - neg


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "dpmpp_2s_ancestral"])
def test_a_state_is_that_of_the_sigma_before_whatever_the_sampler(sampler):
    notes = []
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0, shape=Remembered(notes))})
    noise, _, conds = noisy(2, sigma=1.0)
    for _ in range(2):  # a second run begins empty
        notes.clear()
        sample(model, noise, sampler, steps=4, conds=conds)
        own = schedule(denoiser(), "leading", 4).tolist()
        assert notes[0] == (own[0], None) and {s for s, _ in notes} >= set(own[:-1])
        for i, (sigma, state) in enumerate(notes):
            above = [s for s, _ in notes[:i] if s > sigma and s in own]
            assert state == (min(above) if above else None)


def test_memory_needs_the_sigmas_of_a_schedule_and_images_are_apart():
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0, shape=Remembered([]))})
    noise, _, conds = noisy(2, sigma=1.0)
    for sampler, options in (("dpm_adaptive", {"rtol": 0.5}), ("euler", {"s_churn": 5.0}), ("dpm_fast", {})):
        with pytest.raises(ValueError, match=f"cfg needs the sigmas of the schedule, and {sampler}.*chooses its own"):
            sample(model, noise, sampler, steps=3, conds=conds, options=options)
    run = Run(torch.arange(2), "euler", (3.0, 2.0, 0.0))
    Past(run, "a", 3.0).write("first")
    assert Past(run, "a", 2.0).read() == "first" and Past(run, "b", 2.0).read() is None
    assert Past(replace(run, keys=run.keys[:1]), "a", 2.0).read() is None
    Past(run, "a", 2.5).write("between")
    assert Past(run, "a", 2.0).read() == "first" and Past(None, "a", 2.0).read() is None
    Past(None, "a", 2.0).write("nothing")


def test_a_perturbation_remembers_by_site_and_image():
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0), "mean": perturbed("mean", Averaged(), 2.0)})
    noise, _, conds = noisy(3, sigma=1.0)
    together = sample(model, noise, steps=3, conds=conds)
    close(together[1:2], sample(model, noise[1:2], steps=3, conds={n: c[[1]] for n, c in conds.items()}))
    assert (
        together - sample(GuidedDenoiser(denoiser(), {"cfg": cfg(2.0)}), noise, steps=3, conds=conds)
    ).abs().max() > 1e-3


# --- random choices --------------------------------------------------------------------------------


def test_draws_are_keyed_by_image_sigma_and_place():
    keys, sigma = torch.tensor([3, 3, 5, 2**62]), torch.tensor([1.0, 2.0, 1.0, 1.0])
    drawn = bits(keys, sigma, "here", 64)
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    assert torch.equal(bits(keys[2:3], sigma[2:3].double(), "here", 64), drawn[2:3])
    assert not torch.equal(bits(keys, sigma, "there", 64), drawn)
    assert torch.equal(bits(keys, sigma, "here", 5), drawn[:, :5])
    u, n = (f(torch.arange(64), torch.ones(64), "x", 4096) for f in (uniform, normal))
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(n.mean()) < 5e-3 and abs(n.var() - 1) < 1e-2 and abs((n[0] * n[1]).mean()) < 0.1
    p = permutation(torch.arange(500), torch.ones(500), "p", 7)
    assert torch.equal(p.sort(1).values, torch.arange(7).expand(500, 7))
    assert abs((p[:, 0] == 3).float().mean() - 1 / 7) < 0.05
    assert abs(chosen(torch.arange(4000), torch.ones(4000), "c", 0.1).float().mean() - 0.1) < 0.02


@dataclass(frozen=True)
class Shuffled:
    """Tokens in a random order before a block."""

    where: str = "mid"
    site_kind: ClassVar[str] = "block"

    def __call__(self, h, site, call):
        order = permutation(site.keys, site.sigma, site.name, h.shape[1]).repeat(len(site.branches), 1)
        return call(h.gather(1, order[:, :, None].expand_as(h)))


def test_a_random_choice_does_not_depend_on_the_batch():
    model = GuidedDenoiser(
        denoiser(), {"s": perturbed("s", Shuffled(), 2.0), "u": perturbed("s", Shuffled(), 1.0, "uncond")}
    )
    noise, _, conds = noisy(3, sigma=1.0)
    together = sample(model, noise, steps=3, conds=conds, seeds=[4, 9, 2])
    close(together[1:2], sample(model, noise[1:2], steps=3, conds={n: c[[1]] for n, c in conds.items()}, seeds=[9]))
    other = sample(model, noise[1:2], steps=3, conds={n: c[[1]] for n, c in conds.items()}, seeds=[8])
    assert (together[1:2] - other).abs().max() > 1e-3


# --- whoever else is there ------------------------------------------------------------------------------


def test_a_static_conditioning_is_made_once_where_images_run_one_at_a_time():
    model = GuidedDenoiser(denoiser(), {}, conditionings={"cond": Scaled("cond", 0.5)})
    noise, _, conds = noisy(2, sigma=1.0)
    options = {"options": {"s_churn": 5.0}, "steps": 2}
    both = sample(model, noise, conds=conds, seeds=[1, 2], **options)
    one = sample(model, noise[1:], conds={n: c[[1]] for n, c in conds.items()}, seeds=[2], **options)
    close(both[1:], one)


def test_a_branch_remembers_whatever_other_branches_come_and_go():
    """In every branch, with classifier-free guidance at the middle step alone: cond is as it is without uncond."""
    noise, _, conds = noisy(2, sigma=1.0)
    middle = schedule(denoiser(), "leading", 3)[1].item()
    seen = {}

    def record(q, k, v, site):
        if site.kind == "self" and "mid_block.attentions.0.transformer_blocks.0" in site.name:
            for names, part in zip(site.branches, q.chunk(len(site.branches))):
                seen.setdefault(names[0], []).append(part)
        return sdpa(q, k, v, site)

    calls = []
    for scale in (1e-30, 0.0):
        seen.clear()
        terms = {"cfg": Term(Branch("cond"), Branch("uncond"), scale, (middle * 0.9, middle * 1.1))}
        sample(GuidedDenoiser(denoiser(), terms, every={"*": [Averaged()]}), noise, steps=3, conds=conds, attend=record)
        calls.append(list(seen["cond"]))
    assert len(calls[0]) == len(calls[1]) == 3
    for a, b in zip(*calls):
        close(a, b)


def test_what_sag_evaluates_again_is_not_remembered():
    noise, _, conds = noisy(2, sigma=1.0)
    every = {"*": [Averaged()]}
    plain = GuidedDenoiser(denoiser(), {}, every=every)
    sag = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {}, every=every), scale=1e-30, base="cond")
    close(sample(sag, noise, steps=3, conds=conds), sample(plain, noise, steps=3, conds=conds))
