"""The metrics against torch-fidelity and torchmetrics, with identical random weights; nothing is fetched."""

import json
import re
from pathlib import Path

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.functional.multimodal.clip_score import _clip_score_update
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from segresearch import pretrained
from segresearch.checkpoints.resolve import MINI
from segresearch.errors import CheckpointError
from segresearch.metrics.features import load_extractor
from segresearch.metrics.frechet import frechet_distance, gaussian
from segresearch.metrics.lpips import load_lpips, lpips_distances
from segresearch.metrics.mini_vision import VisionTower, load_vision
from segresearch.metrics.nonparametric import (
    cmmd,
    discrepancy,
    gaussian_kernel,
    kid,
    polynomial,
    precision_recall,
    subset_indices,
)
from segresearch.metrics.text_alignment import MiniClip, load_clip, text_alignment

TEXTS = ["a red cube", "a blue sphere left of a small green cone", "a ring"]


def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(*shape, seed=0):
    return torch.randint(256, shape, generator=keyed(seed), dtype=torch.uint8)


def sets(n=120, m=90, dim=16, dtype=torch.float32):
    mix = torch.randn(dim, dim, generator=keyed(2))
    x, y = torch.randn(n, dim, generator=keyed()) @ mix, torch.randn(m, dim, generator=keyed(1)) @ mix * 0.9 + 0.2
    return x.to(dtype), y.to(dtype)


def close(ours, theirs, rel):
    ours, theirs = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert apart < rel, apart


def random_state(module, seed=0):
    """Weights that keep activations of the order of 1, for a module on the meta device."""
    generator, state = keyed(seed), {}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        else:
            low = 0.8 if name.endswith(("bn.weight", "var")) else -0.2
            state[name] = low + 0.4 * torch.rand(value.shape, generator=generator)
    return state


# distances of features


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frechet_distance(dtype):
    x, y = sets(dtype=dtype)
    ours = frechet_distance(x, gaussian(y)).distance
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    close(ours, theirs["frechet_inception_distance"], 1e-5)
    x, y = x.double(), y.double()
    close(ours, _compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T)), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_inception_distance(dtype):
    x, y = sets(90, 90, dtype=dtype)
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=90, verbose=False)
    close(discrepancy(polynomial, x, y)[1], theirs["kernel_inception_distance_mean"], 1e-4)
    x, y = sets(dtype=torch.float64)
    distance, spread = kid(x, y, n_subsets=5, size=40)
    rows = [(subset_indices(120, 40, i, 0), subset_indices(90, 40, i, 1)) for i in range(5)]
    values = torch.stack([poly_mmd(x[i], y[j]) for i, j in rows])
    close(distance, values.mean(), 1e-10)
    close(spread, values.std(correction=0), 1e-10)


def test_gaussian_kernel_discrepancy():
    x, y = sets(90, 90, dtype=torch.float64)
    theirs = kernel_mmd(x.numpy(), y.numpy(), kid_kernel="rbf", kid_kernel_rbf_sigma=10.0)
    close(discrepancy(gaussian_kernel, x, y)[1], theirs, 1e-8)
    x, y = (torch.nn.functional.normalize(f, dim=1) for f in (x, y))
    theirs = kernel_mmd(x.numpy(), y.numpy(), kid_kernel="rbf", kid_kernel_rbf_sigma=10.0)
    close(cmmd(x * 3, y * 5)[1], 1000 * theirs, 1e-8)


def test_cmmd_is_the_published_sum():
    x, y = (torch.nn.functional.normalize(f, dim=1) for f in sets(30, 20, dtype=torch.float64))

    def mean(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 200).mean()

    close(cmmd(x, y)[0], 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("neighbour", [1, 3, 5])
def test_precision_and_recall(dtype, neighbour):
    x, y = sets(dim=4, dtype=dtype)
    ours = precision_recall(x, y, neighbour)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=neighbour, verbose=False)
    assert 0 < ours[1] < 1 and 0 < ours[0] <= 1
    close(ours, [theirs["precision"], theirs["recall"]], 1e-6)


# Inception-v3


