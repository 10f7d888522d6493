"""LoRAs and embeddings as settings: of a run, of its identity and record, of a further network."""

import dataclasses
import shutil

import pytest
import torch
from helpers import composed
from safetensors.torch import save_file

from segresearch import records
from segresearch.checkpoints.additions import Embedding, Lora, as_embeddings, as_loras
from segresearch.config import GenerateConfig, typed
from segresearch.config.build import build_guidance, configured_model, resolved
from segresearch.errors import ConfigError, InputError
from segresearch.generate import expand, generate
from segresearch.reproduce import reproduce
from segresearch.runs import fingerprint


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A LoRA of the tiny model's UNet and first text encoder."""
    draw = torch.Generator().manual_seed(0)
    keys = {}
    for layer, width in (("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v", 128),
                         ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 0)):  # fmt: skip
        inner, outer = (width, width) if width else (64, 96)
        keys[f"{layer}.lora_down.weight"] = torch.randn(4, inner, generator=draw)
        keys[f"{layer}.lora_up.weight"] = torch.randn(outer, 4, generator=draw)
    path = tmp_path_factory.mktemp("lora") / "detail.safetensors"
    save_file(keys, path)
    return path


@pytest.fixture
def embedding(tmp_path):
    path = tmp_path / "toy.safetensors"
    save_file({"clip_l": torch.randn(2, 64), "clip_g": torch.randn(2, 128)}, path)
    return path


def config(folder, out, guidance=None, **model):
    given = {
        "model": {"name": "tiny", "path": str(folder), **model}, "sampler": {"name": "euler"},
        "schedule": {"name": "leading"}, "prompts": ["red"], "seeds": "0", "steps": 2, "device": "cpu",
        "guidance": guidance or {}, "out": str(out), "batch_size": 1,
    }  # fmt: skip
    return typed(GenerateConfig, given)


def test_forms():
    assert Lora.parse("a.safetensors") == Lora("a.safetensors")
    assert Lora.parse("/b/a.safetensors:0.8") == Lora("/b/a.safetensors", 0.8)
    assert Lora.parse("C:\\a.safetensors:-1e-1:2") == Lora("C:\\a.safetensors", -0.1, 2.0)
    assert Lora.parse("owner/name:.5") == Lora("owner/name", 0.5)
    assert Lora("a", 0.5).scales == (0.5, 0.5) and Lora("a", 0.5, 0.0).scales == (0.5, 0.0)
    assert as_loras(["a:2", ("b", 1), ("c", 1, 0), Lora("d")]) == (Lora("a", 2), Lora("b"), Lora("c", 1, 0), Lora("d"))
    assert as_loras(None) == () and as_loras("a") == (Lora("a"),)
    assert Embedding.parse("C:\\a.safetensors") == Embedding("C:\\a.safetensors")
    assert Embedding.parse("a.safetensors:<toy>") == Embedding("a.safetensors", "<toy>")
    assert as_embeddings({"<toy>": ["a", "b"]}) == (Embedding("a", "<toy>"), Embedding("b", "<toy>"))
    assert as_embeddings(["a.safetensors:x"]) == (Embedding("a.safetensors", "x"),)
    with pytest.raises(InputError, match="one word without spaces"):
        Embedding("a", "two words")


