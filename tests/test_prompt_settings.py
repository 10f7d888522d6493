"""Settings of prompts in runs: negatives and sizes of each prompt, clip_skip, what SDXL is told, weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import composed, one_figure
from omegaconf import OmegaConf
from PIL import Image

from segresearch import records
from segresearch.config import EvaluateConfig, GenerateConfig, settings, typed
from segresearch.config.expand import panels
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.spec import evaluation_spec
from segresearch.generate import expand, generate
from segresearch.guidance import GuidedDenoiser, cfg
from segresearch.guidance.methods.cdg import CDG
from segresearch.guidance.methods.icg_text import ICGText
from segresearch.guidance.methods.prompt import Prompt
from segresearch.models.text_settings import TextSettings
from segresearch.reproduce import reproduce
from segresearch.sample_images import encode_conds

CFG = {"terms": {"cfg": {"kind": "cfg", "weight": 3}}}


@pytest.fixture
def config(folder, tmp_path):
    def made(kind=GenerateConfig, **changes):
        given = {
            "model": {"name": "tiny", "path": str(folder)}, "sampler": {"name": "euler"}, "steps": 2,
            "schedule": {"name": "leading"}, "guidance": CFG, "seeds": "0-1", "prompts": ["red", "blue"],
            "device": "cpu", "out": str(tmp_path / "runs"), "batch_size": 3,
        } | changes  # fmt: skip
        return typed(kind, {key: value for key, value in given.items() if value is not None})

    return made


def images(run) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted((run.folder / "images").rglob("*.png"))}


def test_each_prompt_has_its_negative(config, model, tmp_path):
    each = generate(config(negative=["green", ""]), model)
    (tmp_path / "negatives.txt").write_text("green\ncone\n")
    green, nothing = (images(generate(config(negative=n), model)) for n in ("green", ""))
    found = images(each)
    for name, image in found.items():
        expected = green if name.startswith("prompt0") else nothing
        assert np.abs(image - expected[name]).max() <= 1
    path = next((each.folder / "images").rglob("prompt1-seed1.png"))
    assert records.read_record(path)["negative"] == "" and reproduce(path, trust=True).largest <= 1
    other = expand(config(negative=str(tmp_path / "negatives.txt")))
    assert [row.negative for row in other.panels[0].panel.rows] == ["green", "green", "cone", "cone"]
    assert other.config.negative == ("green", "cone") and other.folder != each.folder
    given = settings(OmegaConf.create((each.folder / "config.yaml").read_text()))
    assert expand(typed(GenerateConfig, {**vars(given), "out": str(tmp_path / "runs")})).folder == each.folder
    zipped = panels(config(negative=["a", "b"], pairing="zip", seeds="0-2"))[0]
    assert [(row.prompt, row.negative) for row in zipped.rows] == [("red", "a"), ("blue", "b"), ("red", "a")]


def test_each_prompt_has_its_size(config, model):
    run = generate(config(sizes=[[16, 16], [16, 24]]), model)
    found = images(run)
    assert found["prompt0-seed0.png"].shape == (16, 16, 3) and found["prompt1-seed1.png"].shape == (16, 24, 3)
    wide = images(generate(config(size=[16, 24], prompts=["blue"]), model))
    assert np.abs(found["prompt1-seed1.png"] - wide["seed1.png"]).max() <= 1
    path = next((run.folder / "images").rglob("prompt1-seed0.png"))
    assert records.read_record(path)["size"] == [16, 24] and reproduce(path, trust=True).largest <= 1
    with pytest.raises(InputError, match=r"size=\(15, 16\)"):
        generate(config(sizes=[[16, 16], [15, 16]]), model)
    with pytest.raises(ConfigError, match="sizes: 1 for 2 prompts"):
        expand(config(sizes=[[16, 16]]))


def test_what_the_model_is_told(config, model, folder):
    text = {"clip_skip": 1, "original_size": [8, 10], "crop": [2, 4], "target_size": [32, 30]}
    run = generate(config(text=text, prompts=["red"], negative="blue"), model)
    plain = generate(config(prompts=["red"], negative="blue"), model)
    assert run.folder != plain.folder and "text" not in json.dumps(plain.folder.name)
    path = next((run.folder / "images").rglob("seed1.png"))
    assert records.read_record(path)["text"] == {"clip_skip": 1, "original_size": [8, 10], "crop": [2, 4],
                                                 "target_size": [32, 30]}  # fmt: skip
    assert reproduce(path, trust=True).largest == 0
    assert "text" not in records.read_record(next((plain.folder / "images").rglob("seed1.png")))
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "red", negative_prompt="blue", clip_skip=1, original_size=(8, 10), crops_coords_top_left=(2, 4),
        target_size=(32, 30), num_inference_steps=2, guidance_scale=3.0, height=16, width=16, output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert np.abs(images(run)["seed1.png"] - np.rint(expected * 255)).max() <= 1


def test_weighted_prompts_in_a_run(config, model, recwarn):
    texts = ["a (red:1.6) cube", "a BREAK b"]
    given = {"prompts": texts, "text": {"syntax": "weighted"}}
    run = generate(config(**given), model)
    assert not [w for w in recwarn if "prompts hold" in str(w.message)]
    single = generate(config(**given, batch_size=1, out=str(run.folder.parent / "b")), model)
    assert all(np.abs(a - images(single)[name]).max() <= 1 for name, a in images(run).items())
    plain = images(generate(config(prompts=texts), model))
    lines = {str(w.message) for w in recwarn if "prompts hold" in str(w.message)}
    assert lines and all("text.syntax=weighted" in line for line in lines)
    assert all(np.abs(image - plain[name]).max() > 1 for name, image in images(run).items())
    with pytest.raises(InputError, match="model.loras"):
        generate(config(prompts=["<lora:x:1>"], text={"syntax": "weighted"}), model)


def test_evaluate_takes_negatives_for_each_prompt(config, model, monkeypatch):
    monkeypatch.setattr("segresearch.evaluation.plots.draw", one_figure)
    given = {
        "seeds": None, "images": 3, "shard": 3, "batch_size": 2, "features": [], "text_alignment": "none",
        "reference": "scene:0-9", "n_examples": 3, "wandb": {"mode": "off"}, "text": {"clip_skip": 1},
    }  # fmt: skip
    each = evaluate(config(EvaluateConfig, negative=["green", ""], **given), model)
    spec = evaluation_spec(config(EvaluateConfig, negative=["green", ""], **given))
    assert spec.negative(range(3)) == ["green", "", "green"]
    green = evaluate(config(EvaluateConfig, negative="green", **given), model)
    assert green.sampled == 3 and green.folder != each.folder
    with pytest.raises(ConfigError, match="negative: 3 for 2 prompts"):
        evaluation_spec(config(EvaluateConfig, negative=["a", "b", "c"], **given))


def test_methods_of_texts_are_told_the_same(model):
    """Conditionings that a method makes of texts are read and sized as the prompts are."""
    guided = GuidedDenoiser(
        model.denoiser, {"cfg": cfg(3.0)}, conditionings={"other": Prompt("a (b:2)"), "random": ICGText()}
    )
    told = TextSettings("weighted", original_size=(8, 8), crop=(1, 2))
    conds = encode_conds(model, guided, ["red BREAK blue", "green"], "cone", (16, 16), told)
    assert {c.context.shape[1] for c in conds.values()} == {2 * model.text.length}
    assert all(c.time_ids[0].tolist() == [8, 8, 1, 2, 16, 16] for c in conds.values())
    alone = model.encode(["a (b:2)"], settings=TextSettings(syntax="weighted"))["cond"].context
    torch.testing.assert_close(conds["other"].context[0], alone[0].repeat(2, 1))
    guided = GuidedDenoiser(model.denoiser, {"cfg": cfg(3.0)}, conditionings={"degraded": CDG()})
    with pytest.raises(InputError, match="text.syntax=weighted is not supported"):
        encode_conds(model, guided, ["red"], settings=told)
    conds = encode_conds(model, guided, ["red"], None, (16, 16), dataclasses.replace(told, syntax="plain"))
    assert conds["degraded"].time_ids.tolist() == [[8, 8, 1, 2, 16, 16]]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"negative": ["a", "b", "c"]}, "negative: 3 for 2 prompts; give one text, or one for each prompt"),
        ({"negative": "absent.txt"}, "negative: cannot read absent.txt"),
        ({"text": {"syntax": "compel"}}, "text.syntax: 'compel' is not one of plain, weighted"),
        ({"text": {"clip_skip": -1}}, "text.clip_skip: -1 is out of range"),
        ({"text": {"crop": [1]}}, "text.crop"),
        ({"text": {"original_size": [0, 4]}}, "text.original_size"),
        ({"sizes": [16, 16]}, "sizes"),
    ],
)
def test_errors_are_one_line(config, changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        expand(config(**changes))
    assert "\n" not in str(error.value)


def test_the_command_line():
    run = composed("text.clip_skip=2", "text.crop=[8,0]", "sizes=[[64,64]]", 'negative=["blurred"]', "prompts=[a]")
    assert run.text.given() == {"clip_skip": 2, "crop": (8, 0)} and run.sizes == ((64, 64),)
    assert run.negative == ("blurred",) and composed().text.given() == {}
