"""Scores of images against slow references and transformers' own classes, on small random weights."""


import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from score_files import TOKENIZER, clip_folder, hps_file, image_reward, image_reward_folder, linear_head, open_clip
from torch import nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as transforms
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from segresearch import pretrained
from segresearch.config import EvaluateConfig, typed
from segresearch.errors import CheckpointError, ConfigError
from segresearch.evaluation.aggregate import inception_numbers, mean_and_error
from segresearch.evaluation.frame import METRICS, SCORES
from segresearch.evaluation.image_metrics import WEIGHTS, image_metrics
from segresearch.evaluation.spec import evaluation_spec, run_identity, with_folders
from segresearch.metrics.clip_pixels import cropped_squares, padded_squares
from segresearch.metrics.inception_score import inception_scores
from segresearch.metrics.scores import AESTHETIC, BESIDE, SCORERS, load_scorer

TEXTS = ["a red cube", "a blue sphere left of a small green cone", "a ring, and a Ring!"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(28, 28), (64, 64), (40, 57), (90, 41), (31, 28)]


def pictures(h, w, n=3, seed=0):
    return torch.randint(256, (n, 3, h, w), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def close(ours, theirs, most=2e-5):
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert ours.shape == theirs.shape and apart < most, apart


def openai(images, side):
    """OpenAI's and ImageReward's preprocessing, by torchvision on Pillow's images."""
    steps = Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side), ToTensor(), Normalize(MEAN, STD)])
    return torch.stack([steps(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])


# what networks are shown


@pytest.mark.parametrize("size", SIZES)
def test_cropped_squares_are_torchvisions_of_pillow(size):
    images = pictures(*size)
    assert torch.equal(cropped_squares(images, 28), openai(images, 28))


@pytest.mark.parametrize("size", SIZES)
def test_padded_squares_are_those_of_hpsv2(size):
    """The longer side to 28, on tensors in [0, 1]; then black."""
    images = pictures(*size)
    h, w = (round(length * (28 / max(size))) for length in size)
    found = padded_squares(images, 28)
    for image, square in zip(images, found):
        x = transforms.to_tensor(Image.fromarray(image.permute(1, 2, 0).numpy()))
        x = transforms.resize(x, [h, w], InterpolationMode.BICUBIC, antialias=True)
        top, left = (28 - h) // 2, (28 - w) // 2
        x = transforms.pad(x, [left, top, 28 - w - left, 28 - h - top])
        assert torch.equal(square, transforms.normalize(x, MEAN, STD))
    if h < 28:
        black = -torch.tensor(MEAN) / torch.tensor(STD)
        assert torch.allclose(found[:, :, 0], black[:, None].expand(3, 3, 28), atol=1e-6)


# networks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with weights of every score."""
    folder = tmp_path_factory.mktemp("scores")
    clip_folder(folder / "clip")
    torch.save(linear_head(24), folder / "aesthetic.pth")
    hps_file(folder)
    hps_file(folder, "HPS_v2_compressed.pt")
    return image_reward_folder(folder)


@pytest.fixture(scope="module")
def scorers(files):
    given = {
        "aesthetic": (files / "aesthetic.pth", files / "clip", pretrained.digest(files / "aesthetic.pth")),
        "pickscore": (files / "clip", TOKENIZER), "hpsv2": (files, TOKENIZER),
        "hpsv21": (files / "HPS_v2.1_compressed.pt", TOKENIZER), "imagereward": (files, files),
    }  # fmt: skip
    before = torch.get_rng_state()
    found = {name: load_scorer(name, *paths) for name, paths in given.items()}
    assert torch.equal(before, torch.get_rng_state()) and found.keys() == SCORERS.keys()
    return found


@pytest.mark.parametrize("size", SIZES[1:3])
def test_aesthetic(scorers, files, size):
    images = pictures(*size)
    tower = CLIPVisionModelWithProjection.from_pretrained(str(files / "clip"), projection_dim=24)
    weights = torch.load(files / "aesthetic.pth")
    with torch.no_grad():
        x = F.normalize(tower(openai(images, 28)).image_embeds)
        for i in (0, 2, 4, 6, 7):
            x = x @ weights[f"layers.{i}.weight"].T + weights[f"layers.{i}.bias"]
    found = scorers["aesthetic"].of(images, TEXTS, batch=2)
    close(found, x[:, 0])
    assert torch.equal(found, scorers["aesthetic"].of(images, [""] * 3, batch=2))  # prompts do not matter
    head, tower = scorers["aesthetic"].weights.split("+")
    assert head == pretrained.digest(files / "aesthetic.pth")
    assert tower == pretrained.digest(files / "clip" / "model.safetensors")


@pytest.mark.parametrize("size", SIZES[1:3])
def test_pickscore(scorers, files, size):
    """The logits of transformers' own forward."""
    images, model = pictures(*size), CLIPModel.from_pretrained(str(files / "clip"))
    tokens = CLIPTokenizer.from_pretrained(str(TOKENIZER))(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=openai(images, 28)).logits_per_image
    close(scorers["pickscore"].of(images, TEXTS, batch=2), logits.diagonal())


def open_clip_tower(x, weights, prefix, heads, mask=None):
    """Blocks as OpenCLIP has them, by torch's multi-head attention."""
    width = x.shape[-1]
    for i in range(2):
        own = {key.partition(f"{prefix}transformer.resblocks.{i}.")[2]: value for key, value in weights.items()
               if key.startswith(f"{prefix}transformer.resblocks.{i}.")}  # fmt: skip
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict({key[5:]: value for key, value in own.items() if key.startswith("attn.")})
        y = F.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        y = F.gelu(F.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + F.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x


@torch.no_grad()
def hps(images, texts, weights):
    """OpenCLIP's two towers, one text after the other."""
    x = F.conv2d(padded_squares(images, 28), weights["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, 160), x], 1)
    x = x + weights["visual.positional_embedding"]
    x = F.layer_norm(x, (160,), weights["visual.ln_pre.weight"], weights["visual.ln_pre.bias"])
    x = open_clip_tower(x, weights, "visual.", 2)[:, 0]
    x = F.layer_norm(x, (160,), weights["visual.ln_post.weight"], weights["visual.ln_post.bias"])
    pictures, tokenizer = F.normalize(x @ weights["visual.proj"]), CLIPTokenizer.from_pretrained(str(TOKENIZER))
    found = []
    for picture, text in zip(pictures, texts):
        ids = tokenizer([text], truncation=True, max_length=16, return_tensors="pt").input_ids
        n = ids.shape[1]
        x = weights["token_embedding.weight"][ids] + weights["positional_embedding"][:n]
        x = open_clip_tower(x, weights, "", 2, torch.full((n, n), float("-inf")).triu(1))[:, -1]
        x = F.layer_norm(x, (128,), weights["ln_final.weight"], weights["ln_final.bias"])
        found.append((picture * F.normalize(x @ weights["text_projection"])).sum())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv21"])
def test_hpsv2_is_open_clips(scorers, name):
    images, weights = pictures(40, 57), open_clip()
    close(scorers[name].of(images, TEXTS, batch=2), hps(images, TEXTS, weights))
    long = ["a red cube and " * 9] * 3
    with pytest.warns(UserWarning, match="CLIP reads 16 tokens"):
        close(scorers[name].of(images, long), hps(images, long, weights))


def attend(q, k, v, mask=None):
    """Heads of 64."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(2, 3) / 8
    logits = logits if mask is None else logits.masked_fill(~mask[:, None, None], float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
def reward(images, texts, weights, vocabulary):
    """BLIP's encoder as its authors wrote it: a ViT of timm, a BERT whose layers look at the image between attention
    and MLP."""
    eye = {k.removeprefix("blip.visual_encoder."): v for k, v in weights.items() if ".visual_encoder." in k}
    bert = {k.removeprefix("blip.text_encoder."): v for k, v in weights.items() if ".text_encoder." in k}

    def linear(x, part, name):
        return F.linear(x, part[f"{name}.weight"], part[f"{name}.bias"])

    def norm(x, part, name, eps):
        return F.layer_norm(x, x.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"], eps)

    x = F.conv2d(openai(images, 32), eye["patch_embed.proj.weight"], eye["patch_embed.proj.bias"], stride=16)
    x = torch.cat([eye["cls_token"].expand(len(x), 1, 192), x.flatten(2).transpose(1, 2)], 1) + eye["pos_embed"]
    for i in range(2):
        qkv = linear(norm(x, eye, f"blocks.{i}.norm1", 1e-6), eye, f"blocks.{i}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(*qkv), eye, f"blocks.{i}.attn.proj")
        y = linear(norm(x, eye, f"blocks.{i}.norm2", 1e-6), eye, f"blocks.{i}.mlp.fc1")
        x = x + linear(F.gelu(y), eye, f"blocks.{i}.mlp.fc2")
    seen = norm(x, eye, "norm", 1e-6)
    tokens = BertTokenizer.from_pretrained(str(vocabulary))(
        texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    x = bert["embeddings.word_embeddings.weight"][tokens.input_ids]
    x = norm(x + bert["embeddings.position_embeddings.weight"][:35], bert, "embeddings.LayerNorm", 1e-12)
    for i in range(2):
        for kind, context, mask in (("attention", None, tokens.attention_mask.bool()), ("crossattention", seen, None)):
            at, context = f"encoder.layer.{i}.{kind}", x if context is None else context
            q = linear(x, bert, f"{at}.self.query")
            y = attend(q, linear(context, bert, f"{at}.self.key"), linear(context, bert, f"{at}.self.value"), mask)
            x = norm(x + linear(y, bert, f"{at}.output.dense"), bert, f"{at}.output.LayerNorm", 1e-12)
        y = F.gelu(linear(x, bert, f"encoder.layer.{i}.intermediate.dense"))
        y = linear(y, bert, f"encoder.layer.{i}.output.dense")
        x = norm(x + y, bert, f"encoder.layer.{i}.output.LayerNorm", 1e-12)
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = linear(x, weights, f"mlp.layers.{i}")
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("size", SIZES[1:3])
def test_image_reward(scorers, files, size):
    images, weights = pictures(*size), image_reward()
    close(scorers["imagereward"].of(images, TEXTS, batch=2), reward(images, TEXTS, weights, files))
    long = ["a red cube and " * 20] * 3
    with pytest.warns(UserWarning, match="ImageReward reads 35 tokens"):
        close(scorers["imagereward"].of(images, long), reward(images, long, weights, files))


# what is refused


@pytest.mark.parametrize("name", SCORERS)
def test_weights_that_are_missing_are_named_with_the_way_to_get_them(name, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *given: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        load_scorer(name)
    names = {
        "aesthetic": f"download {AESTHETIC.folder}{AESTHETIC.file} there",
        "pickscore": "hf download yuvalkirstain/PickScore_v1 ", "hpsv2": "hf download xswu/HPSv2 HPS_v2_compressed.pt,",
        "hpsv21": "hf download xswu/HPSv2 HPS_v2.1_compressed.pt,",
        "imagereward": "hf download THUDM/ImageReward ImageReward.pt,",
    }  # fmt: skip
    assert names[name] in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizers_and_clips_that_are_missing_are_named(files, monkeypatch):
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *given: None)
    with pytest.raises(CheckpointError, match="hf download openai/clip-vit-large-patch14 vocab.json merges.txt"):
        load_scorer("hpsv2", files)
    with pytest.raises(CheckpointError, match="hf download google-bert/bert-base-uncased vocab.txt"):
        load_scorer("imagereward", files)
    with pytest.raises(CheckpointError, match="clip: no tokenizer here"):
        load_scorer("pickscore", files / "clip", files / "clip")


def changed(weights, name=None, value=None, drop=None):
    return {key: value for key, value in weights.items() if key != drop} | ({name: value} if name else {})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("hpsv21", {"drop": "ln_final.bias"}, "the CLIPModel misses 1 weights, such as ln_final.bias"),
        ("hpsv21", {"name": "x", "value": torch.zeros(1)}, "1 weights that the CLIPModel has not, such as x"),
        ("hpsv21", {"drop": "visual.conv1.weight"}, "not a CLIP in OpenCLIP's layout: no visual.conv1.weight"),
        ("hpsv21", {"name": "visual.ln_pre.bias", "value": torch.zeros(3)}, "ln_pre"),
        ("hpsv21", {"name": "transformer.resblocks.0.mlp.c_fc.weight", "value": torch.zeros(4, 5)}, "other shapes"),
        ("hpsv21", {"name": "x", "value": "text"}, "does not hold named tensors only; hf download xswu/HPSv2"),
        ("imagereward", {"drop": "mlp.layers.7.bias"}, "ImageReward.pt: the weights do not fit"),
        ("imagereward", {"drop": "blip.visual_encoder.norm.bias"}, "misses 1 weights, such as post_layernorm.bias"),
        ("imagereward", {"drop": "blip.visual_encoder.pos_embed"}, "no embeddings.position_embedding"),
        ("imagereward", {"name": "x.y", "value": torch.zeros(1)}, "that ImageReward has not, such as x.y"),
        ("imagereward", {"name": "blip.text_encoder.z", "value": torch.zeros(1)}, "has not, such as z"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(name, change, words, files, tmp_path):
    whole, stored = (open_clip(), "HPS_v2.1_compressed.pt") if name == "hpsv21" else (image_reward(), "ImageReward.pt")
    torch.save(changed(whole, **change), tmp_path / stored)
    with pytest.raises(CheckpointError) as caught:
        load_scorer(name, tmp_path, TOKENIZER if name == "hpsv21" else files)
    said = str(caught.value).replace("pre_layrnorm", "ln_pre")
    assert words in said and "\n" not in said and str(tmp_path) in said


def test_checksums_numbers_and_names(scorers, files):
    with pytest.raises(CheckpointError, match="its SHA-256 is .*, not 21dd590f"):
        load_scorer("aesthetic", files / "aesthetic.pth", files / "clip")
    for name, file in (("hpsv2", "HPS_v2_compressed.pt"), ("imagereward", "ImageReward.pt")):
        with pytest.raises(CheckpointError, match=f"{file}: its SHA-256 is"):
            load_scorer(name, files, files if name == "imagereward" else TOKENIZER, "0" * 64)
    with pytest.raises(ValueError, match="scores 'beauty': choose one of aesthetic, pickscore"):
        load_scorer("beauty")
    images = pictures(28, 28)
    for texts, words in ((TEXTS[:2], "3 images and 2 as prompts"), ("abc", "one string as prompts")):
        with pytest.raises(ValueError, match=words):
            scorers["pickscore"].of(images, texts)
    with pytest.raises(ValueError, match="no images"):
        scorers["pickscore"].of(images[:0], [])


# inception score


def test_inception_score_is_torch_fidelitys():
    generator = torch.Generator().manual_seed(0)
    x, classes = torch.randn(203, 12, generator=generator), torch.randn(40, 12, generator=generator)
    theirs = isc_features_to_metric(x @ classes.T)
    scores = inception_scores(x, classes)
    assert scores.mean().item() == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert scores.std(correction=0).item() == pytest.approx(theirs["inception_score_std"], rel=1e-10)


def test_inception_score_has_its_limits():
    classes = 400 * torch.eye(5)
    assert inception_scores(torch.zeros(30, 5), classes).tolist() == pytest.approx([1] * 10)  # images alike
    assert inception_scores(torch.eye(5).repeat(8, 1), classes, 1).item() == pytest.approx(5)  # all classes, all sure
    for n, splits in ((3, 10), (3, 0)):
        with pytest.raises(ValueError, match=f"splits={splits}: must lie between 1 and the 3 images"):
            inception_scores(torch.zeros(n, 5), classes, splits)
    with pytest.raises(ValueError, match="not finite"):
        inception_scores(torch.full((10, 5), float("nan")), classes)


def test_the_difference_of_two_inception_scores_is_paired():
    generator = torch.Generator().manual_seed(1)
    x, classes = torch.randn(400, 12, generator=generator), torch.randn(40, 12, generator=generator)
    near = (x + 0.05 * torch.randn(400, 12, generator=generator)).numpy()
    alone, pair = inception_numbers(x.numpy(), None, classes), inception_numbers(near, x.numpy(), classes)
    assert pair["is_to_baseline-inception"][0] == pytest.approx(
        pair["is-inception"][0] - alone["is-inception"][0], abs=1e-12
    )
    assert 0 < pair["is_to_baseline-inception"][1] < alone["is-inception"][1] / 3
    assert str(alone["is_to_baseline-inception"]) == "(nan,)"
    assert {str(value) for value in inception_numbers(near[:9], None, classes).values()} == {"(nan,)"}


# in an evaluation


def given(files, **more):
    weights = {"aesthetic": files / "aesthetic.pth", "aesthetic_clip": files / "clip", "pickscore": files / "clip",
               "hpsv2": files, "hpsv21": files, "imagereward": files, "clip_tokenizer": TOKENIZER,
               "bert_tokenizer": files}  # fmt: skip
    checksums = {"aesthetic": pretrained.digest(files / "aesthetic.pth")}
    base = {"model": {"name": "mini", "path": "mini"}, "sampler": {"name": "euler"}, "features": [], "distances": [],
            "text_alignment": "none", "prompts": TEXTS, "weights": {k: str(v) for k, v in weights.items()},
            "checksums": checksums}  # fmt: skip
    return typed(EvaluateConfig, base | more)


def test_every_score_is_a_metric_of_an_evaluation(files, scorers):
    spec = evaluation_spec(given(files, scores=list(SCORERS)))
    metrics = image_metrics(spec)
    assert [metric.name for metric in metrics] == [*SCORERS, "look"] and list(SCORERS) == list(SCORES)
    assert {*SCORERS, *BESIDE.values()} <= set(WEIGHTS)
    images = pictures(32, 32)
    for metric in metrics[:-1]:
        samples = type("Samples", (), {"images": images, "prompts": TEXTS})
        assert torch.equal(metric.measure(samples), scorers[metric.name].of(images, TEXTS))
        assert metric.producer == scorers[metric.name].weights
        assert METRICS[metric.name].to_baseline in METRICS


def test_scores_of_prompts_need_them_and_none_is_named_twice(files):
    blank = evaluation_spec(given(files, scores=["aesthetic"], prompts=[""]))
    assert image_metrics(blank)[0].name == "aesthetic"
    with pytest.raises(ConfigError, match="scores: imagereward compares images with prompts, and there are none"):
        image_metrics(evaluation_spec(given(files, scores=["imagereward"], prompts=[""])))
    with pytest.raises(ConfigError, match="scores: .* names one twice"):
        evaluation_spec(given(files, scores=["hpsv2", "hpsv2"]))
    with pytest.raises(ConfigError, match="did you mean hpsv2"):
        given(files, scores=["hps2"])


def test_scores_change_the_identity_of_runs_that_have_them_alone(files):
    model = files / "clip"  # any weights
    specs = [with_folders(evaluation_spec(given(files, **more)), model) for more in ({}, {"scores": ["hpsv2"]})]
    plain, scored = (run_identity(spec, "real") for spec in specs)
    assert "scores" not in plain and scored == plain | {"scores": ("hpsv2",)}
    assert specs[0].folders == specs[1].folders  # no image is sampled again


def test_errors_of_scores_are_those_of_a_mean(files):
    values = torch.tensor([1.0, 2.0, 4.0]).numpy()
    assert mean_and_error(values) == pytest.approx((7 / 3, (7 / 3) ** 0.5 / 3**0.5))
    assert str(mean_and_error(values[:1])) == "(1.0, nan)"
