"""The training scripts of the embedded model: tokenizer, schedules, keyed batches, interrupted training, losses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments.mini import train_controlnet
from experiments.mini.common import TIMED, Average, Plan, batch_indices, generator, learning_rate, replace_file, train
from experiments.mini.render import SHARD, control_maps, open_images, shard_path, take
from experiments.mini.tokenizer import END, LENGTH, learn_merges, load_tokenizer, second, tokenize, write_tokenizer
from experiments.mini.train import Part, run
from experiments.mini.train_clip import BEGIN_ID, END_ID, TwoCLIPs, trim
from experiments.mini.train_controlnet import CONFIG as CONTROLNET_CONFIG
from experiments.mini.train_controlnet import Trained, initial, maps
from experiments.mini.train_unet import CONFIG, alphas_cumprod, attention, conditioning, diffusion_loss
from experiments.mini.train_vae import CONFIG as VAE_CONFIG
from experiments.mini.train_vae import reconstruction_loss
from segresearch.control_images.prepare import canny
from segresearch.models import load_model
from segresearch.models.attention import Site, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.unet import UNet, UNetConfig
from segresearch.models.vae import VAE, VAEConfig
from segresearch.scenes.captions import VOCABULARY
from segresearch.scenes.scenes import captions, depth_image, edge_image, scenes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(folder / "one", END)
    write_tokenizer(folder / "two", "!")
    return load_tokenizer(folder / "one"), load_tokenizer(folder / "two")


def test_every_scene_word_is_one_token_and_other_text_survives(tokenizers):
    one, _ = tokenizers
    for word in VOCABULARY:
        assert len(one(word).input_ids) == 3, word  # begin, word, end
    for text in ("a red cube left of two blue spheres", "zebra über 猫"):
        assert one.decode(one(text).input_ids, skip_special_tokens=True).strip() == text
    assert (one.bos_token_id, one.eos_token_id, one.model_max_length) == (BEGIN_ID, END_ID, LENGTH)


def test_the_second_tokenizer_differs_only_in_its_padding(tokenizers):
    one, two = tokenizers
    texts = [*captions(range(16)), "", "café", "cube " * 60]
    ids = tokenize(one, texts)
    assert ids.shape == (19, LENGTH)
    assert torch.equal(second(ids, one.eos_token_id), tokenize(two, texts))
    assert two.pad_token_id == 0 and one.pad_token_id == one.eos_token_id


def test_merges_join_each_word_and_nothing_else():
    merges = learn_merges(["red", "green"])
    assert ("r", "e") == merges[0]  # the pair that both words hold
    assert {"".join(pair) for pair in merges} >= {"red</w>", "green</w>"}
    assert learn_merges(["a"]) == []


def test_learning_rate_warms_up_holds_and_decays_to_zero():
    rates = [learning_rate(s, 100, 2.0, warmup=10, hold=0.5) for s in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[30] == rates[50] == 2.0
    assert rates[75] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(100, 100, 2.0, warmup=10, floor=0.1) == pytest.approx(0.2)


def test_batches_are_keyed_and_an_epoch_meets_every_scene_once():
    first = torch.cat([batch_indices(12, 4, step, seed=0) for step in range(3)])
    assert sorted(first.tolist()) == list(range(12))
    assert torch.equal(batch_indices(12, 4, 1, 0), first[4:8])
    assert not torch.equal(torch.cat([batch_indices(12, 4, step, 0) for step in range(3, 6)]), first)
    state = torch.random.get_rng_state()
    a, b = (torch.randn(3, generator=generator(0, 1, n)) for n in (2, 2))
    assert torch.equal(a, b) and torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(a, torch.randn(3, generator=generator(0, 1, 3)))


def _train(folder, stop=None):
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8.0).view(2, 4) / 8)
        model.bias.zero_()

    def loss_of(step):
        x = torch.randn(8, 4, generator=generator(0, step))
        return (model(x) - x[:, :2]).square().mean(), {"x": x.mean().item()}

    plan = Plan(steps=3, peak=0.1, warmup=1, save_every=1, log_every=1, stop=stop)
    return train(folder, model, loss_of, plan, {"kind": "test"})


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path):
    whole = _train(tmp_path / "whole")
    part = _train(tmp_path / "parts", stop=2)
    resumed = _train(tmp_path / "parts")
    for key, value in whole.items():
        assert torch.equal(value, resumed[key])
        assert not torch.equal(value, part[key])
    again = _train(tmp_path / "parts")  # finished: nothing more to do
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    reference = [json.loads(line) for line in (tmp_path / "whole" / "loss.jsonl").read_text().splitlines()]
    losses = [[line["loss"] for line in log if "loss" in line] for log in (lines, reference)]
    assert losses[0] == losses[1]
    assert not [p for p in (tmp_path / "parts").iterdir() if p.name.startswith(".")]


def test_average_follows_the_weights_quickly_at_first():
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    before = average.weights["weight"].item()
    average.update(model, step=0)
    assert average.weights["weight"].item() == pytest.approx(before + 0.9 * (1 - before))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"


def test_images_are_read_from_shards(tmp_path):
    image = np.zeros((SHARD, 3, 2, 2), np.uint8)
    image[5] = 255
    np.save(shard_path(tmp_path, 0), image)
    got = take(open_images(tmp_path, 10), torch.tensor([5, 0]))
    assert got[0].eq(1).all() and got[1].eq(-1).all()
    with pytest.raises(ValueError, match="00001.npy"):
        open_images(tmp_path, SHARD + 1)


def test_betas_are_sdxls():
    alphas = alphas_cumprod()
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert sigmas[961].item() == pytest.approx(11.67604627, rel=1e-6)
    assert sigmas[1].item() == pytest.approx(0.04131441, rel=1e-6)


def test_the_configs_are_shaped_as_the_embedded_model():
    config, vae = UNetConfig.from_dict(CONFIG), VAEConfig.from_dict(VAE_CONFIG)
    assert config.pooled_dim == 96 and config.heads == (2, 4) and vae.factor == 4
    latents = VAE(vae).encode(torch.zeros(1, 3, 64, 32))
    assert latents.shape == (1, 4, 16, 8)


def test_training_attention_is_plain_attention():
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator(n), dtype=torch.float64) for n in range(3))
    site = Site("any", (5, 1))
    torch.testing.assert_close(attention(q, k, v, site), sdpa(q, k, v, site))


def test_dropped_rows_get_zeros_and_padding_does_not_reach_the_pooled_text(tokenizers):
    clips = TwoCLIPs().eval()
    ids = tokenize(tokenizers[0], ["a red cube", "a blue star", ""])
    cond = conditioning(clips, ids, torch.tensor([False, True, False]))
    assert cond.context.shape == (3, LENGTH, 160) and cond.pooled.shape == (3, 96)
    assert (
        cond.context[1].eq(0).all()
        and cond.pooled[1].eq(0).all()
        and cond.time_ids[1].tolist() == [64, 64, 0, 0, 64, 64]
    )
    assert cond.context[2].abs().sum() > 0
    with torch.no_grad():
        short = clips.text_encoder_2(second(trim(ids), END_ID)).text_embeds
    torch.testing.assert_close(short[0], cond.pooled[0])


def test_a_perfect_prediction_has_no_loss_and_low_noise_weighs_less():
    class Says(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, x, t, cond, attend):
            return self.answer.expand_as(x)

    noise = torch.ones(2, 4, 2, 2)
    cond = Cond(torch.zeros(2, 1, 1), torch.zeros(2, 1), torch.zeros(2, 6))
    alphas = alphas_cumprod()

    def loss(answer, t):
        model = Says(torch.tensor(answer))
        return diffusion_loss(model, torch.zeros_like(noise), cond, torch.tensor([t, t]), noise, alphas, 5.0).item()

    assert loss(1.0, 500) == 0
    assert loss(0.0, 999) == pytest.approx(1.0)
    ratio = ((1 - alphas) / alphas)[10].item()
    assert loss(0.0, 10) == pytest.approx(5 * ratio, rel=1e-5)


def test_a_unet_step_has_a_gradient_everywhere():
    small = {**CONFIG, "block_out_channels": [16, 32], "transformer_layers_per_block": [1, 1], "norm_num_groups": 8}
    unet = UNet(UNetConfig.from_dict(small))
    cond = Cond(torch.randn(2, 5, 160), torch.randn(2, 96), torch.full((2, 6), 64.0))
    noise = torch.randn(2, 4, 8, 6)
    diffusion_loss(unet, torch.randn(2, 4, 8, 6), cond, torch.tensor([3, 700]), noise, alphas_cumprod(), 5.0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_reconstruction_loss_is_zero_only_for_equal_pictures():
    a = torch.rand(1, 3, 8, 8, generator=generator(0))
    assert reconstruction_loss(a, a, 0.5) == 0
    assert reconstruction_loss(a + 0.1, a, 0.5).item() == pytest.approx(0.1, rel=1e-4)  # a shift has no edges


def _train_controlnet(folder, unet, stop=None):
    torch.manual_seed(0)
    model = Trained(initial(unet, SMALL_CONTROLNET), unet)
    cond = Cond(torch.randn(2, 5, 160), torch.randn(2, 96), torch.full((2, 6), 64.0))

    def loss_of(step):
        x = torch.randn(2, 4, 8, 8, generator=generator(1, step))
        image = torch.rand(2, 3, 32, 32, generator=generator(2, step))
        return (model(x, torch.tensor([3.0, 700.0]), cond, image) - x).square().mean(), {}

    plan = Plan(steps=3, peak=0.01, warmup=1, save_every=1, stop=stop)
    return train(folder, model, loss_of, plan, {})


SMALL = {"block_out_channels": [16, 32], "transformer_layers_per_block": [1, 1], "norm_num_groups": 8}
SMALL_CONTROLNET = {**CONTROLNET_CONFIG, **SMALL, "conditioning_embedding_out_channels": [4, 4, 8]}


def test_a_controlnet_starts_silent_trains_alone_and_resumes_to_the_same_weights(tmp_path):
    unet = UNet(UNetConfig.from_dict({**CONFIG, **SMALL}))
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    x, t = torch.randn(1, 4, 8, 8, generator=generator(0)), torch.tensor([3.0])
    cond = Cond(torch.ones(1, 5, 160), torch.ones(1, 96), torch.full((1, 6), 64.0))
    with torch.no_grad():
        silent = Trained(initial(unet, SMALL_CONTROLNET), unet)(x, t, cond, torch.ones(1, 3, 32, 32))
        assert torch.equal(silent, unet(x, t, cond, attend=attention))
    whole = _train_controlnet(tmp_path / "whole", unet)
    _train_controlnet(tmp_path / "parts", unet, stop=2)
    resumed = _train_controlnet(tmp_path / "parts", unet)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert all(k.startswith("net.") for k in whole)
    assert whole["net.controlnet_mid_block.weight"].abs().sum() > 0
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())


def test_control_images_of_scenes(tmp_path):
    batch = scenes([0, 1, 2])
    np.save(shard_path(tmp_path, 0), control_maps(batch))
    shards, index = open_images(tmp_path, 3), torch.tensor([2, 1, 0])
    some = maps("canny", shards, index, torch.tensor([True, False, True]))
    assert some.shape == (3, 3, 64, 64) and set(some.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(some[:1], edge_image(batch.edges[2:]))
    assert torch.equal(some[1], canny(Image.fromarray(batch.images[1].permute(1, 2, 0).numpy()))[0])
    depth = maps("depth", shards, index, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(depth, depth_image(batch.depth).flip(0), atol=0.5 / 255 + 1e-6, rtol=0)


def test_a_training_with_a_time_keeps_to_the_steps_that_it_measured(tmp_path):
    def trained(folder, stop=None):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)

        def loss_of(step):
            x = torch.randn(8, 4, generator=generator(0, step))
            return (model(x) - x[:, :2]).square().mean(), {}

        plan = Plan(steps=0, peak=0.1, warmup=5, save_every=1, stop=stop, seconds=1e-9)  # as few steps as there can be
        return train(folder, model, loss_of, plan, {})

    whole = trained(tmp_path / "whole")
    steps = json.loads((tmp_path / "whole" / "steps.json").read_text())["steps"]
    assert steps == TIMED.stop + 1
    trained(tmp_path / "parts", stop=TIMED.stop - 1)  # before the number is there
    assert not (tmp_path / "parts" / "steps.json").exists()
    (tmp_path / "parts" / "steps.json").write_text(json.dumps({"steps": steps}))
    resumed = trained(tmp_path / "parts")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


SHORT = ("--images", "32", "--steps", "2", "--batch", "8", "--cores", "2")


def short_form(runs, stopped_at=None):
    """The command in its short form; stopped_at: sent SIGTERM as this part starts."""
    command = [sys.executable, "-m", "experiments.mini.train", *SHORT, "--runs", str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if stopped_at is not None and line.split()[-1:] == [stopped_at]:
                process.send_signal(signal.SIGTERM)
    return process.returncode, "".join(lines)


@pytest.mark.slow
def test_the_whole_training_in_its_short_form_stopped_on_the_way(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    code, text = short_form(runs, stopped_at="canny")
    assert code == 1 and "resumes" in text, text
    code, text = short_form(runs)
    assert code == 0 and {"canny", "export"} <= set(text.split()) and not {"vae", "unet"} & set(text.split()), text
    sd = load_model(runs / "exported", controlnet=["canny", "depth"])
    assert sd.encode(["a red cube"])["cond"].context.shape == (1, LENGTH, 160)
    assert max(path.stat().st_size for path in (runs / "exported").rglob("*")) < 17e6
    options = ["canny", "--runs", str(runs), "--out", str(tmp_path / "again"), *SHORT[:-2]]
    monkeypatch.setattr(sys, "argv", ["train_controlnet", *options])
    train_controlnet.main()  # in one go
    nets = [torch.load(folder / "controlnet.pt") for folder in (tmp_path / "again", runs / "controlnet_canny")]
    assert all(torch.equal(nets[0]["weights"][key], value) for key, value in nets[1]["weights"].items())


def written(folder, name, fails=False):
    """A script of a part: its name goes to a file; one that fails does so without `repaired` beside it."""

    def main():
        with (folder / "order").open("a") as file:
            file.write(f"{name}\n")
        if fails and not (folder / "repaired").exists():
            os.write(2, b"no scenes\n")
            raise SystemExit(1)
        if name == "slow" and not (folder / "repaired").exists():
            time.sleep(60)

    return SimpleNamespace(main=main)


def test_parts_run_after_those_they_need_and_a_stopped_run_resumes(tmp_path, monkeypatch, capsys):
    """The part that fails is named with its log; the one beside it is stopped, and what is done stays done."""
    for name in ("first", "slow", "bad", "last"):
        monkeypatch.setitem(sys.modules, f"experiments.mini.{name}", written(tmp_path, name, name == "bad"))
    every = [Part("last", "last", (), ("bad", "slow")), Part("bad", "bad", (), ("first",)),
             Part("slow", "slow", (), ("first",)), Part("first", "first", ("--out", str(tmp_path / "x")))]  # fmt: skip
    with pytest.raises(SystemExit, match=r"bad failed \(exit code 1\): no scenes; its log is .*bad.log"):
        run(every, tmp_path, 2)
    assert (tmp_path / "order").read_text().split()[0] == "first"
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.json")) == ["first.json"]
    (tmp_path / "repaired").touch()
    capsys.readouterr()
    run(every, tmp_path, 2)
    started = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(started[:2]) == ["bad", "slow"] and started[2:] == ["last", "done"]
