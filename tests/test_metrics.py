"""Limit cases of the metrics, and how weight files are found and checked."""

import itertools
import math
import sys
from pathlib import Path

import lpips
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import save_file

from segresearch import pretrained
from segresearch.errors import CheckpointError, PackageError
from segresearch.metrics.features import CLIP_336, IMAGENET, load_extractor, normalized_squares
from segresearch.metrics.frechet import Gaussian, bootstrap_indices, distance_parts, frechet_distance, gaussian
from segresearch.metrics.lpips import HEADS, load_lpips
from segresearch.metrics.nonparametric import (
    cmmd,
    covered,
    density_coverage,
    discrepancy,
    gaussian_kernel,
    kid,
    polynomial,
    precision_recall,
    squared_radii,
    subset_indices,
)
from segresearch.pretrained import Asset


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(x, seed=3):
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


# kernel distances


def narrow(x, y):
    """A Gaussian kernel of width 2."""
    return gaussian_kernel(5 * x, 5 * y)


def test_kernel_distances_of_identical_sets():
    x = normal(60, 8)
    for kernel in (polynomial, narrow):
        biased, unbiased = discrepancy(kernel, x, x)
        assert abs(biased) < 1e-12  # and the unbiased one leaves out the large pairs on one side only
        assert unbiased < 0
    assert abs(cmmd(x, x)[0]) < 1e-9


def test_unbiased_discrepancy_has_mean_zero_and_the_biased_one_falls_with_n():
    draws = [discrepancy(narrow, normal(20, 4, seed=i), normal(20, 4, seed=500 + i)) for i in range(80)]
    biased, unbiased = torch.tensor(draws).T
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(len(draws))
    assert biased.min() > 0
    large, _ = discrepancy(narrow, normal(400, 4), normal(400, 4, seed=1))
    assert large < biased.mean() / 4


def test_kernel_distances_do_not_depend_on_order_or_on_blocks(monkeypatch):
    x, y = normal(50, 6), normal(41, 6, seed=1) + 0.3
    whole = discrepancy(polynomial, x, y)
    monkeypatch.setattr("segresearch.metrics.nonparametric.BLOCK", 7)
    blocked = discrepancy(polynomial, shuffled(x), shuffled(y))
    assert blocked == pytest.approx(whole, rel=1e-10)
    _, spread = kid(shuffled(x)[:41], y, n_subsets=2, size=41)  # a subset of all is the whole, twice
    assert spread < 1e-12


def test_kid_is_keyed():
    x, y = normal(40, 5), normal(30, 5, seed=1)
    assert kid(x, y, 4, 10) == kid(x, y, 4, 10) != kid(x, y, 5, 10)
    every = itertools.product(range(4), (0, 1))
    keys = [tuple(subset_indices(40, 10, *key).tolist()) for key in every]
    assert len(set(keys)) == len(keys) and all(len(set(k)) == 10 for k in keys)


def test_what_kernel_distances_refuse():
    x = normal(10, 5)
    with pytest.raises(ValueError, match="size=11: subsets cannot be larger than the 10"):
        kid(x, x, 1, 11)
    with pytest.raises(ValueError, match="at least 1 subset of 2"):
        kid(x, x, 1, 1)
    with pytest.raises(ValueError, match="5 and 4 numbers"):
        cmmd(x, x[:, :4])
    with pytest.raises(ValueError, match="reference: 1 images"):
        cmmd(x, x[:1])
    with pytest.raises(ValueError, match="not finite"):
        cmmd(x, x / 0)


# precision and recall


def test_precision_and_recall_of_identical_and_of_distant_sets():
    x = normal(50, 6)
    assert precision_recall(x, shuffled(x)) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    for seed in range(8):  # what lies on the edge of a ball is in it, however a product of matrices is rounded
        y = 100 + 3 * normal(51 + 7 * seed, 37, seed=seed)
        density, coverage = density_coverage(y, y, 5)
        assert (density, coverage) == (pytest.approx(6 / 5, abs=1e-9), 1)


def test_precision_falls_with_stray_pictures_and_recall_with_a_lost_mode():
    both = torch.cat([normal(40, 3), normal(40, 3, seed=1) + 50])
    precision, recall = precision_recall(normal(80, 3, seed=2), both)
    assert precision > 0.8 and 0.3 < recall < 0.55
    assert precision_recall(torch.cat([both, normal(80, 3, seed=3) - 900]), both) == (0.5, 1)


def test_precision_does_not_depend_on_order_or_on_blocks(monkeypatch):
    x, y = normal(60, 4), normal(45, 4, seed=1) * 1.3
    whole = precision_recall(x, y)
    for rows in (7, 1):
        monkeypatch.setattr("segresearch.metrics.nonparametric.ROWS", rows)
        assert precision_recall(x, y) == precision_recall(shuffled(x), shuffled(y)) == whole


