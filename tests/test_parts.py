"""Parts of a model from other files: what loads, in which layouts, what is refused, and the identity of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_models import make_pipeline, original_layout
from safetensors.torch import load_file, save_file

from segresearch.checkpoints.key_maps import CLIP, OPEN_CLIP, UNET, VAE
from segresearch.checkpoints.load import load_network
from segresearch.config.schema import ModelConfig
from segresearch.errors import CheckpointError
from segresearch.models import load_model
from segresearch.records import part_fingerprints

STEM = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two random models: the folder of the first; pipeline, folder and original layout of the second."""
    root = tmp_path_factory.mktemp("models")
    first, second = (make_pipeline(root / name, seed) for seed, name in enumerate(("one", "two")))
    first.save_pretrained(root / "one")
    second.save_pretrained(root / "two")
    save_file(original_layout(second), root / "two.safetensors")
    return root / "one", second, root / "two", original_layout(second)


def refused(match, *arguments, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(*arguments, **options)
    assert "\n" not in str(caught.value)


def renamed(weights, start, prefix):
    return {prefix + key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}


def saved(weights, path, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone().contiguous() for key, value in weights.items()}, path, metadata or None)
    return path


def assert_same(net, module, same=True):
    ours, theirs = net.state_dict(), module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) == same


def places(made, tmp_path, kind, start, module):
    """The second model's network of a kind, wherever it may lie."""
    _, _, folder, original = made
    yield folder / kind
    yield folder
    yield folder / kind / STEM
    yield folder.with_suffix(".safetensors")
    for i, prefix in enumerate((start, "", "unet.")):
        yield saved(renamed(original, start, prefix), tmp_path / f"original{i}.safetensors")
        plain = {prefix + key: value for key, value in module.state_dict().items()}
        yield saved(plain, tmp_path / f"plain{i}.safetensors")


def test_a_vae(made, tmp_path):
    one, pipeline, _, _ = made
    for path in places(made, tmp_path, "vae", VAE, pipeline.vae):
        sd = load_model(one, vae=path)
        assert_same(sd.vae, pipeline.vae)
        assert_same(sd.unet, pipeline.unet, same=False)
    assert_same(load_model(one).vae, pipeline.vae, same=False)


def test_a_unet(made, tmp_path):
    one, pipeline, _, _ = made
    config = load_model(one).unet.config
    for path in places(made, tmp_path, "unet", UNET, pipeline.unet):
        sd = load_model(one, unet=path)
        assert_same(sd.unet, pipeline.unet)
        assert_same(sd.vae, pipeline.vae, same=False)
        assert sd.unet.config == config


def test_text_encoders(made, tmp_path):
    one, pipeline, two, original = made
    first, second = pipeline.text_encoder, pipeline.text_encoder_2
    clip, open_clip = renamed(original, CLIP, ""), renamed(original, OPEN_CLIP, "")
    narrow = saved(clip | {"text_projection.weight": torch.zeros(64, 64)}, tmp_path / "l.safetensors")
    wide = saved(open_clip, tmp_path / "g.safetensors")
    hugging = saved(second.state_dict() | {"logit_scale": torch.ones(1)}, tmp_path / "hf.safetensors")
    for path, replaced in (
        (two, (True, True)), (two.with_suffix(".safetensors"), (True, True)), ([narrow, wide], (True, True)),
        ([wide, narrow], (True, True)), (narrow, (True, False)), (wide, (False, True)), (hugging, (False, True)),
        (two / "text_encoder", (True, False)), (two / "text_encoder_2" / "model.safetensors", (False, True)),
    ):  # fmt: skip
        sd = load_model(one, text_encoder=path)
        for encoder, theirs, same in zip(sd.text.encoders, (first, second), replaced, strict=True):
            assert_same(encoder, theirs, same)
        assert sd.text.encoders[1].config.hidden_act == "gelu"


def test_a_file_without_a_part_takes_a_given_one(made, tmp_path):
    one, pipeline, two, original = made
    bare = saved({k: v for k, v in original.items() if not k.startswith(VAE)}, tmp_path / "bare.safetensors")
    refused("the VAE is missing .* give one by vae=", bare, tokenizer=two)
    assert_same(load_model(bare, tokenizer=two, vae=two).vae, pipeline.vae)
    alone = saved(renamed(original, UNET, UNET), tmp_path / "alone.safetensors")
    refused("a UNet alone.*unet=", alone, tokenizer=two)
    sd = load_model(alone, tokenizer=two, vae=two, text_encoder=two)
    assert_same(sd.unet, pipeline.unet)
    assert_same(sd.text.encoders[1], pipeline.text_encoder_2)
    rest = saved({k: v for k, v in original.items() if not k.startswith(UNET)}, tmp_path / "rest.safetensors")
    assert_same(load_model(rest, tokenizer=two, unet=two).unet, pipeline.unet)


def test_a_folder_without_a_vae_takes_a_given_one(made, tmp_path):
    one, pipeline, two, _ = made
    folder = Path(shutil.copytree(one, tmp_path / "folder"))
    shutil.rmtree(folder / "vae")
    refused("vae/ is missing", folder)
    assert_same(load_model(folder, vae=two / "vae").vae, pipeline.vae)


