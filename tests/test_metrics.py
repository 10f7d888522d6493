"""Limit cases of the metrics, and how weight files are found and checked."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from segresearch.errors import CheckpointError
from segresearch.metrics import weight_files
from segresearch.metrics.clip_score import clip_score
from segresearch.metrics.features import CLIP, IMAGENET, load_extractor, squared
from segresearch.metrics.frechet import frechet_distance, gaussian
from segresearch.metrics.inception import resized
from segresearch.metrics.interval import interval
from segresearch.metrics.lpips import HEADS, load_lpips
from segresearch.metrics.mmd import cmmd, discrepancy, gaussian_kernel, kid, polynomial, subset
from segresearch.metrics.precision import covered, precision_recall, radii
from segresearch.metrics.weight_files import Asset


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(x, seed=3):
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


# kernel distances


def test_kernel_distances_of_identical_sets():
    x = normal(60, 8)
    for kernel in (polynomial, gaussian_kernel(2.0)):
        found = discrepancy(kernel, x, x)
        assert abs(found.biased) < 1e-12  # and the unbiased one leaves out the large pairs on one side only
        assert found.unbiased < 0
    assert abs(cmmd(x, x).biased) < 1e-9


def test_unbiased_discrepancy_has_mean_zero_and_the_biased_one_falls_with_n():
    draws = [discrepancy(gaussian_kernel(2.0), normal(20, 4, seed=i), normal(20, 4, seed=500 + i)) for i in range(80)]
    unbiased = torch.tensor([d.unbiased for d in draws])
    biased = torch.tensor([d.biased for d in draws])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(len(draws))
    assert biased.min() > 0
    large = discrepancy(gaussian_kernel(2.0), normal(400, 4), normal(400, 4, seed=1))
    assert large.biased < biased.mean() / 4 and (large.n, large.n_reference, large.dim) == (400, 400, 4)


def test_kernel_distances_do_not_depend_on_order_or_on_blocks(monkeypatch):
    x, y = normal(50, 6), normal(41, 6, seed=1) + 0.3
    whole = discrepancy(polynomial, x, y)
    monkeypatch.setattr("segresearch.metrics.mmd.BLOCK", 7)
    blocked = discrepancy(polynomial, shuffled(x), shuffled(y))
    assert blocked.biased == pytest.approx(whole.biased, rel=1e-10)
    assert blocked.unbiased == pytest.approx(whole.unbiased, rel=1e-10)
    with_all = kid(shuffled(x)[:41], y, subsets=2, size=41)  # a subset of all is the whole, twice
    assert with_all.spread < 1e-12


def test_kid_is_keyed_and_states_what_it_rests_on():
    x, y = normal(40, 5), normal(30, 5, seed=1)
    first, again, other = kid(x, y, 4, 10), kid(x, y, 4, 10), kid(x, y, 4, 10, seed=1)
    assert first == again != other
    assert "4 subsets of 10 of N = 40 against 30" in str(first)
    keys = [tuple(subset(40, 10, seed, i, side).tolist()) for seed in (0, 1) for i in range(4) for side in (0, 1)]
    assert len(set(keys)) == len(keys) and all(len(set(k)) == 10 for k in keys)


def test_what_kernel_distances_refuse():
    x = normal(10, 5)
    with pytest.raises(ValueError, match="size=11: subsets cannot be larger than the 10"):
        kid(x, x, 1, 11)
    with pytest.raises(ValueError, match="at least 1 subset of 2"):
        kid(x, x, 1, 1)
    with pytest.raises(ValueError, match="5 and 4 numbers"):
        cmmd(x, x[:, :4])
    with pytest.raises(ValueError, match="reference: 1 pictures"):
        cmmd(x, x[:1])
    with pytest.raises(ValueError, match="not finite"):
        cmmd(x, x / 0)
    with pytest.raises(ValueError, match="width=0"):
        gaussian_kernel(0.0)


# precision and recall


def test_precision_and_recall_of_identical_and_of_distant_sets():
    x = normal(50, 6)
    same, apart = precision_recall(x, shuffled(x)), precision_recall(x, x + 1000)
    assert (same.precision, same.recall) == (1, 1)
    assert (apart.precision, apart.recall) == (0, 0)
    assert str(same).endswith("(N = 50 against 50, k = 3, 6 features)")


def test_precision_falls_with_stray_pictures_and_recall_with_a_lost_mode():
    both = torch.cat([normal(40, 3), normal(40, 3, seed=1) + 50])
    one = precision_recall(normal(80, 3, seed=2), both)
    assert one.precision > 0.8 and 0.3 < one.recall < 0.55
    stray = precision_recall(torch.cat([both, normal(80, 3, seed=3) - 900]), both)
    assert stray.precision == 0.5 and stray.recall == 1


def test_precision_does_not_depend_on_order_or_on_blocks():
    x, y = normal(60, 4), normal(45, 4, seed=1) * 1.3
    assert precision_recall(x, y) == precision_recall(shuffled(x), shuffled(y), block=7)
    assert precision_recall(x, y, block=1) == precision_recall(x, y)


def test_balls_reach_to_the_nearest_other_and_hold_their_edge():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    assert radii(line, 1).sqrt().tolist() == [1, 1, 2, 4]
    assert covered(line[:1] - 1, line, radii(line, 1)) == 1
    twice = normal(5, 400).repeat_interleave(4, 0) * 1e3
    assert radii(twice, 3).tolist() == [0] * 20  # equal pictures are at distance 0, whatever the rounding
    assert covered(twice, twice.flip(0), radii(twice, 3)) == 1


def test_what_precision_refuses():
    x = normal(4, 2)
    with pytest.raises(ValueError, match="neighbour=4: must lie between 1 and 3"):
        precision_recall(x, x, 4)
    with pytest.raises(ValueError, match="2 and 1 numbers"):
        precision_recall(x, x[:, :1])
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(x, x * math.nan)


# Fréchet distance


def test_interval_lies_around_the_distance_and_covers_the_mean():
    reference = gaussian(normal(4000, 3, seed=99))
    found = [frechet_distance(normal(60, 3, seed=i) + 0.5, reference, draws=40) for i in range(20)]
    mean = sum(f.distance for f in found) / len(found)
    ends = [interval(f, 0.9) for f in found]
    assert all(low < f.distance < high for f, (low, high) in zip(found, ends))
    assert sum(low < mean < high for low, high in ends) >= 15  # of 20; 18 are expected
    wider = interval(found[0], 0.95)
    assert wider[0] < ends[0][0] and wider[1] > ends[0][1]


def test_interval_refuses_too_few_draws():
    found = frechet_distance(normal(20, 3), gaussian(normal(30, 3, seed=1)), draws=10)
    with pytest.raises(ValueError, match=r"10 draws: .* 95% needs frechet_distance\(draws=40\)"):
        interval(found)
    with pytest.raises(ValueError, match="level=1"):
        interval(found, 1.0)


def test_frechet_below_the_number_of_features_is_refused_unless_forced():
    x, reference = normal(20, 20), gaussian(normal(40, 20, seed=1))
    with pytest.raises(ValueError, match="20 pictures for 20 features"):
        frechet_distance(x, reference)
    assert frechet_distance(x, reference, force=True).n == 20


# pictures


def test_resizing_as_pillow_does():
    image = (normal(40, 61, 3) * 50 + 128).clamp(0, 255).to(torch.uint8)
    pillow = Image.fromarray(image.numpy())
    batch = image.permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w)
    plain = ((0.0,) * 3, (1 / 255,) * 3)

    def levels(picture):
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)

    whole = levels(pillow.resize((16, 16), Image.Resampling.BICUBIC))
    middle = levels(pillow.crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.BICUBIC))
    assert (squared(batch, 16, plain)[0] - whole).abs().max() < 1.5
    cut = squared(batch, 16, plain, crop=True)[0]
    assert (cut - middle).abs().max() < 1.01 and (cut - cut.round()).abs().max() < 1e-3
    grey = squared(torch.full((1, 3, 16, 16), 128, dtype=torch.uint8), 16, IMAGENET)
    assert torch.allclose(grey[0, 0], torch.tensor((128 / 255 - 0.485) / 0.229))


def test_tensorflow_resize_places_pixels_at_whole_numbers():
    ramp = torch.arange(8.0)[None, None, None].expand(1, 1, 5, 8)
    assert torch.equal(resized(ramp, 8)[0, 0, 0], torch.arange(8.0))
    assert torch.equal(resized(ramp, 16)[0, 0, 3], (torch.arange(16.0) / 2).clamp(max=7))
    assert torch.equal(resized(ramp, 4)[0, 0, 0], torch.tensor([0.0, 2, 4, 6]))


def test_clip_score_is_cut_at_zero_picture_by_picture():
    assert clip_score(torch.tensor([0.271, -0.1])).tolist() == pytest.approx([27.1, 0])
    assert clip_score(torch.tensor([0.4]), 2.5).tolist() == pytest.approx([1.0])


# weights


def test_missing_weights_say_which_file_and_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for load, file in (
        (lambda: load_extractor("inception"), "weights-inception-2015-12-05-6726825d.pth"),
        (lambda: load_lpips("vgg"), "vgg16-397923af.pth"),
        (lambda: load_lpips("alex"), "alexnet-owt-7be5be79.pth"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        said = str(caught.value)
        assert "\n" not in said and said.startswith(f"{file} is not in {tmp_path}") and f"/{file} to " in said
    with pytest.raises(CheckpointError, match="nowhere.pth: no such file; weights-inception.* is at https://"):
        load_extractor("inception", tmp_path / "nowhere.pth")
    absent = Asset("x.pth", "https://x", "0" * 64, ("no_such_package", "weights"))
    with pytest.raises(CheckpointError, match="not installed: pip install no_such_package, or give the path"):
        weight_files.tensors(absent)


def test_missing_hub_models_say_how_to_fetch_them(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"hf download {CLIP} --include"):
        load_extractor("clip")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_extractor("dinov2", tmp_path / "none")
    with pytest.raises(CheckpointError, match="needs config.json and one of model.safetensors"):
        load_extractor("dinov2", tmp_path)
    with pytest.raises(ValueError, match="features 'vgg': choose one of inception, dinov2, clip, mini"):
        load_extractor("vgg")


def test_weights_of_another_checksum_are_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    asset, known = Asset("w.pth", "https://x", "12345678"), weight_files.digest(file)
    with pytest.raises(CheckpointError, match=rf"its SHA-256 is {known}, not 12345678"):
        weight_files.tensors(asset, file)
    held, said = weight_files.tensors(asset, file, known[:8])
    assert said == known and held["a"].tolist() == [0, 0]
    for wrong in ("", "xyz", known[:7], known.upper()):
        with pytest.raises(CheckpointError, match="hexadecimal digits"):
            weight_files.checked(file, wrong)
    with pytest.raises(CheckpointError, match="the weights do not fit: .*Missing key"):
        weight_files.put(torch.nn.Linear(1, 1, device="meta"), held, "w")


class Touch:
    """Pickled, it would create a file when opened carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_that_run_code_and_damaged_files_are_refused(tmp_path):
    bad, cut = tmp_path / "bad.pth", tmp_path / "cut.pth"
    torch.save({"a": Touch(tmp_path / "ran")}, bad)
    cut.write_bytes(b"PK")
    asset = Asset("w.pth", "https://x", "12345678")
    for file in (bad, cut):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            weight_files.tensors(asset, file, weight_files.digest(file))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    listed = tmp_path / "list.pth"
    torch.save([1], listed)
    with pytest.raises(CheckpointError, match="does not hold named tensors"):
        weight_files.tensors(asset, listed, weight_files.digest(listed))


def test_official_lpips_heads_are_the_published_ones():
    for net, count in (("vgg", [64, 128, 256, 512, 512]), ("alex", [64, 192, 384, 256, 256])):
        held, known = weight_files.tensors(HEADS[net])
        assert known == HEADS[net].sha256
        assert [held[f"lin{i}.model.1.weight"].shape[1] for i in range(5)] == count
