"""Odd settings, as a shell, a stranger's file or a slip gives them: one line with code 2, and nothing is sampled."""

import os

import pytest
from helpers import script

from segresearch.config import typed
from segresearch.config.build import imported, usable_device
from segresearch.config.expand import parse_seeds, slug
from segresearch.config.schema import GenerateConfig
from segresearch.config.validate import nearest
from segresearch.config.yaml_files import check_yaml
from segresearch.errors import ConfigError, InputError
from segresearch.guidance.sites import select_sites

LEVELS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]" for i in range(12))
FILES = {
    "bytes": (b"\xff\xfe", "bytes.yaml: not UTF-8 text"),
    "deep": (b"[" * 3000, "deep.yaml, line 1: nested in more than 50 levels"),
    "bomb": (f"# @package _global_\n{LEVELS}\n".encode(), "bomb.yaml: its aliases stand for "),
    "pairs": ("\n".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 2 if i else '1'}]" for i in range(49)).encode(), "stand for "),
    "within": (b"a: &a [*a]\n", "within.yaml, line 1: an alias of a node within that node"),
    "number": (b"steps: " + b"9" * 5000, "number.yaml, line 1: a number of 5,000 digits"),
    "header": (b"# @package\nsteps: 1\n", "header.yaml: `# @package` without a name"),
    "list": (b"# @package _global_\ndefaults: 5\n", "list.yaml: defaults: not a list of names"),
    "nothing": (b"# @package _global_\ndefaults: [null]\n", "nothing.yaml: defaults: not a list of names"),
    "itself": (b"# @package _global_\ndefaults: [itself]\n", "the defaults of these configs lead back to themselves"),
    "large": (b"#" * (1 << 20) + b"#", "large.yaml: 1,048,577 bytes; a config has at most 1,048,576"),
    "elsewhere": (b"seeds: [1]\n", "experiment: its file must begin with the line `# @package _global_`"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_of_a_config_folder_is_named(name, call, tmp_path):
    content, words = FILES[name]
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / f"{name}.yaml").write_bytes(content)
    code, said = call(script("generate").main, "--config-dir", "mine", f"experiment={name}")
    assert code == 2 and words in said.err and said.err.count("\n") == 1


def test_a_broken_file_named_in_compare_is_refused_too(call, tmp_path):
    (tmp_path / "mine" / "guidance").mkdir(parents=True)
    (tmp_path / "mine" / "guidance" / "deep.yaml").write_text("[" * 3000)
    code, said = call(script("generate").main, "--config-dir", "mine", "compare=[deep]")
    assert code == 2 and "nested in more than 50 levels" in said.err and said.err.count("\n") == 1


def test_honest_yaml_passes(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a [1, {b: c}]\nd: *a\n")
    check_yaml(path)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("seeds=[]", "seeds: no seed; write 3"),
        ("experiment=", "experiment: empty; give the name of a file"),
        ("guidance=", "guidance: empty"),
        ("guidance=segg", "guidance: no 'segg'; did you mean seg?"),
        ("seeds=${seeds}", "seeds: Recursive interpolation detected; `${` begins an interpolation"),
        ("seeds=${nope}", "seeds: Interpolation key 'nope' not found; `${`"),
        ('prompts=["a ${b c"]', "token recognition error"),
        ('prompts=["\udcff"]', "not valid Unicode"),
        ("prompts=pipe.txt", "prompts: cannot read pipe.txt: not a file"),
        (f"name={'n' * 101}", "cannot name the folder of a run; use at most 100 letters"),
        ("sampler=[euler,heun]", "sampler: [euler,heun] is not the name of one file of conf/sampler; methods"),
        ("guidance=null", "guidance: null is not the name of one file"),
        ("negative=some.csv", "negative: some.csv is not a .txt file"),
        ("compare=[{label: Seg},{guidance: seg, label: seg}]", "the files of 'Seg' and 'seg' have one name"),
        ("--resolve", "--resolve: only with --cfg job"),
        ("--foo", "unrecognized arguments: --foo; `script.py --help`"),
    ],
)
def test_a_slip_is_one_line_before_anything_is_sampled(argument, words, call, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    code, said = call(script("generate").main, argument)
    assert code == 2 and words in said.err and said.err.count("\n") == 1, said


@pytest.mark.parametrize("argument", ["model.path=pipe", "model.path=/dev/null", "model.vae=pipe"])
def test_a_pipe_or_a_device_is_no_model(argument, call, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, said = call(script("generate").main, argument)
    assert code == 3 and "not a file but a pipe or a device" in said.err and said.err.count("\n") == 1


def test_an_experiment_is_not_for_analyze(call):
    code, said = call(script("analyze").main, "experiment=table1")
    assert code == 2 and "experiment: only generate and evaluate take one" in said.err and said.err.count("\n") == 1


def test_options_may_stand_between_settings(call):
    code, said = call(script("generate").main, "model.path=none", "-m", "steps=1,2")
    assert code == 3 and said.err.count("error: job ") == 2 and "jobs failed (steps=1; steps=2)" in said.err


def test_half_of_a_surrogate_pair_is_named_by_its_key():
    values = {"prompts.1": {"prompts": ["a", "\ud800"]}, "guidance.label": {"guidance": {"label": "\ud800"}}}
    for key, value in values.items():
        with pytest.raises(ConfigError, match=rf"^{key}: \\\\?ud800: not valid Unicode"):
            typed(GenerateConfig, value)


def test_a_long_label_is_a_short_file_name():
    names = {slug("seg " * 3000), slug("seg " * 3001)}
    assert len(names) == 2 and all(len(name) == 100 and name.startswith("seg-seg-") for name in names)


def test_small_messages():
    assert nearest("segg", ["sgg", "seg", "pag"]) == "; did you mean seg?"
    with pytest.raises(ConfigError, match="^seeds: no seed"):
        parse_seeds([])
    with pytest.raises(ConfigError, match="device: 'foo' cannot be used here: give auto, cpu, cuda, cuda:1 or mps$"):
        usable_device("foo")
    with pytest.raises(InputError, match=r"^where=\[\]: empty; name a group"):
        select_sites([], ("mid_block.attentions.0.transformer_blocks.0.attn1",))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("../my_module.f", "names no function; write package.module.function"),
        (".f.g", "names no function"),
        ("f", "names no function"),
        ("no_module_of_mine.f", "there is no module no_module_of_mine$"),
        ("lacking.f", "lacking itself imports no_such_package, not here$"),
        ("small.nosuch", "small has no 'nosuch'$"),
        ("small.halve", "small has no 'halve'; did you mean halved?"),
    ],
)
def test_a_target_that_cannot_be_imported_says_why(target, words, tmp_path, monkeypatch):
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    (tmp_path / "small.py").write_text("import torch\n\n\ndef halved():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=words):
        imported(target, "perturbation")
