"""Hostile configs: no file outside the config folders is read, nothing that one names is imported."""

import os

import pytest
from helpers import script
from omegaconf import OmegaConf

from segresearch.config.trust import check_composed, guarded, name_of_a_file
from segresearch.errors import ConfigError

TOUCH = "touch PWNED"
OUTSIDE = f'# @package _global_\nhydra: {{callbacks: {{x: {{_target_: os.system, command: "{TOUCH}"}}}}}}\n'
FILES = {
    "outside/evil.yaml": OUTSIDE,
    "mine/guidance/leaves.yaml": "defaults: [../../outside/evil]\n",
    "mine/guidance/deep.yaml": 'defaults: [{"/outside@_global_": ../../../outside/evil}]\n',
    "mine/guidance/calls.yaml": OUTSIDE,
    "mine/guidance/logs.yaml": "# @package _global_\nhydra: {job_logging: {version: 1, handlers: {x: {'()': os.system, "
                               f"command: {TOUCH}}}}}, root: {{handlers: [x]}}}}}}\n",
    "mine/guidance/later.yaml": "# @package _global_\nmodel: {networks: {handlers: {'()': os.system}}}\nhydra:\n"
                                "  job_logging: {version: 1, handlers: '${model.networks.handlers}'}\n",
    "mine/guidance/launches.yaml": "# @package _global_\nhydra: {launcher: {_target_: subprocess.getoutput}}\n",
    "mine/guidance/environment.yaml": "# @package _global_\nhydra: {job: {env_set: {SEG_EVIL: outside}}}\n",
    "mine/guidance/options.yaml": "label: {_target_: os.system}\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["guidance=../../outside/evil"], "guidance: '../../outside/evil' is a path"),
        (["guidance={here}/outside/evil"], "is a path; a choice is the name of a file in the config folders"),
        (["experiment=../.."], "experiment: '../..' is a path"),
        (["-m", "guidance=seg,../../outside/evil"], "is a path"),
        (["--cfg", "job", "model=../x"], "model: '../x' is a path"),
        (["--config-name=../outside/evil"], "is a path"),
        (["--config-dir=mine", "guidance=leaves"], "is a path"),
        (["--config-dir=mine", "guidance=deep"], "is a path"),
        (["--config-dir=mine", "guidance=calls"], "hydra.callbacks: x would be imported"),
        (["--config-dir=mine", "guidance=logs"], "hydra.job_logging.handlers.x.(): 'os.system' would be imported"),
        (["--config-dir=mine", "guidance=later"], "hydra.job_logging.handlers: '${{model.networks.handlers}}'"),
        (["--config-dir=mine", "-m", "guidance=launches"], "hydra.launcher: 'subprocess.getoutput' is not Hydra's own"),
        (["--config-dir=mine", "guidance=environment"], "hydra.job.env_set: SEG_EVIL: set variables in the shell"),
        (["--config-dir=mine", "guidance=options"], "label._target_: 'os.system' would be imported"),
        (["+model.x._target_=os.system"], "model.x._target_: 'os.system' would be imported"),
        (["hydra.sweeper._target_=os.system"], "hydra.sweeper: 'os.system' is not Hydra's own"),
        (["--experimental-rerun", "config.pickle"], "--experimental-rerun: it unpickles a file"),
    ],
)
def test_a_config_reads_no_file_outside_its_folders_and_imports_nothing(arguments, words, call, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code, said = call(script("generate").main, *[a.format(here=tmp_path) for a in arguments])
    assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1, said
    assert words.format() in said.err
    assert not [*tmp_path.rglob("PWNED")] and not [*tmp_path.rglob("*.png")] and "SEG_EVIL" not in os.environ


def test_the_guard_ends_with_its_block_and_honest_configs_pass():
    from hydra._internal.config_repository import ConfigRepository

    load = ConfigRepository.load_config
    with guarded():
        assert ConfigRepository.load_config is not load
    assert ConfigRepository.load_config is load
    for path in ("guidance/seg", "generate", "hydra/job_logging/none", "experiment/a.b-c 1"):
        name_of_a_file(path)
    check_composed(OmegaConf.create({"steps": 1, "hydra": {"job": {"env_set": {"A": "1"}, "env_copy": ["A"]}}}))


def test_deep_configs_end_in_one_line():
    config = {}
    for _ in range(400):
        config = {"a": config}
    with pytest.raises(ConfigError, match="nested in more than 200 levels"):
        check_composed(config)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth"])
def test_a_pickle_that_exists_is_refused_as_one(name, call, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    code, said = call(script("generate").main, f"model.path={name}", "seeds=0", "device=cpu")
    assert code == 3 and "pickle checkpoints can run code" in said.err and said.err.count("\n") == 1
