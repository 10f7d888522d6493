"""What cannot be evaluated ends in one line with a code of its own, before an image is made."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from evaluations import study
from helpers import script

from segresearch import cli, sample_images
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.sample_shards import Worker

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")


@pytest.fixture
def config(folder, tmp_path, unchecked):
    return study(folder, tmp_path / "runs")


def test_memory_and_weights_have_codes_of_their_own(config, model, monkeypatch):
    def greedy(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(ValueError, match="not in|no such file") as caught:
        evaluate(dataclasses.replace(config, weights={"vgg": "none.pth"}, distances=("vgg",)), model, Worker())
    assert cli.explained(caught.value)[0] == 3
    monkeypatch.setattr(sample_images, "sample", greedy)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluate(config, model, Worker())
    code, line = cli.explained(caught.value)
    assert code == 5 and "lower batch_size" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"force": False}, "images: 3 are too few for 256 features"),
        ({"size": (64, 32)}, "cannot be measured here: images of 64×32"),
        ({"reference": "nowhere"}, "reference: nowhere: no such folder"),
        ({"reference": "scene:3"}, "a distance needs many"),
        ({"force": False, "images": 300, "reference": "scene:0-99"}, "100 images are too few for 256 features"),
        ({"device": "cuda:7"} if not torch.cuda.is_available() else {"device": "cude"}, "device: "),
        ({"checksums": {"vg": "x"}}, "checksums.vg: no such network; did you mean vgg?"),
        ({"name": "../x"}, "name: '../x' cannot name the folder of a run"),
        ({"name": ""}, "name: '' cannot"),
        ({"name": "shards"}, "name: 'shards' cannot"),
        ({"prompts": str(Path(__file__).parent)}, "is not a .txt or .json file"),
        ({"prompts": "none.TXT"}, "cannot read none.TXT"),
        ({"keep": 1}, "keep: 1 images kept are fewer than n_examples"),
        ({"weights": {"vg": "x"}}, "weights.vg: no such network; did you mean vgg?"),
        ({"paper": "table1"}, "table1 is of images without a prompt"),
        ({"paper": "table2", "prompts": ("a", "")}, "1 here are empty"),
        ({"features": ("mini", "mini")}, "names one twice"),
    ],
)
def test_what_cannot_be_is_one_line_before_a_picture_is_made(config, model, monkeypatch, change, words):
    monkeypatch.setattr(sample_images, "sample", None)
    with pytest.raises(ValueError, match=words) as caught:
        evaluate(dataclasses.replace(config, **change), model, Worker())
    code, line = cli.explained(caught.value)
    assert code == 2 and "\n" not in line


ARGUMENTS = [
    ("imags=3", 2, "imags: no such setting; did you mean images?"),
    ("experiment=table3", 2, "experiment: no 'table3'; did you mean table"),
    ("weights.inceptoin=x", 2, "weights.inceptoin: no such setting; did you mean inception?"),
    ("images=10000000000000000", 2, "images"),
    ("threads=100000", 2, "threads"),
    ("experiment=demo", 2, "panels: for generate.py"),
    ("metrics=paper", 2, "reference: missing; it must be text"),
    ("features=[incepton]", 2, "did you mean inception?"),
    ("paper=table2", 2, "paper: table2 is of images with prompts"),
    ("prompts=none.json", 2, "cannot read none.json"),
    ("model.path=nowhere", 3, "nowhere: no such file or folder"),
]


@pytest.mark.parametrize(("argument", "code", "words"), ARGUMENTS)
def test_a_slip_on_the_command_line_is_one_line_with_its_code(argument, code, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", argument])
    with pytest.raises(SystemExit) as caught:
        script("evaluate").main()
    said = capsys.readouterr()
    assert caught.value.code == code and said.out == "" and not list(tmp_path.iterdir())
    assert words in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1