def test_what_a_unet_declares_comes_with_it(made, tmp_path):
    one, _, _, original = made
    weights = renamed(original, UNET, UNET)
    v = saved(weights | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    with pytest.warns(UserWarning, match="v_prediction.*epsilon"):
        assert load_model(one, unet=v).denoiser.prediction == "v_prediction"
    assert load_model(one, unet=saved(weights, tmp_path / "x.safetensors")).denoiser.prediction == "epsilon"


def test_parts_that_do_not_fit(made, tmp_path):
    one, pipeline, two, original = made
    refused("vae='nowhere': no such file", one, vae="nowhere")
    refused("no vae in this folder", one, vae=tmp_path)
    refused("a UNet alone, not a VAE", one, vae=saved(renamed(original, UNET, ""), tmp_path / "u.safetensors"))
    refused("a VAE alone, not a UNet", one, unet=saved(renamed(original, VAE, ""), tmp_path / "v.safetensors"))
    refused("is a UNet2DConditionModel, not a VAE", one, vae=two / "unet")
    refused("several UNets", one, unet=saved(
        renamed(original, UNET, "a.") | renamed(original, UNET, "b."), tmp_path / "two.safetensors"))  # fmt: skip
    odd = {k: v for k, v in renamed(original, VAE, "").items() if k != "decoder.conv_in.bias"}
    refused(r"1 missing key \(decoder.conv_in.bias\)", one, vae=saved(odd, tmp_path / "odd.safetensors"))
    config = json.loads((two / "vae" / "config.json").read_text())
    folder = Path(shutil.copytree(two / "vae", tmp_path / "vae"))
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    refused("its scaling_factor is 0.18215, that of the model's VAE 0.13025: a VAE of another family", one, vae=folder)
    wide = renamed(original, OPEN_CLIP, "")
    wide |= {key: value.repeat(1, 2) for key, value in wide.items() if "embedding" in key}
    refused("a text encoder 256 wide; the widths of .* are 64 and 128", one,
            text_encoder=saved(wide, tmp_path / "w.safetensors"))  # fmt: skip


def test_mixed_variants_of_a_folder(made, tmp_path):
    one, pipeline, *_ = made
    folder = Path(shutil.copytree(one, tmp_path / "folder"))
    (folder / "unet" / STEM).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    load_model(folder)
    with pytest.warns(UserWarning, match="no variant 'fp16' of vae, text_encoder, .*plain weights") as caught:
        load_model(folder, variant="fp16")
    assert len(caught) == 1
    refused("no network has the variant 'ema'; there are fp16", folder, variant="ema")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")  # fmt: skip
    refused("but variants: give variant= one of non_ema", folder)


def test_a_shared_prefix_is_read_once(made, tmp_path):
    """A given part of a checkpoint with leftovers needs no warning: only its own keys are read."""
    one, pipeline, _, original = made
    more = {"model_ema.decay": torch.zeros(1), "other.key": torch.zeros(1)}
    file = saved(original | more, tmp_path / "x.safetensors")
    assert_same(load_model(one, vae=file).vae, pipeline.vae)
    assert load_file(file)["other.key"] == 0


def test_parts_are_in_the_identity_of_a_run(made):
    one, _, two, _ = made
    assert part_fingerprints(ModelConfig(name="x", path=str(one))) == {}
    of_vae, of_model = (
        part_fingerprints(ModelConfig(name="x", path=str(one), vae=str(path))) for path in (two / "vae", two)
    )
    assert of_vae == of_model and len(of_vae["vae"]) == 1
    assert part_fingerprints(ModelConfig(name="x", path=str(one), vae=str(one))) != of_vae
    texts = part_fingerprints(ModelConfig(name="x", path=str(one), text_encoder=(str(two),)))
    assert len(texts["text_encoder"]) == 2


def test_a_further_network_comes_from_a_folder_a_file_or_a_whole_model(made, tmp_path):
    """A whole model brings its own noise and prediction; a UNet alone has those of the model beside it."""
    one, pipeline, folder, original = made
    sd = load_model(one, prediction="v_prediction")
    for path in places(made, tmp_path, "unet", UNET, pipeline.unet):
        other = load_network(str(path), str(one), torch.float32, sd.device, sd.denoiser)
        assert_same(other.unet, pipeline.unet)
        assert other.unet.config == sd.unet.config and torch.equal(other.alphas, sd.denoiser.alphas)
        whole = path in (folder, folder.with_suffix(".safetensors"))
        assert other.prediction == ("epsilon" if whole else "v_prediction")
    wide = {**original, f"{UNET}out.2.weight": torch.zeros(8, 32, 3, 3), f"{UNET}out.2.bias": torch.zeros(8)}
    path = saved(renamed(wide, UNET, ""), tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="latents 8 wide; those of the model: .*latents 4 wide"):
        load_network(str(path), str(one), torch.float32, sd.device, sd.denoiser)
