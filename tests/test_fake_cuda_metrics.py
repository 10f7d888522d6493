"""Metrics and feature extractors on a GPU that is not there. What is of the CPU by design says so."""

import math
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import (
    DTYPES,
    check_same,
    gpu,  # noqa: F401  a fixture
    moved,
    on_the_cpu,
    sent,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from segresearch.checkpoints.resolve import resolve_model
from segresearch.evaluation.image_metrics import look
from segresearch.metrics import features, frechet, inception, mmd
from segresearch.metrics.attributes import Namer, agreement, named, of_objects, of_scenes
from segresearch.metrics.clip_score import Clip, clip_score, cosines, mini_cosines
from segresearch.metrics.edge_agreement import edge_agreement
from segresearch.metrics.features import load_extractor
from segresearch.metrics.interval import interval
from segresearch.metrics.lpips import LPIPS, lpips_distances
from segresearch.metrics.mini_vision import VisionTower, features_of, unit_range
from segresearch.metrics.perceptual_mini import distances
from segresearch.metrics.precision import precision_recall
from segresearch.models.text import load_tokenizer

ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4}


def pictures(n=2, side=64, seed=0):
    with on_the_cpu():
        return torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def real(build, *args, **more):
    """A network of random weights on the CPU, for evaluation."""
    with on_the_cpu(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **more).eval().requires_grad_(False)


# --- extractors -----------------------------------------------------------------------------------

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
VIT = {**SMALL, "image_size": 28, "patch_size": 14, "projection_dim": 6}


@pytest.fixture
def extractors(monkeypatch, tmp_path, gpu):  # noqa: F811
    """load_extractor with weights that are random, and small where a config says how large."""
    networks = {
        Dinov2Model.from_pretrained: real(Dinov2Model, Dinov2Config(**SMALL, image_size=28, patch_size=14)),
        CLIPVisionModelWithProjection.from_pretrained: real(CLIPVisionModelWithProjection, CLIPVisionConfig(**VIT)),
    }
    with on_the_cpu():
        CLIPVisionConfig(**VIT).save_pretrained(tmp_path)
    tower = real(VisionTower)

    def frozen(module, device, dtype):
        with on_the_cpu():
            module = module.to(dtype)
        return moved(module) if torch.device(device).type == "cuda" else module

    monkeypatch.setattr(features.weight_files, "hub_folder", lambda path, sha256: (tmp_path, "0" * 64))
    monkeypatch.setattr(features.weight_files, "pretrained", lambda build, folder, **more: networks[build])
    monkeypatch.setattr(features.weight_files, "frozen", frozen)
    monkeypatch.setattr(features, "load_vision", lambda path: tower)
    monkeypatch.setattr(features.weight_files, "tensors", lambda *given: ({}, "0" * 64))
    monkeypatch.setattr(features.weight_files, "put", lambda *given: None)
    return gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in features.EXTRACTORS if name != "inception"])