def reference_inception(*layers):
    """torch-fidelity's network, as it is built but for its download."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.Module.load_state_dict", lambda self, state: self)
        patch.setattr("torch.nn.Module.to", lambda self, dtype: self)
        patch.setattr("torch.load", lambda *a, **k: {})
        return FeatureExtractorInceptionV3("theirs", ["2048", *layers], "weights")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_state(reference_inception()), file)
    return file


def test_inception_features(inception_file):
    before = torch.get_rng_state()
    ours = load_extractor("inception", inception_file, pretrained.digest(inception_file))
    assert torch.equal(before, torch.get_rng_state())
    theirs = reference_inception("logits_unbiased")
    theirs.load_state_dict(torch.load(inception_file), assign=True)
    theirs.eval()
    images = pictures(2, 3, 40, 56)
    features, logits = theirs(images)
    found = ours.of(images, batch=1)
    assert (features > 0).double().mean() > 0.2 and found.dtype == torch.float32
    close(found, features, 1e-5)
    close(found @ ours.classes.T, logits, 1e-5)  # what the inception score reads
    assert str(ours).startswith("inception (2048 features, weights ")


def test_inception_weights_that_run_code_are_refused(tmp_path):
    """torch-fidelity alone would run it."""
    file = tmp_path / "weights.pth"
    torch.save({"a": torch.nn.Linear(1, 1)}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_extractor("inception", file, pretrained.digest(file))


def test_inception_weights_are_checked(inception_file):
    with pytest.raises(CheckpointError, match=r"weights\.pth: its SHA-256 is .*, not 6726825d"):
        load_extractor("inception", inception_file)


# LPIPS


@pytest.fixture(scope="module", params=["vgg", "alex"])
def lpips_nets(request, tmp_path_factory):
    """Ours and torchmetrics' with one random trunk, in torchvision's layout, and the official heads; the trunk file."""
    net, file = request.param, tmp_path_factory.mktemp("lpips") / "trunk.pth"
    with torch.device("meta"):
        other = _LPIPS(net=net, pretrained=False, pnet_rand=True)
    keys = {key: re.sub(r"net\.slice\d", "features", key) for key in other.state_dict()}
    trunk = {keys[k]: v for k, v in random_state(other).items() if keys[k].startswith("features.")}
    torch.save(trunk | {"classifier.1.weight": torch.zeros(2, 2)}, file)
    before = torch.get_rng_state()
    ours = load_lpips(net, file, sha256=(pretrained.digest(file), None))
    assert torch.equal(before, torch.get_rng_state())
    heads = torch.load(Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth", map_location="cpu")
    constants = {"scaling_layer.shift": [-0.030, -0.088, -0.188], "scaling_layer.scale": [0.458, 0.448, 0.450]}
    state = trunk | heads | {k: torch.tensor(v).view(1, 3, 1, 1) for k, v in constants.items()}
    other.load_state_dict({k: state[re.sub(r"^lins\.", "lin", name)] for k, name in keys.items()}, assign=True)
    return ours, other.eval(), file


def test_lpips_weights_are_loaded_strictly(lpips_nets, tmp_path):
    net, file = lpips_nets[0].pnet_type, tmp_path / "trunk.pth"
    trunk = torch.load(lpips_nets[2])
    for changed in (trunk | {"features.99.weight": torch.zeros(1)}, dict(list(trunk.items())[1:])):
        torch.save(changed, file)
        with pytest.raises(CheckpointError, match=f"LPIPS {net}: the weights do not fit: .*(Missing|Unexpected) key"):
            load_lpips(net, file, sha256=(pretrained.digest(file), None))


def test_lpips(lpips_nets):
    ours, metric, _ = lpips_nets
    a, b = pictures(2, 3, 40, 56), pictures(2, 3, 40, 56, seed=1)
    x, y = a / 127.5 - 1, b / 127.5 - 1
    found = lpips_distances(ours, a, b, batch=1)
    with torch.no_grad():
        close(found, metric(x, y).flatten(), 1e-5)


def test_lpips_limits(lpips_nets):
    ours = lpips_nets[0]
    a, b = pictures(2, 3, 40, 32), pictures(2, 3, 40, 32, seed=1)
    assert lpips_distances(ours, a, a).tolist() == [0, 0]
    close(lpips_distances(ours, a, b), lpips_distances(ours, b, a), 1e-6)
    close(lpips_distances(ours, a, b)[1:], lpips_distances(ours, a[1:], b[1:]), 1e-5)
    net = ours.pnet_type
    least = {"vgg": 16, "alex": 31}[net]
    assert lpips_distances(ours, a[:, :, :least, :least], b[:, :, :least, :least]).isfinite().all()
    with pytest.raises(ValueError, match=f"LPIPS with {net} needs sides of {least} pixels"):
        lpips_distances(ours, a[:, :, : least - 1], b[:, :, : least - 1])
    with pytest.raises(ValueError, match="cannot be compared one by one"):
        lpips_distances(ours, a, b[:, :, :, :31])
    with pytest.raises(ValueError, match="cannot be compared one by one"):
        lpips_distances(ours, a, b[:1])


def test_lpips_net_must_be_known():
    with pytest.raises(ValueError, match="LPIPS net='squeeze': choose one of vgg, alex"):
        load_lpips("squeeze")


# CLIP and DINOv2


class Plain(CLIPModel):
    """CLIPModel whose feature methods return tensors, as torchmetrics expects of them."""

    def get_image_features(self, *inputs):
        return super().get_image_features(*inputs).pooler_output

    def get_text_features(self, *inputs):
        return super().get_text_features(*inputs).pooler_output


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(str(MINI / "tokenizer"))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = tower | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        for p in model.parameters():
            if p.ndim > 1:
                p.data.mul_(3)
    for part in (model, tokenizer, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)):
        part.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (90, 40)])
def test_clip_score(clip_folder, size):
    clip = load_clip(clip_folder)
    images = pictures(3, 3, *size)
    theirs = CLIPProcessor(CLIPImageProcessor.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder))
    with torch.no_grad():
        score, _ = _clip_score_update(list(images), TEXTS, Plain.from_pretrained(clip_folder).eval(), theirs)
    found = text_alignment(clip, images, TEXTS, batch=2)
    close(found, score / 100, 1e-5)
    close(found[1:2], text_alignment(clip, images[1:2], TEXTS[1:2]), 1e-5)


def test_what_clip_refuses_and_warns_of(clip_folder, tmp_path):
    clip = load_clip(clip_folder)
    images = pictures(1, 3, 32, 32)
    with pytest.raises(ValueError, match="1 images and 3 as texts"):
        text_alignment(clip, images, TEXTS)
    with pytest.raises(ValueError, match="1 images and one string as texts"):
        text_alignment(clip, images, "a")
    with pytest.raises(ValueError, match="no images"):
        text_alignment(clip, images[:0], [])
    with pytest.warns(UserWarning, match="CLIP reads 16 tokens"):
        assert text_alignment(clip, images, ["a red cube and " * 9]).isfinite().all()
    with pytest.raises(CheckpointError, match="its SHA-256 is"):
        load_clip(clip_folder, sha256="0" * 64)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="no tokenizer or image processor of CLIP"):
        load_clip(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the CLIPModel misses .* weights"):
        load_clip(tmp_path)


def test_clip_features(clip_folder):
    extractor = load_extractor("clip", clip_folder, pretrained.digest(clip_folder / "model.safetensors"))
    images = pictures(3, 3, 32, 32)
    assert extractor.dim == 24
    close(extractor.of(images, batch=2), load_clip(clip_folder).embed_images(images), 1e-5)
    assert extractor.of(pictures(1, 3, 50, 70)).norm(dim=1).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="no images"):
        extractor.of(images[:0])


def test_dinov2_features(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
        ).eval()
    model.save_pretrained(str(tmp_path))
    extractor = load_extractor("dinov2", tmp_path)
    images = pictures(2, 3, 224, 224)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        close(extractor.of(images, batch=1), model((images / 255 - mean) / std).pooler_output, 1e-5)
    assert extractor.of(pictures(1, 3, 50, 70)).shape == (1, 32)


def test_features_and_cosines_of_the_embedded_model(tmp_path):
    tower, folder = VisionTower(width=8, features=24, projections=[6, 10]), tmp_path / "vision"
    folder.mkdir()
    save_file(tower.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": 8, "features": 24, "projections": [6, 10]}))
    images = pictures(3, 3, 64, 64)
    extractor = load_extractor("mini", tmp_path)
    with torch.no_grad():
        close(extractor.of(images), tower.vision(images / 127.5 - 1), 1e-5)
    with pytest.raises(ValueError, match="images of 64×32: the features of mini need 64×64"):
        extractor.of(images[..., :32])
    assert extractor.dim == 24 and extractor.weights == pretrained.digest(folder / "model.safetensors")

    class Text:
        @staticmethod
        def encode(texts):
            pooled = torch.tensor([[float(len(t) + i) for i in range(10)] for t in texts])
            return pooled[:, None], pooled

    found = text_alignment(MiniClip(load_vision(tmp_path), Text), images, TEXTS, batch=2)
    with torch.no_grad():
        wanted = torch.cosine_similarity(
            tower.vision_projections[1](tower.vision(images / 127.5 - 1)), Text.encode(TEXTS)[1]
        )
    close(found, wanted, 1e-5)
