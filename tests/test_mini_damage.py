"""Damaged files of the training of mini: each is one line that names the file and what to do."""

import json

import pytest
import torch
from torch import nn

from experiments.mini.common import Plan, generator, train
from experiments.mini.train import Part, run
from experiments.mini.train_vae import load_vae
from segresearch.cli import explained
from segresearch.errors import Ended


def trained(folder, stop=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)

    def loss_of(step):
        x = torch.randn(8, 4, generator=generator(0, step))
        return (model(x) - x[:, :2]).square().mean(), {}

    return train(folder, model, loss_of, Plan(steps=3, peak=0.1, warmup=1, save_every=1, log_every=1, stop=stop), {})


def test_a_half_last_line_of_the_log_is_dropped(tmp_path):
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", stop=2)
    log = tmp_path / "parts" / "loss.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')  # as a loss of power leaves it
    resumed = trained(tmp_path / "parts")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line] == [1, 2, 3]
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    with pytest.raises(Ended, match=r"loss.jsonl, line 2: damaged, not JSON; remove the line, and the same command"):
        trained(tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("checkpoint.pt", b"garbage", "damaged; remove it, and the same command begins this training again"),
        ("checkpoint.pt", b"", "damaged; remove it"),
        ("checkpoint.pt", {"model": {}}, "of another training than this; remove it"),
        ("checkpoint.pt", [1], "not of a training; remove it"),
        ("steps.json", b"{", "damaged, not JSON; remove it, and the same command resumes"),
        ("steps.json", b"[]", "no number of steps; remove it"),
    ],
)
def test_a_damaged_file_of_a_training_is_one_line(tmp_path, name, content, words):
    trained(tmp_path, stop=1)
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(Ended, match=f"^{path}: .*{words}") as caught:
        train(tmp_path, nn.Linear(4, 2), None, Plan(steps=3, seconds=1 if name == "steps.json" else None), {})
    assert explained(caught.value)[0] == 4 and "\n" not in str(caught.value)


def test_damaged_weights_of_a_part_are_one_line(tmp_path):
    (tmp_path / "vae.pt").write_bytes(b"garbage")
    with pytest.raises(Ended, match=f"^{tmp_path}/vae.pt: damaged; remove it and the file of its part in RUNS/parts"):
        load_vae(tmp_path / "vae.pt")


def test_a_damaged_file_of_a_part_is_one_line(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "vae.json").write_bytes(b"{")
    with pytest.raises(Ended, match="parts/vae.json: damaged, not JSON; remove it, and the same command resumes"):
        run([Part("vae", "train_vae", ())], tmp_path, 1)
