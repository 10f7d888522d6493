"""Metrics and feature extractors on a GPU that is not there. What is of the CPU by design says so."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import (
    DTYPES,
    check_same,
    moved,
    on_the_cpu,
    sent,
)
from lpips import LPIPS
from score_files import TOKENIZER, clip_folder, hps_file, image_reward_folder, linear_head
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import (
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from segresearch import pretrained
from segresearch.checkpoints.resolve import resolve_model
from segresearch.evaluation.image_metrics import look
from segresearch.metrics import features, frechet, open_clip_file
from segresearch.metrics.agreement import AttributeClassifier, agreement, classify, edge_agreement, scene_attributes
from segresearch.metrics.features import load_extractor
from segresearch.metrics.inception_score import inception_scores
from segresearch.metrics.lpips import lpips_distances
from segresearch.metrics.mini_vision import VisionTower, perceptual_distances, unit_range
from segresearch.metrics.nonparametric import cmmd, discrepancy, kid, polynomial, precision_recall
from segresearch.metrics.scores import SCORERS, load_scorer
from segresearch.metrics.text_alignment import Clip, MiniClip, text_alignment
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
def extractors(monkeypatch, tmp_path, gpu):
    """load_extractor with weights that are random, and small where a config says how large."""
    networks = {
        Dinov2Model: real(Dinov2Model, Dinov2Config(**SMALL, image_size=28, patch_size=14)),
        CLIPVisionModelWithProjection: real(CLIPVisionModelWithProjection, CLIPVisionConfig(**VIT)),
    }
    with on_the_cpu():
        CLIPVisionConfig(**VIT).save_pretrained(tmp_path)
    tower = real(VisionTower)

    def frozen(module, device):
        return moved(module) if torch.device(device).type == "cuda" else module

    monkeypatch.setattr(features.pretrained, "hub_weights", lambda path, sha256: (tmp_path, "0" * 64))
    monkeypatch.setattr(
        features.pretrained, "load_pretrained", lambda kind, folder, device, **more: frozen(networks[kind], device)
    )
    monkeypatch.setattr(features.pretrained, "frozen", frozen)
    monkeypatch.setattr(features, "load_vision", lambda path: tower)
    monkeypatch.setattr(features.pretrained, "load_tensors", lambda *given: ({}, "0" * 64))
    return gpu


@pytest.mark.parametrize("name", [name for name in features.EXTRACTORS if name != "inception"])
def test_extractors(extractors, name):
    """Pictures of the CPU are sent to the network; `of` brings the features back, a batch at a time."""
    images = pictures()
    with on_the_cpu():
        expected = load_extractor(name).of(images)
    found = load_extractor(name, device="cuda:0")
    check_same(found.network(images.to("cuda")), expected, rtol=1e-4, atol=1e-4)
    check_same(found.of(images, batch=1), expected, device="cpu", rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no images"):
        found.of(images[:0])


def test_inception(extractors, monkeypatch):
    """The whole network, at its own size."""
    with monkeypatch.context() as patch:  # as it is built, with random weights
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        patch.setattr(torch, "load", lambda *given, **more: {})
        network = real(FeatureExtractorInceptionV3, "inception", ["2048"], "none")
    monkeypatch.setattr(feature_extractor_inceptionv3, "FeatureExtractorInceptionV3", lambda *given, **more: network)
    images = pictures(1)
    with on_the_cpu():
        expected = network(images)[0]
    extractor = load_extractor("inception", device="cuda:0")
    check_same(extractor.network(images.to("cuda")), expected, rtol=1e-4, atol=1e-5)


# --- networks that compare ------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips(gpu, net):
    a, b = pictures(1, 32), pictures(1, 32, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, on an argument that lpips gives it
        module = real(LPIPS, net=net, pretrained=False, pnet_rand=True, verbose=False)
    with on_the_cpu():
        expected = lpips_distances(module, a, b)
    found = lpips_distances(moved(module), a, b.to("cuda"))
    check_same(found, expected, device="cpu", rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_alignment(gpu, dtype):
    """The model's own image processor works on the CPU, by design; its pixels and tokens are then sent."""
    text = {**SMALL, "vocab_size": 721, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
    model = real(CLIPModel, CLIPConfig(text_config=text, vision_config=VIT, projection_dim=6))
    tokenizer = load_tokenizer(resolve_model("mini") / "tokenizer")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images, texts = pictures(), ["a red cube", "a very long text that is cut off after sixteen tokens"]
    with on_the_cpu():
        model = model.to(dtype)
        with pytest.warns(UserWarning, match="16 tokens"):
            expected = text_alignment(Clip("0", model, tokenizer, processor), images, texts, batch=2)
    clip = Clip("0", moved(model), tokenizer, processor)
    with pytest.warns(UserWarning, match="16 tokens"):
        found = text_alignment(clip, images.to("cuda"), texts, batch=2)
    check_same(found, expected, device="cpu", rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert clip.embed_images(images).device.type == clip.embed_texts(texts[:1]).device.type == "cuda"


@pytest.fixture(scope="module")
def score_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    torch.save(linear_head(24), folder / "aesthetic.pth")
    hps_file(folder)
    hps_file(folder, "HPS_v2_compressed.pt")
    clip_folder(folder / "clip")
    return image_reward_folder(folder)


@pytest.mark.parametrize("name", SCORERS)
def test_scores(score_folder, gpu, monkeypatch, name):
    """Networks are read on the CPU and moved. What Pillow resizes and what tokenizers read is of the CPU, then sent."""
    path, beside, sha256 = score_folder, TOKENIZER, None
    if name == "aesthetic":
        path, beside = score_folder / "aesthetic.pth", score_folder / "clip"
        sha256 = pretrained.digest(path)
    elif name == "pickscore":
        path = score_folder / "clip"
    elif name == "imagereward":
        beside = score_folder
    images, texts = pictures(2, 40), ["a red cube", "a small green cone and a ring"]
    with on_the_cpu():
        expected = load_scorer(name, path, beside, sha256).of(images, texts)
    frozen = pretrained.frozen

    def sent_to(module, device):
        with on_the_cpu():
            module = frozen(module)
        return moved(module) if torch.device(device).type == "cuda" else module

    def read_on_the_cpu(read):
        def inside(*given, **more):
            with on_the_cpu():
                return read(*given, **more)

        return inside

    monkeypatch.setattr(pretrained, "frozen", sent_to)
    monkeypatch.setattr(pretrained, "read_tensors", read_on_the_cpu(pretrained.read_tensors))
    monkeypatch.setattr(open_clip_file, "_taken", read_on_the_cpu(open_clip_file._taken))
    for kind in (CLIPModel, CLIPVisionModelWithProjection, BlipVisionModel, BlipTextModel):
        monkeypatch.setattr(kind, "from_pretrained", read_on_the_cpu(kind.from_pretrained))
    found = load_scorer(name, path, beside, sha256, device="cuda:0")
    assert found.network(images.to("cuda"), texts).device.type == "cuda"
    check_same(found.of(images, texts, batch=1), expected, device="cpu", rtol=1e-4, atol=1e-4)


def test_networks_of_mini(gpu):
    """Pictures are sent to where the network lies, the results stay there."""
    tower, classifier, images = real(VisionTower), real(AttributeClassifier), pictures()
    with on_the_cpu():
        pooled = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
        text = SimpleNamespace(encode=lambda texts: (None, pooled))
        expected = [
            MiniClip(tower, text).embed_images(images),
            MiniClip(tower, text).embed_texts(["a", "b"]),
            perceptual_distances(tower.vision, images, images.flip(0)),
        ]
        cosines = text_alignment(MiniClip(tower, text), images, ["a", "b"])
        predicted = classify(classifier, images)
        scores = agreement(predicted, scene_attributes([0, 1]))
    fake, text = moved(tower), SimpleNamespace(encode=lambda texts: (None, pooled.to("cuda")))
    found = [
        MiniClip(fake, text).embed_images(images),
        MiniClip(fake, text).embed_texts(["a", "b"]),
        perceptual_distances(fake.vision, images.to("cuda"), images.flip(0)),
    ]
    check_same(text_alignment(MiniClip(fake, text), images, ["a", "b"]), cosines, device="cpu")
    check_same(found, expected)
    ours = classify(moved(classifier), images)
    check_same(ours, predicted)
    theirs = scene_attributes([0, 1])
    assert theirs.pairs.device.type == "cpu"  # by design: of numbers of scenes
    check_same(agreement(ours, type(theirs)(*sent([theirs.count, theirs.shapes, theirs.colors, theirs.pairs]))), scores)


def test_edges_and_look(gpu):
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


def test_inception_scores(gpu):
    """Where the features lie; the scores of the parts are brought over."""
    x, classes = sets()[0], sets()[1][:7]
    with on_the_cpu():
        expected = inception_scores(x, classes, 4)
    check_same(inception_scores(x.to("cuda"), classes.to("cuda"), 4), expected, device="cpu")


def test_frechet_is_of_the_cpu(gpu):
    """By design: eigenvalues in fp64 of a few matrices. Features of the device are brought over at once, explicitly."""
    x, y = sets()
    with on_the_cpu():
        expected = frechet.frechet_distance(x, frechet.gaussian(y), n_bootstrap=40)
    x, y = sent((x, y))
    fitted = frechet.gaussian(y)
    assert fitted.mean.device.type == fitted.cov.device.type == fitted.root.device.type == "cpu"
    found = frechet.frechet_distance(x, fitted, n_bootstrap=40)
    assert found.distance == pytest.approx(expected.distance) and found.error == pytest.approx(expected.error)
    assert found.resamples == pytest.approx(expected.resamples) and math.isfinite(found.extrapolated)


def test_kernels_and_neighbours(gpu):
    """Where the features lie; only the sums are read."""
    x, y = sets()

    def measured(x, y):
        near = precision_recall(x, y)
        return kid(x, y, n_subsets=2, size=20), cmmd(x, y), discrepancy(polynomial, x, y), near

    with on_the_cpu():
        expected = measured(x, y)
    for ours, theirs in zip(measured(*sent((x, y))), expected):
        assert ours == pytest.approx(theirs)