def test_on_the_command_line():
    asked = composed("model.loras=[a.safetensors:0.8,b.safetensors:-1:0]", "model.embeddings=[c.safetensors:toy]")
    assert asked.model.loras == (Lora("a.safetensors", 0.8), Lora("b.safetensors", -1.0, 0.0))
    assert asked.model.embeddings == (Embedding("c.safetensors", "toy"),)
    mapping = composed("model=sdxl", "model.loras=[{path: a.safetensors, text_scale: 0}]")
    assert mapping.model.loras == (Lora("a.safetensors", 1.0, 0.0),)
    for wrong, message in (("[{path: a, scal: 1}]", r"model.loras.0.scal: no such setting; did you mean scale"),
                           ("[{path: a, scale: x}]", r"model.loras.0.scale: 'x' is not a number"),
                           ("[{path: a, scale: inf}]", r"model.loras.0: the scale of LoRA a is inf"),
                           ("a.safetensors", r"model.loras: 'a.safetensors' is not a list")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            composed(f"model.loras={wrong}")


def test_a_run_with_loras_is_another_run(folder, file, embedding, tmp_path):
    place = lambda **model: expand(resolved(config(folder, tmp_path, **model))).folder.name  # noqa: E731
    base, copy = place(), shutil.copy(file, tmp_path / "renamed.safetensors")
    assert place(loras=[], embeddings=[]) == base
    one = place(loras=[str(file)])
    assert one == place(loras=[{"path": str(copy), "scale": 1, "text_scale": 1.0}])
    several = [one, place(loras=[f"{file}:0.5"]), place(loras=[f"{file}:1:0"]), place(embeddings=[f"{embedding}:a"]),
               place(embeddings=[f"{embedding}:b"]), place(loras=[f"{file}:0.5", f"{file}:0.5"])]  # fmt: skip
    assert len({base, *several}) == 7


def test_the_identity_without_loras_has_no_key_of_them(folder, tmp_path):
    asked = resolved(config(folder, tmp_path, {"networks": {"weak": {"path": "unet"}}}))
    run = expand(asked)
    assert "loras" not in str(run.identity) and "embeddings" not in str(run.identity)
    assert run.identity["panels"][0]["methods"]["vanilla"]["networks"]["weak"].keys() == {"path", "fingerprint"}


def test_an_image_with_a_lora_is_made_again(folder, model, file, embedding, tmp_path):
    copy = shutil.copy(file, tmp_path / "detail.safetensors")
    asked = config(folder, tmp_path / "runs", loras=[f"{copy}:0.5"], embeddings=[f"{embedding}:<toy>"])
    run = generate(dataclasses.replace(asked, prompts=("a <toy>",)))
    (path,) = (run.folder / "images").rglob("*.png")
    (said,) = records.read_record(path)["model"]["loras"]
    assert said == {"path": str(copy), "scale": 0.5, "text_scale": None, "fingerprint": fingerprint(copy)}
    again = reproduce(path, device="cpu", trust=True)
    assert again.largest <= 1 and not again.notes
    grid = reproduce(run.grid, device="cpu", trust=True)
    assert grid.largest <= 8
    save_file({"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(128, 128)}, copy)
    with pytest.raises(ConfigError, match=r"model.loras.0: .*has the content \w+, not \w+; leave `fingerprint` out"):
        reproduce(path, device="cpu", trust=True)
    copy.unlink()
    for image in (path, run.grid):
        with pytest.raises(ConfigError, match=r"model.loras.0: .*detail.safetensors: no such file"):
            reproduce(image, device="cpu", trust=True)


def test_a_configured_model_has_them(folder, model, file):
    merged = configured_model(config(folder, "x", loras=[f"{file}:2"]).model, "cpu")
    difference = merged.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight - (
        model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight
    )
    assert difference.abs().max() > 0.1


AUTO = {"ag": {"kind": "perturbed", "scale": 1.5, "perturbation": {"kind": "weak", "network": "weak"}}}


def test_autoguidance_by_a_lora(folder, model, file, tmp_path):
    """D + s·(D − D of base + LoRA), of a network that shares the other weights."""
    loras = [{"path": str(file), "scale": -0.5, "text_scale": 0}]
    asked = config(folder, tmp_path, {"terms": AUTO, "networks": {"weak": {"path": None, "loras": loras}}})
    guided = build_guidance(asked.guidance, model)
    weak = configured_model(config(folder, "x", loras=[f"{file}:-0.5:0"]).model, "cpu").denoiser
    x, sigma, cond = torch.randn(1, 4, 8, 12), torch.tensor([2.0]), model.encode(["red"], size=(16, 24))["cond"]
    with torch.no_grad():
        strong, other = model.denoiser(x, sigma, cond=cond), weak(x, sigma, cond=cond)
        got = guided(x, sigma, conds={"cond": cond})
    assert (strong - other).abs().max() > 1e-2
    torch.testing.assert_close(got, strong + 1.5 * (strong - other), rtol=1e-4, atol=1e-4)


def test_the_identity_of_a_network_with_loras(folder, file, tmp_path):
    def place(**network):
        asked = config(folder, tmp_path, {"terms": AUTO, "networks": {"weak": network}})
        return expand(resolved(asked)).folder.name

    plain, half = place(path=None), place(path=None, loras=[f"{file}:0.5:0"])
    assert len({plain, half, place(path=None, loras=[f"{file}:1:0"]), place(path="unet", loras=[f"{file}:0.5:0"])}) == 4
    wrong = [{"path": str(file), "fingerprint": "0" * 12}]
    with pytest.raises(ConfigError, match=r"guidance.networks.weak.loras.0: .*has the content \w+, not 000000000000"):
        place(path=None, loras=wrong)