def test_extractors(extractors, name, dtype):
    """Pictures of the CPU are sent to the network; `of` brings the features back, a batch at a time."""
    images = pictures()
    with on_the_cpu():
        expected = load_extractor(name, dtype=dtype)(images)
    found = load_extractor(name, device="cuda:0", dtype=dtype)
    check_same(found(images), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    check_same(found.of(images.to("cuda"), batch=1), expected, device="cpu", rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    with pytest.raises(ValueError, match="no pictures"):
        found.of(images[:0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inception(extractors, monkeypatch, dtype):
    """The whole network, at its own size, in shapes and devices alone."""
    images = pictures()
    with on_the_cpu(), torch.device("meta"):
        whole = inception.Inception()
    monkeypatch.setattr(inception, "Inception", lambda: whole)
    with extractors.without_values():
        extractor = load_extractor("inception", device="cuda:0", dtype=dtype)
        found = extractor(images)
        assert (found.device.type, found.dtype, found.shape) == ("cuda", dtype, (2, inception.FEATURES))
        assert extractor.network.logits(found).device.type == "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_inception(gpu, dtype):  # noqa: F811
    """Its resizing, and one block of each kind at a few places, with values."""
    with on_the_cpu():
        images = pictures().to(dtype)
        expected = inception.resized(images, 9)
    check_same(inception.resized(images.to("cuda"), 9), expected, rtol=ROUNDING[dtype], atol=1)
    kinds = [(inception._narrow, (192, 32)), (inception._wide, (1280, "max"))]
    for build, given in kinds if dtype == torch.float32 else kinds[:1]:
        block = real(build, *given)
        with on_the_cpu():
            block = block.to(dtype)
            x = torch.randn(1, given[0], 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
            expected = block(x)
        check_same(moved(block)(x.to("cuda")), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


# --- networks that compare ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, net", [*((d, "alex") for d in DTYPES), (torch.float32, "vgg")])
def test_lpips(gpu, dtype, net):  # noqa: F811
    a, b = pictures(1, 32), pictures(1, 32, seed=1)
    module = real(LPIPS, net)
    with on_the_cpu():
        module = module.to(dtype)
        expected = lpips_distances(module, a, b)
    found = lpips_distances(moved(module), a, b.to("cuda"))
    check_same(found, expected, device="cpu", rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_score(gpu, dtype):  # noqa: F811
    """The model's own image processor works on the CPU, by design; its pixels and tokens are then sent."""
    text = {**SMALL, "vocab_size": 721, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
    model = real(CLIPModel, CLIPConfig(text_config=text, vision_config=VIT, projection_dim=6))
    tokenizer = load_tokenizer(resolve_model("mini") / "tokenizer")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images, texts = pictures(), ["a red cube", "a very long text that is cut off after sixteen tokens"]
    with on_the_cpu():
        model = model.to(dtype)
        with pytest.warns(UserWarning, match="16 tokens"):
            expected = cosines(Clip("tiny", "0", model, tokenizer, processor), images, texts, batch=2)
        scaled = clip_score(expected)
    clip = Clip("tiny", "0", moved(model), tokenizer, processor)
    with pytest.warns(UserWarning, match="16 tokens"):
        found = cosines(clip, images.to("cuda"), texts, batch=2)
    check_same(found, expected, device="cpu", rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    check_same(clip_score(found.to("cuda")), scaled, rtol=ROUNDING[dtype], atol=1)
    assert clip.of_images(images).device.type == clip.of_texts(texts[:1]).device.type == "cuda"


def test_networks_of_mini(gpu):  # noqa: F811
    """Pictures are sent to where the network lies, the results stay there."""
    tower, namer, images = real(VisionTower), real(Namer), pictures()
    with on_the_cpu():
        pooled = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
        text = SimpleNamespace(encode=lambda texts: (None, pooled))
        expected = [
            *features_of(tower, images),
            distances(tower.vision, images, images.flip(0)),
            mini_cosines(tower, text, images, ["a", "b"]),
        ]
        seen = named(namer, images)
        said = of_scenes([0, 1])
        scores = agreement(seen, said)
    fake, text = moved(tower), SimpleNamespace(encode=lambda texts: (None, pooled.to("cuda")))
    found = [
        *features_of(fake, images),
        distances(fake.vision, images.to("cuda"), images.flip(0)),
        mini_cosines(fake, text, images, ["a", "b"]),
    ]
    check_same(found, expected)
    ours = named(moved(namer), images)
    check_same(ours, seen)
    theirs = of_scenes([0, 1])
    assert theirs.pairs.device.type == of_objects([[]]).pairs.device.type == "cpu"  # by design: of numbers of scenes
    check_same(agreement(ours, type(theirs)(*sent([theirs.count, theirs.shapes, theirs.colors, theirs.pairs]))), scores)


def test_edges_and_look(gpu):  # noqa: F811
    images = pictures(2, 16)
    with on_the_cpu():
        edges = torch.arange(512).reshape(2, 16, 16) % 5 == 0
        expected = edge_agreement(unit_range(images), edges), look(images)
    fake = images.to("cuda")
    check_same((edge_agreement(unit_range(fake), edges.to("cuda")), look(fake)), expected)


# --- distances of sets ----------------------------------------------------------------------------


def sets():
    with on_the_cpu():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(40, 4, generator=generator), torch.randn(30, 4, generator=generator) * 0.9 + 0.2


def test_frechet_is_of_the_cpu(gpu):  # noqa: F811
    """By design: eigenvalues in fp64 of a few matrices. Features of the device are brought over at once, explicitly."""
    x, y = sets()
    with on_the_cpu():
        expected = frechet.frechet_distance(x, frechet.gaussian(y), draws=40)
    x, y = sent((x, y))
    fitted = frechet.gaussian(y)
    assert fitted.mean.device.type == fitted.cov.device.type == frechet.root(fitted.cov).device.type == "cpu"
    found = frechet.frechet_distance(x, fitted, draws=40)
    assert found.distance == pytest.approx(expected.distance) and found.error == pytest.approx(expected.error)
    assert interval(found) == pytest.approx(interval(expected)) and math.isfinite(found.extrapolated)


def test_kernels_and_neighbours(gpu):  # noqa: F811
    """Where the features lie; only the sums are read."""
    x, y = sets()

    def measured(x, y):
        return (
            mmd.kid(x, y, subsets=2, size=20), mmd.cmmd(x, y),
            mmd.discrepancy(mmd.polynomial, x, y), precision_recall(x, y, block=16),
        )  # fmt: skip

    with on_the_cpu():
        expected = measured(x, y)
    for ours, theirs in zip(measured(*sent((x, y))), expected):
        assert ours.__dict__ == pytest.approx(theirs.__dict__)
