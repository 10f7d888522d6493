"""The recorder sees exactly what the softmax sees, of every branch, and changes no output bit."""

import json
import math

import pytest
import torch
from guidance_models import denoiser, noisy

from segresearch.analysis.recorder import Recorder, Recording
from segresearch.errors import InputError
from segresearch.guidance import PAG, SEG, GuidedDenoiser, SelfAttentionGuidance, blur, cfg, perturbed
from segresearch.models.attention import sdpa
from segresearch.sampling import initial_noise, sample

LABELS = [{"prompt": "a", "seed": 3}, {"prompt": "", "seed": 4}]
SITES = denoiser().unet.site_heads


def both(sigma: float = math.inf, **options) -> GuidedDenoiser:
    terms = {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(sigma, **options), 2.0)}
    return GuidedDenoiser(denoiser(torch.float32), terms)


@pytest.mark.parametrize(
    "model",
    [
        GuidedDenoiser(denoiser(torch.float32), {}),
        both(),
        both(1.0),
        both(math.inf, heads=[1]),
        both(math.inf, where="*"),
        GuidedDenoiser(denoiser(torch.float32), {"pag": perturbed("pag", PAG(tau=0.5), 2.0)}),
        GuidedDenoiser(denoiser(torch.float32), {"two": perturbed("two", [SEG(), SEG(1.0)], 2.0)}),
        SelfAttentionGuidance(both(), 0.5),
    ],
)
def test_recording_changes_no_output_bit(model, tmp_path):
    x, sigma, conds = noisy(2, dtype=torch.float32)
    plain = model(x, sigma, conds=conds)
    for folder in (None, tmp_path / "r"):
        recorder = Recorder(SITES, folder=folder)
        assert torch.equal(model(x, sigma, conds=conds, attend=recorder.attend(LABELS)), plain)
        assert len(recorder.recording) >= len(SITES)


@pytest.mark.parametrize("sigma", [1.0, math.inf])
def test_what_is_recorded_is_what_the_branch_attends_with(sigma):
    """Against an `attend` of our own, one branch at a time; the queries of the first perturbed site are blurred."""
    model = both(sigma, boundary="exact")
    x, level, conds = noisy(2, dtype=torch.float32)
    recorder = Recorder(SITES)
    model(x, level, conds=conds, attend=recorder.attend(LABELS))
    recording = recorder.recording
    assert recording.branches == ("cond", "cond~seg", "uncond") and recording.sites == tuple(SITES)
    for branch in model.branches(3.0):
        seen = {}

        def attend(q, k, v, site, seen=seen):
            seen[site.name] = (q, k)
            return sdpa(q, k, v, site)

        model.evaluate(x, level, [branch], conds, attend=attend)
        for site in SITES:
            (entry,) = recording.select(site, str(branch))
            assert entry.heads == tuple(range(SITES[site])) and entry.sigma == (3.0, 3.0) and entry.images == (*LABELS,)
            torch.testing.assert_close(entry.q, seen[site][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(entry.k, seen[site][1], rtol=1e-4, atol=1e-5)
    (plain,), (smooth,) = (recording.select("mid.0.0", name) for name in ("cond", "cond~seg"))
    torch.testing.assert_close(smooth.q, blur(plain.q, plain.grid, sigma, "exact"), rtol=1e-4, atol=1e-5)
    (shared,) = recording.select("down.0", "cond~seg")
    assert shared.branches == ("cond", "cond~seg")  # still equal there, and stored once


def test_streamed_is_what_is_kept_in_memory(tmp_path):
    conds, noise = noisy(2)[2], initial_noise([3, 4], (4, 8, 12)).double()
    model = GuidedDenoiser(denoiser(), {"seg": perturbed("seg", SEG(), 2.0)})
    chosen = {"where": ["mid", 0], "heads": [1], "steps": [0, 2]}
    kept, streamed = Recorder(SITES, **chosen), Recorder(SITES, **chosen, folder=tmp_path / "streamed")
    for recorder in (kept, streamed):
        sample(model, noise, steps=3, conds=conds, attend=recorder.attend(LABELS))
    again = Recording.open(tmp_path / "streamed")
    assert again == kept.recording == streamed.recording
    assert again.steps == (0, 2) and again.branches == ("cond", "cond~seg") and len(again.sites) == 4
    for mine, theirs in zip(kept.recording, again, strict=True):
        h, w = mine.grid
        for a, b in ((mine.q, theirs.q), (mine.k, theirs.k)):
            assert torch.equal(a, b) and a.dtype == torch.float64 and a.shape[:3] == (2, 1, h * w)
    sigmas = [entry.sigma[0] for entry in again.select("mid.0.0", "cond")]
    assert sigmas == sorted(sigmas, reverse=True) and len(sigmas) == 2
    stored = sum(z.nbytes for entry in again for z in entry.load().values())
    assert kept.bytes == streamed.bytes == stored
    (perturbed_entry,) = again.select("mid.0.0", "cond~seg", 2)
    assert torch.equal(perturbed_entry.q, perturbed_entry.q[:, :, :1].expand_as(perturbed_entry.q))  # the mean query


def test_pag_computes_no_attention_and_leaves_no_entry():
    x, sigma, conds = noisy(2)
    recorder = Recorder(SITES, branches=["cond~pag"])
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0), "pag": perturbed("pag", PAG(), 2.0)})
    model(x, sigma, conds=conds, attend=recorder.attend(LABELS))
    recording = recorder.recording
    assert not [site for site in recording.sites if site.startswith("mid")]
    assert all("cond~pag" in entry.branches for entry in recording) and "uncond" not in recording.branches