def test_balls_reach_to_the_nearest_other_and_hold_their_edge():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    assert squared_radii(line, 1).sqrt().tolist() == [1, 1, 2, 4]
    assert covered(line[:1] - 1, line, squared_radii(line, 1)) == 1
    twice = normal(5, 400).repeat_interleave(4, 0) * 1e3
    assert squared_radii(twice, 3).tolist() == [0] * 20  # equal pictures are at distance 0, whatever the rounding
    assert covered(twice, twice.flip(0), squared_radii(twice, 3)) == 1


def test_what_precision_refuses():
    x = normal(4, 2)
    with pytest.raises(ValueError, match="neighbour=4: must lie between 1 and 3"):
        precision_recall(x, x, 4)
    with pytest.raises(ValueError, match="2 and 1 numbers"):
        precision_recall(x, x[:, :1])
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(x, x * math.nan)


# Fréchet distance


def of(mean, cov):
    return Gaussian(torch.as_tensor(mean).double(), torch.as_tensor(cov).double(), 1000)


def covariance(dim, seed):
    a = normal(dim, dim + 3, seed=seed)
    return a @ a.T / dim


def test_equal_shifted_and_scaled_gaussians():
    cov, mean = covariance(6, 0), normal(6)
    a, b = of(mean, cov), of(mean + 2, cov)
    assert sum(distance_parts(a, a)) == pytest.approx(0, abs=1e-10)
    assert distance_parts(a, b) == pytest.approx((24.0, 0.0), abs=1e-10)
    assert distance_parts(a, of(mean, 9 * cov))[1] == pytest.approx(4 * cov.trace().item())  # (3 − 1)² tr S


def test_commuting_covariances_and_the_general_case():
    basis = torch.linalg.qr(normal(5, 5)).Q
    p, q = torch.tensor([0.0, 1, 2, 3, 4]).double(), torch.tensor([5.0, 0, 2, 1, 9]).double()
    a, b = (of(torch.zeros(5), (basis * z) @ basis.T) for z in (p, q))  # singular: eigenvalues 0
    assert distance_parts(a, b)[1] == pytest.approx((p.sqrt() - q.sqrt()).square().sum().item())
    a, b = (of(normal(7, seed=s), covariance(7, s)) for s in (1, 2))
    expected = (a.cov + b.cov).trace() - 2 * scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real.trace()
    assert distance_parts(a, b)[1] == pytest.approx(expected.item())
    assert sum(distance_parts(a, b)) == pytest.approx(sum(distance_parts(b, a)))
    torch.testing.assert_close(a.root @ a.root, a.cov)


def test_a_gaussian_has_the_mean_and_the_unbiased_covariance():
    x = normal(50, 4) + 1e4  # far from zero: sums of squares would lose digits
    fitted = gaussian(x)
    torch.testing.assert_close(fitted.mean, x.mean(0))
    torch.testing.assert_close(fitted.cov, torch.cov(x.T))
    assert (fitted.count, fitted.dim) == (50, 4)


def test_too_few_or_broken_features_are_refused():
    x = normal(5, 5)
    with pytest.raises(ValueError, match="5 images for 5 features"):
        gaussian(x)
    assert gaussian(x, force=True).count == 5
    with pytest.raises(ValueError, match="1 images"):
        gaussian(x[:1], force=True)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        gaussian(x, force=True)
    with pytest.raises(ValueError, match="5 and 4 features"):
        distance_parts(of(torch.zeros(5), torch.eye(5)), of(torch.zeros(4), torch.eye(4)))


def test_result_states_n_and_has_errors():
    reference = gaussian(normal(4000, 3, seed=1))
    x = normal(400, 3, seed=2)
    d = frechet_distance(x, reference, n_bootstrap=40)
    assert (d.n, d.n_reference, d.dim, len(d.resamples)) == (400, 4000, 3, 40)
    assert d.mean_part == pytest.approx((x.mean(0) - reference.mean).square().sum().item())
    assert 0 < d.error < 0.1 and abs(d.extrapolated) < d.distance  # the truth is 0, the bias upwards
    assert sum(frechet_distance(rows, reference).distance for rows in x.split(100)) / 4 > d.distance
    assert "N = 400 against 4000" in str(d)
    plain = frechet_distance(x[:6], reference)
    assert math.isnan(plain.extrapolated) and math.isnan(plain.error) and plain.resamples == ()


def test_the_bootstrap_is_of_the_same_rows_for_every_method():
    """So the error of a difference is that of pairs: 0 where method and reference are both shifted by a constant."""
    x, reference = normal(60, 3), gaussian(normal(200, 3, seed=1))
    first = frechet_distance(x, reference, n_bootstrap=20)
    rows = bootstrap_indices(60, 20)
    assert first.resamples[7] == pytest.approx(frechet_distance(x[rows[7]], reference).distance)
    moved = Gaussian(reference.mean + 5, reference.cov, reference.count)
    second = frechet_distance(x + 5, moved, n_bootstrap=20)
    assert torch.tensor(first.resamples) - torch.tensor(second.resamples) == pytest.approx(0, abs=1e-6)
    assert first.error == pytest.approx(torch.tensor(first.resamples).std().item(), rel=1e-5)


