"""`schedule: auto` in runs: records name the schedule that was used, and older names are the same runs."""

import dataclasses
import json
import shutil

import pytest
from make_models import make_pipeline, write_single

from segresearch import records
from segresearch.checkpoints.own_schedule import schedule_of
from segresearch.config import GenerateConfig, typed
from segresearch.config.build import resolved
from segresearch.config.schema import ScheduleConfig
from segresearch.errors import CheckpointError
from segresearch.generate import expand, generate
from segresearch.models import load_model
from segresearch.reproduce import reproduce


@pytest.fixture
def config(folder, tmp_path):
    given = {
        "model": {"name": "tiny", "path": str(folder)}, "sampler": {"name": "euler"}, "seeds": "0", "steps": 2,
        "batch_size": 1, "device": "cpu", "out": str(tmp_path / "runs"),
    }  # fmt: skip
    return typed(GenerateConfig, given)


def with_scheduler(folder, copy, **changes):
    """A copy of a model whose scheduler's config is another."""
    shutil.copytree(folder, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


def record_of(run):
    (path,) = (run.folder / "images").rglob("*.png")
    return path, records.read_record(path)


def test_auto_is_the_default_and_leading_is_the_same_run(config, model):
    assert config.schedule == ScheduleConfig("auto")
    run = generate(config, model)
    path, said = record_of(run)
    assert said["schedule"] == {"name": "leading", "rho": None} and "prediction" not in said["model"]
    named = dataclasses.replace(config, schedule=ScheduleConfig("leading"))
    for again in (config, named):
        assert (generate(again).sampled, generate(again).folder) == (0, run.folder)  # without a model
    assert reproduce(path, device="cpu", trust=True).largest == 0


def test_a_trailing_model_is_sampled_as_it_says(config, folder, tmp_path):
    path = str(with_scheduler(folder, tmp_path / "turbo", timestep_spacing="trailing"))
    one = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path), steps=1)
    run = generate(one)
    file, said = record_of(run)
    assert said["schedule"]["name"] == "trailing" and reproduce(file, device="cpu", trust=True).largest == 0
    other = dataclasses.replace(one, schedule=ScheduleConfig("leading"))
    with pytest.warns(UserWarning, match="schedule leading with 1 steps starts at sigma 0.04131, .*trailing. at 14.61"):
        against = generate(other)
    assert against.folder != run.folder and record_of(against)[0].read_bytes() != file.read_bytes()


def test_a_curve_and_lcm_have_names_that_replay(config, folder, tmp_path):
    for i, (name, changes) in enumerate({
        "leading-karras": {"use_karras_sigmas": True},
        "lcm": {"_class_name": "LCMScheduler"},
    }.items()):  # fmt: skip
        copy = with_scheduler(folder, tmp_path / f"copy{i}", **changes)
        if name == "lcm":
            index = json.loads((copy / "model_index.json").read_text())
            (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(copy)))
        file, said = record_of(generate(changed))
        assert said["schedule"]["name"] == name and reproduce(file, device="cpu", trust=True).largest == 0


def test_a_set_prediction_is_of_the_identity(config, folder):
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, prediction="v_prediction"))
    assert expand(resolved(changed)).folder != expand(resolved(config)).folder
    with pytest.warns(UserWarning, match="prediction=v_prediction is used, though the model declares epsilon"):
        file, said = record_of(generate(changed))
    assert said["model"]["prediction"] == "v_prediction"
    with pytest.warns(UserWarning, match="prediction=v_prediction"):
        assert reproduce(file, device="cpu", trust=True).largest == 0


def test_the_schedule_on_disk_is_that_of_the_loaded_model(folder, tmp_path):
    file = write_single(tmp_path / "one.safetensors", make_pipeline(tmp_path / "made"))
    assert schedule_of(file) == load_model(file, tokenizer=folder).denoiser.schedule.name == "leading"
    configs = tmp_path / "configs"
    (configs / "scheduler").mkdir(parents=True)
    (configs / "scheduler" / "scheduler_config.json").write_text(json.dumps({"timestep_spacing": "trailing"}))
    assert schedule_of(file, configs) == "trailing"
    assert load_model(file, tokenizer=folder, config=configs).denoiser.schedule.name == "trailing"
    facts = {"sigma_schedule": "exponential", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}
    edm = with_scheduler(folder, tmp_path / "edm", _class_name="EDMEulerScheduler", **facts)
    with pytest.raises(CheckpointError, match="edm: scheduler: model_index.json says EulerDiscreteScheduler"):
        schedule_of(edm)
    with pytest.raises(CheckpointError, match="says EulerDiscreteScheduler, scheduler_config.json EDMEulerScheduler"):
        load_model(edm)
    index = json.loads((edm / "model_index.json").read_text())
    (edm / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    assert schedule_of(edm) == load_model(edm).denoiser.schedule.name == "edm-exponential"
    assert schedule_of(folder, unet=str(edm / "unet")) == "edm-exponential"  # what lies beside that UNet
    assert load_model(folder, unet=edm / "unet").denoiser.schedule.name == "edm-exponential"
    (edm / "scheduler" / "scheduler_config.json").write_text("{")
    for read in (load_model, schedule_of):
        with pytest.raises(CheckpointError, match="scheduler_config.json is not JSON"):
            read(edm)