def test_memory_is_bounded_and_slips_are_said(tmp_path):
    x, sigma, conds = noisy(2)
    model = GuidedDenoiser(denoiser(), {})
    recorder = Recorder(SITES, where="mid", limit=20_000)
    with pytest.raises(ValueError, match=r"limit of 0 MiB at step 0, mid_block.*give a folder"):
        model(x, sigma, conds=conds, attend=recorder.attend(LABELS))
    assert 0 < recorder.bytes <= 20_000
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        model(x, sigma, conds=conds, attend=Recorder(SITES).attend(LABELS[:1]))
    for wrong, message in (({"where": "middle"}, "matches no self-attention site"), ({"heads": [2]}, "no head 2")):
        with pytest.raises(ValueError, match=message):
            Recorder(SITES, **wrong)
    with pytest.raises(ValueError, match="holds no recording"):
        Recording.open(tmp_path)
    streamed = Recorder(SITES, where=-1, folder=tmp_path)
    model(x, sigma, conds=conds, attend=streamed.attend(LABELS))
    with pytest.raises(ValueError, match="holds a recording already"):
        Recorder(SITES, folder=tmp_path)
    with (tmp_path / "index.jsonl").open("a") as index:  # stopped in the middle of a line
        index.write('{"site": "mid')
    assert len(Recording.open(tmp_path)) == 1
    for wrong, message in (({"branch": "uncond"}, "was not recorded; there are cond"), ({"step": 1}, "step=1 ")):
        with pytest.raises(ValueError, match=message):
            streamed.recording.select(**wrong)


HOSTILE = [
    ("[" * 100_000 + "\n", "line 1: not JSON"),
    ("5\n", "line 1: not a mapping with site"),
    ("\xff", "not UTF-8 text"),
    ({"file": "../../secret.safetensors"}, "file: '../../secret.safetensors' is not a file beside the index"),
    ({"file": "/etc/passwd"}, "is not a file beside the index"),
    ({"step": "0"}, "step: '0' is not int"),
    ({"step": True}, "step: 'True' is not int"),
    ({"grid": [2, "3"]}, "grid: \"[2, '3']\" is not a list of int"),
    ({"grid": [2, 0]}, "not two sides of at least 1"),
    ({"sigma": 5}, "sigma: '5' is not a list of number"),
    ({"sigma": [float("nan")]}, "is not a list of number"),
    ({"images": [5]}, "images: '[5]' is not a list of dict"),
    ({"images": []}, "0 images, 1 sigmas"),
    ({"heads": []}, "no head or branch"),
    ({"more": 1}, "and nothing else"),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE)
def test_an_index_of_another_shape_is_one_line(change, words, tmp_path):
    facts = {"site": "mid", "grid": [2, 3], "branches": ["cond"], "step": 0, "sigma": [1.5], "images": [{"seed": 0}],
             "heads": [0], "file": "000000.safetensors"}  # fmt: skip
    good = json.dumps(facts) + "\n"
    (tmp_path / "index.jsonl").write_text(good)
    (entry,) = Recording.open(tmp_path)
    assert entry.site == "mid" and entry.grid == (2, 3)
    text = change if isinstance(change, str) else good + json.dumps(facts | change) + "\n"
    (tmp_path / "index.jsonl").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError) as error:
        Recording.open(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    if not isinstance(change, str):
        assert "line 2: " in str(error.value)


def test_files_that_the_index_does_not_describe_are_one_line(tmp_path):
    from safetensors.torch import save_file

    facts = {"site": "mid", "grid": [2, 3], "branches": ["cond"], "step": 0, "sigma": [1.5], "images": [{"seed": 0}],
             "heads": [0], "file": "000000.safetensors"}  # fmt: skip
    (tmp_path / "index.jsonl").write_text(json.dumps(facts) + "\n")
    (entry,) = Recording.open(tmp_path)
    with pytest.raises(InputError, match="000000.safetensors: not there"):
        _ = entry.q
    file = tmp_path / "000000.safetensors"
    file.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="not a file of a recording"):
        _ = entry.q
    save_file({"q": torch.zeros(1, 1, 5, 2), "k": torch.zeros(1, 1, 6, 2)}, file)
    with pytest.raises(InputError, match=r"the index has rows, heads and tokens \(1, 1, 6\)"):
        _ = entry.k
    save_file({"q": torch.zeros(1, 1, 6, 2), "k": torch.ones(1, 1, 9, 2)}, file)
    assert entry.k.shape == (1, 1, 9, 2)