def test_frechet_below_the_number_of_features_is_refused_unless_forced():
    x, reference = normal(20, 20), gaussian(normal(40, 20, seed=1))
    with pytest.raises(ValueError, match="20 images for 20 features"):
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
    assert (normalized_squares(batch, 16, plain)[0] - whole).abs().max() < 1.5
    cut = normalized_squares(batch, 16, plain, crop=True)[0]
    assert (cut - middle).abs().max() < 1.01 and (cut - cut.round()).abs().max() < 1e-3
    grey = normalized_squares(torch.full((1, 3, 16, 16), 128, dtype=torch.uint8), 16, IMAGENET)
    assert torch.allclose(grey[0, 0], torch.tensor((128 / 255 - 0.485) / 0.229))


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
        assert "\n" not in said and said.startswith(f"{tmp_path}/hub/checkpoints/{file}: no such file")
        assert f"/{file} there" in said and "https://" in said
    with pytest.raises(CheckpointError, match="nowhere.pth: no such file; download https:.*weights-inception.* there"):
        load_extractor("inception", tmp_path / "nowhere.pth")


@pytest.mark.parametrize("package, load", [("torch_fidelity", "inception"), ("lpips", "vgg")])
def test_a_missing_package_is_one_line_with_its_command(monkeypatch, tmp_path, package, load):
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(PackageError, match=r"pip install 'segresearch\[metrics\]'") as caught:
        load_lpips(load, file) if package == "lpips" else load_extractor(load, file, pretrained.digest(file))
    assert "\n" not in str(caught.value) and package.replace("_", "-") in str(caught.value)


def test_missing_hub_models_say_how_to_fetch_them(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"hf download {CLIP_336} --include"):
        load_extractor("clip")
    for folder in (tmp_path / "none", "./none"):
        with pytest.raises(CheckpointError, match="no such folder"):
            load_extractor("dinov2", folder)
    with pytest.raises(CheckpointError, match="no config.json, model.safetensors or pytorch_model.bin there"):
        load_extractor("dinov2", tmp_path)
    with pytest.raises(ValueError, match="features 'vgg': choose one of inception, dinov2, clip, mini"):
        load_extractor("vgg")


def test_weights_of_another_checksum_are_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    asset, known = Asset("w.pth", "https://x/", "12345678"), pretrained.digest(file)
    with pytest.raises(CheckpointError, match=rf"its SHA-256 is {known}, not 12345678"):
        pretrained.load_tensors(asset, file)
    held, said = pretrained.load_tensors(asset, file, known[:8])
    assert said == known and held["a"].tolist() == [0, 0]
    for wrong in ("", "xyz", known[:7], known.upper()):
        with pytest.raises(CheckpointError, match="hexadecimal digits"):
            pretrained.digest(file, wrong)
    for load in (load_extractor, load_lpips):
        net = "inception" if load is load_extractor else "alex"
        with pytest.raises(CheckpointError, match=f"(?i){net}: the weights do not fit: .*Missing key"):
            load(net, file, sha256=known if load is load_extractor else (known, None))


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
    asset = Asset("w.pth", "https://x/", "12345678")
    for file in (bad, cut):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            pretrained.load_tensors(asset, file, pretrained.digest(file))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    listed = tmp_path / "list.pth"
    torch.save([1], listed)
    with pytest.raises(CheckpointError, match="does not hold named tensors"):
        pretrained.load_tensors(asset, listed, pretrained.digest(listed))


def test_official_lpips_heads_are_the_published_ones():
    for net, count in (("vgg", [64, 128, 256, 512, 512]), ("alex", [64, 192, 384, 256, 256])):
        held, known = pretrained.load_tensors(HEADS[net], Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth")
        assert known == HEADS[net].sha256
        assert [held[f"lin{i}.model.1.weight"].shape[1] for i in range(5)] == count


def test_density_and_coverage_are_those_of_a_slow_count():
    x, y = normal(30, 3, seed=4), normal(25, 3, seed=5)
    between, among = torch.cdist(y.double(), x.double()), torch.cdist(y.double(), y.double())
    for k in (1, 3, 5):
        radii = [sorted(row.tolist())[k] for row in among]  # the first is itself
        inside = [[float(d) < radius for d in row] for row, radius in zip(between, radii)]
        density, coverage = sum(map(sum, inside)) / (k * 30), sum(map(any, inside)) / 25
        assert density_coverage(x, y, k) == pytest.approx((density, coverage), abs=1e-12)
    assert density_coverage(y + 1000, y) == (0, 0) and density_coverage(shuffled(y), y)[1] == 1
    for features, reference, neighbour in ((x, y, 25), (x, y, 0)):
        with pytest.raises(ValueError, match="must lie between 1 and 24"):
            density_coverage(features, reference, neighbour)
