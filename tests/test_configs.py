"""Every config composes, fits its types and is built on a tiny denoiser; every slip is one clear line."""

import argparse
import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from guidance_models import denoiser, noisy
from helpers import composed, every_method, script
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from segresearch.cli import explained, hydra_arguments
from segresearch.config import (
    AnalyzeConfig,
    EvaluateConfig,
    GenerateConfig,
    GuidanceConfig,
    conf_dir,
    typed,
)
from segresearch.config.build import build_guidance, configured_model, resolved
from segresearch.config.expand import describe, panels, parse_seeds, read_prompts, slug
from segresearch.config.method import PerturbedTerm
from segresearch.config.schema import ModelConfig, SamplerConfig, ScheduleConfig
from segresearch.config.validate import modern
from segresearch.errors import ConfigError
from segresearch.guidance import SEG
from segresearch.models.controlnet import controlled
from segresearch.sample_images import encode_conds
from segresearch.sampling import SAMPLERS, SCHEDULES, initial_noise, sample
from segresearch.sampling.loop import checked_options
from segresearch.scenes.scenes import edge_image, scenes

CONF = conf_dir()
SCRIPT = CONF.parent / "experiments" / "generate.py"
PROMPTS = ["a red cube", "two stars"]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def sd():
    return configured_model(composed("guidance=none").model)


@pytest.fixture(scope="module")
def sampled():
    """Methods that were sampled already."""
    return set()


@pytest.mark.usefixtures("unchecked")  # `test_fake_cuda_guidance` runs every method checked
@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_samples(experiment, sd, sampled):
    """A method that several experiments have is sampled once."""
    config = composed(f"experiment={experiment}")
    assert config.name == experiment
    plan = panels(config)
    assert plan and all(panel.rows and panel.methods for panel in plan)
    noise = initial_noise([0], sd.latent_shape((16, 32)))
    for panel in plan:
        for guidance in list(panel.methods.values())[:40]:  # a sweep has each method at several scales
            method = repr(dataclasses.replace(guidance, label=None))
            if method in sampled:
                continue
            sampled.add(method)
            model = build_guidance(guidance, sd)
            latents = sample(model, noise, steps=1, conds=encode_conds(sd, model, ["a red cube"], size=(16, 32)))
            assert latents.shape == noise.shape and latents.isfinite().all()


@pytest.fixture(scope="module")
def steered(sd):
    """mini with its ControlNet for edges, and the edges of a scene."""
    scene = scenes([10_000_007])
    image = edge_image(scene.edges)[:, :, :32, 8:56]
    return configured_model(composed("guidance=none").model, controlnets=["canny"]), image


def test_every_guidance_composes_for_sdxl():
    assert list(every_method("model=sdxl", custom="test_configs.keep_values")) == names("guidance")


def latents_of(guidance, sd, seeds, prompts, sampler="euler", steps=4, **more):
    model, size = build_guidance(guidance, sd), (32, 48)
    conds = encode_conds(sd, model, prompts, size=size)
    noise = initial_noise(seeds, sd.latent_shape(size))
    return sample(model, noise, sampler, "trailing", steps=steps, conds=conds, seeds=seeds, **more)


@pytest.fixture(scope="module")
def vanilla(sd):
    return latents_of(GuidanceConfig(), sd, [0, 1], PROMPTS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("guidance", names("guidance"))
def test_every_guidance_composes_and_samples(guidance, sd, vanilla):
    """On a non-square image; image 1 is the same alone."""
    own = ["guidance.terms.custom.perturbation.target=test_configs.keep_values"] if guidance == "custom" else []
    config = composed(f"guidance={guidance}", *own).guidance
    latents = latents_of(config, sd, [0, 1], PROMPTS)
    assert latents.isfinite().all() and torch.equal(latents, vanilla) == (guidance == "none")
    torch.testing.assert_close(latents_of(config, sd, [1], PROMPTS[1:]), latents[1:], rtol=0, atol=2e-3)
    assert describe(config) != "vanilla" or guidance == "none"


@pytest.mark.slow
@pytest.mark.parametrize(
    "guidance", ["tpg", "tsg", "swg", "nag", "cads", "icg", "apg", "momentum", "sgg", "zigzag", "sag_cfg"]
)
def test_methods_under_a_controlnet(guidance, steered):
    sd, image = steered
    config = composed(f"guidance={guidance}").guidance
    control = [controlled(sd.controlnets["canny"], image)]
    both = latents_of(config, sd, [0, 1], PROMPTS, steps=3, control=control)
    alone = latents_of(config, sd, [1], PROMPTS[1:], steps=3, control=control)
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=2e-3)
    free = latents_of(config, sd, [1], PROMPTS[1:], steps=3)
    assert both.isfinite().all() and (alone - free).abs().max() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "sampler"),
    [("apg", "heun"), ("smc", "dpm_2"), ("adaptive_stop", "heun"), ("momentum", "dpmpp_2m"), ("higs", "heun"),
     ("sg_prev", "dpm_2"), ("emag", "heun"), ("emag", "dpmpp_2m")],
)  # fmt: skip
def test_methods_with_memory_under_samplers_of_several_evaluations(guidance, sampler, sd):
    config = composed(f"guidance={guidance}").guidance
    both = latents_of(config, sd, [0, 1], PROMPTS, sampler, 4)
    assert both.isfinite().all()
    torch.testing.assert_close(latents_of(config, sd, [1], PROMPTS[1:], sampler, 4), both[1:], rtol=0, atol=2e-3)


def keep_values(q, k, v, site, attend):
    return v


def mixture(q, k, v, site, attend, share):
    return share * v + (1 - share) * attend(q, k, v, site)


def test_a_function_of_ones_own_is_reached_from_the_config():
    x, sigma, conds = noisy()

    def run(*overrides: str) -> torch.Tensor:
        return build_guidance(composed(*overrides).guidance, denoiser())(x, sigma, conds=conds)

    at, scale = "guidance.terms.custom.perturbation", "guidance.terms.custom.scale=1"
    pag = run("guidance=pag", "guidance.terms.pag.scale=1", "guidance.terms.pag.perturbation.tau=0.25")
    one = run("guidance=pag", "guidance.terms.pag.scale=1")
    assert torch.equal(run("guidance=custom", f"{at}.target=test_configs.keep_values", scale), one)
    assert (
        run("guidance=custom", f"{at}.target=test_configs.mixture", f"+{at}.options.share=0.25") - pag
    ).abs().max() < 1e-10
    for target, words in (
        ("test_configs.keep_value", "did you mean keep_values"),
        ("math.pi", "not a function"),
        ("segresearch.config.build.EVERYWHERE", "not a function"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("guidance=custom", f"{at}.target={target}")
    with pytest.raises(ConfigError, match="cannot be called as"):
        run("guidance=custom", f"{at}.target=test_configs.mixture")


def test_guidance_is_what_the_config_says():
    from segresearch.guidance import SEG, GuidedDenoiser, Ramp, cfg, perturbed

    seg = "guidance.terms.seg"
    config = composed(
        "guidance=seg_cfg", "model=sdxl", f"{seg}.perturbation.sigma=2", f"{seg}.perturbation.on=k",
        f"{seg}.base=uncond",
        f"{seg}.perturbation.heads=[1]", f"{seg}.interval=[1,inf]", f"{seg}.perturbation.where=[mid,up.0.0,-1]",
        "guidance.terms.cfg.weight={start: 7, stop: 2}", "guidance.rescale=0.5",
    )  # fmt: skip
    place = {"where": ("mid", "up.0.0", -1), "heads": [1]}
    terms = {
        "cfg": cfg(Ramp(7.0, 2.0)),
        "seg": perturbed("seg", SEG(2.0, on="k", **place), 3.0, base="uncond", interval=(1.0, math.inf)),
    }
    expected = GuidedDenoiser(denoiser(), terms, rescale=0.5)
    built = build_guidance(config.guidance, denoiser())
    assert repr(built) == repr(expected) and built.terms == expected.terms


def test_groups_are_the_samplers_and_schedules_with_options_they_take():
    assert set(names("sampler")) == set(SAMPLERS) and set(names("schedule")) == set(SCHEDULES)
    for sampler in SAMPLERS:
        config = typed(SamplerConfig, OmegaConf.to_container(OmegaConf.load(CONF / "sampler" / f"{sampler}.yaml")))
        assert config.name == sampler
        checked_options(sampler, config.options)
    for schedule in SCHEDULES:
        node = OmegaConf.to_container(OmegaConf.load(CONF / "schedule" / f"{schedule}.yaml"))
        assert typed(ScheduleConfig, node).name == schedule
    config = composed("sampler=heun", "schedule=karras", "schedule.rho=5", "steps=7")
    assert (config.sampler.name, config.schedule, config.steps) == ("heun", ScheduleConfig("karras", 5.0), 7)


def test_compare_takes_names_lists_and_inline_overrides_and_adds_guidance_once():
    columns = panels(composed("compare=[none,sag,pag,seg]"))[0].methods
    assert list(columns) == ["vanilla", "SAG 0.75", "PAG 1", "SEG 1 σ=∞"]
    inline = "{guidance: [cfg, seg], label: mine, terms: {seg: {scale: 2, perturbation: {on: k, sigma: 4}}}}"
    columns = panels(composed("model=sdxl", f"compare=[none,{inline}]", "guidance=pag"))[0].methods
    assert list(columns) == ["vanilla", "mine", "PAG 3"]
    term = columns["mine"].terms["seg"]
    assert term == PerturbedTerm("perturbed", SEG(4.0, on="k"), 2.0) and "cfg" in columns["mine"].terms


def test_seeds_and_prompts(tmp_path):
    assert parse_seeds("0-3") == (0, 1, 2, 3) and parse_seeds(5) == (5,) and parse_seeds("1,4, 7-9") == (1, 4, 7, 8, 9)
    assert parse_seeds((3, "5-6")) == (3, 5, 6) and parse_seeds(str(2**63 - 1)) == (2**63 - 1,)
    for wrong in ("-1", "3-1", "a", "", "1,,2", "0-3,2", 2**63, "1.5"):
        with pytest.raises(ConfigError, match="seed"):
            parse_seeds(wrong)
    file = tmp_path / "prompts.txt"
    file.write_text("a red cube\n\n  two rings  \n", encoding="utf-8")
    assert read_prompts(str(file)) == ("a red cube", "two rings") and read_prompts("a cube") == ("a cube",)
    assert read_prompts("") == ("",)
    for wrong in (str(tmp_path / "none.txt"), ()):
        with pytest.raises(ConfigError, match="prompts"):
            read_prompts(wrong)


def test_pairing_of_prompts_and_seeds():
    two = 'prompts=["a","b"]'
    rows = [(r.prompt, r.seed) for r in panels(composed(two, "seeds=0-1"))[0].rows]
    assert rows == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    rows = [(r.prompt, r.seed) for r in panels(composed(two, "seeds=0-2", "pairing=zip"))[0].rows]
    assert rows == [("a", 0), ("b", 1), ("a", 2)]
    with pytest.warns(UserWarning, match="the first 1 of 2 prompts are taken"):
        (row,) = panels(composed(two, "seeds=0", "pairing=zip"))[0].rows
    assert row.prompt == panels(composed(two))[0].rows[0].prompt
    with pytest.raises(ConfigError):
        panels(composed('prompts=["a","a"]'))


def test_types_are_strict_and_say_so():
    assert typed(float, "inf") == math.inf and typed(float, 3) == 3.0 and typed(tuple[int, ...], [1, 2]) == (1, 2)
    model = {"name": "m", "path": "p"}
    cases = [
        (
            GuidanceConfig,
            {"terms": {"a": {"kind": "perturbde"}}},
            "terms.a.kind: 'perturbde' is not one of cfg, perturbed, difference; did",
        ),
        (GuidanceConfig, {"terms": {"a": {"scale": 1}}}, "terms.a.kind: missing"),
        (GuidanceConfig, {"terms": {"a": {"kind": "cfg"}}}, "terms.a.weight: missing; it must be a number"),
        (GuidanceConfig, {"rescale": 2}, "rescale: 2 is out of range; it must be a number from 0 to 1"),
        (GuidanceConfig, {"rescale": True}, "rescale: True is not a number"),
        (GuidanceConfig, {"rescale": "nan"}, "rescale: 'nan' is not a number"),
        (ModelConfig, {**model, "dtpe": 1}, "dtpe: no such setting; did you mean dtype?"),
        (ModelConfig, {**model, "path": "???"}, "path: missing"),
        (ModelConfig, {**model, "batch_size": 0}, "batch_size: 0 is out of range"),
        (ModelConfig, {**model, "batch_size": 1.5}, "batch_size: 1.5 is not a whole number"),
        (ModelConfig, "mini", "'mini' is not a mapping"),
    ]
    for hint, value, words in cases:
        with pytest.raises(ConfigError) as caught:
            typed(hint, value)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert slug("CFG + SEG σ=∞") == "cfg-seg-sigma-inf" and slug("日本") != slug("日")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("stps=10", "stps: no such setting; did you mean steps?"),
        ("sampler=eulr", "sampler: no 'eulr'; did you mean euler? (choices: dpm_2,"),
        ("guidance.terms.seg.perturbation.sgima=1", "perturbation.sgima: no such setting; did you mean sigma?"),
        ("guidance.terms.sge.scale=1", "guidance.terms.sge: no such setting; did you mean seg?"),
        ("guidance.terms.seg.perturbation.sigma=-1", "sigma: -1 is out of range; it must be a number >= 0"),
        ("guidance.terms.seg.perturbation.boundary=reflct", "did you mean reflect?"),
        ("steps=abc", "steps: 'abc' is not a whole number"),
        ("compare=[seeg]", "compare.0: no guidance 'seeg'; did you mean seg? (choices: adaptive_stop"),
        ("seeds=1,4", "a bare comma"),
        ("prompts=[a", "not key=value"),
        ("+own.key=1", "own: no such setting"),
        ("guidance=custom", "perturbation.target: missing"),
        ("compare=[none,{label: vanilla}]", "two methods are called 'vanilla'"),
        ("controlnet=cany", "controlnet: no 'cany'; did you mean canny? (choices: canny, canny_depth, depth, none)"),
        ("controls.canny.image=a.png", "controls.canny: no control is chosen; controlnet=canny"),
        ("panels=[{controlnet: [dept]}]", "panels.0.controlnet: no controlnet 'dept'; did you mean depth?"),
    ],
)  # fmt: skip
def test_a_slip_on_the_command_line_is_one_line_and_code_2(argument, words, monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["generate.py", argument])
    with pytest.raises(SystemExit) as caught:
        script("generate").main()
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert words in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_a_config_file_that_is_no_yaml_is_named_with_its_line(tmp_path):
    (tmp_path / "guidance").mkdir()
    (tmp_path / "guidance" / "mine.yaml").write_text("# mine\nterms: {b: c: d}\n")
    with pytest.raises(Exception) as caught, initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose("generate", overrides=["guidance=mine", f"hydra.searchpath=[{tmp_path}]"])
    code, line = explained(caught.value)
    assert code == 2 and "guidance/mine.yaml, line 2: not YAML" in line


LIGHT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("code", end.code, "heavy", sorted({"torch", "transformers", "PIL"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("argument", "code", "words"), [("--help", 0, "seg_cfg"), ("steps=0", 2, "steps: 0 is out of range")]
)
def test_help_and_slips_load_nothing_heavy_and_leave_nothing(argument, code, words, tmp_path):
    call = [sys.executable, "-c", LIGHT, str(SCRIPT), argument]
    ended = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert f"code {code} heavy []" in ended.stdout and words in ended.stdout + ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_hydra_starts_where_argparse_reads_every_help_text(monkeypatch):
    """Python 3.14's argparse does, and one of Hydra's is no string; here a stand-in for its check, on any Python."""
    checked = []
    check = lambda self, action: checked.append(action.help)  # noqa: E731
    monkeypatch.setattr(argparse._ActionsContainer, "_check_help", check, raising=False)
    with hydra_arguments():
        parser = get_args_parser()
        for action in parser._actions:
            parser._check_help(action)
    assert "Application's help" in checked and all(isinstance(text, str) for text in checked)
    assert len(set(checked)) == len(parser._actions) - 1  # all but that of --shell-completion
    assert argparse._ActionsContainer._check_help is check


def test_auto_batch_size_is_the_models_for_the_device():
    def sized(device: str, **given) -> int | str:
        model = ModelConfig("m", "p", batch_size=25, **given)
        run = {"sampler": SamplerConfig("euler"), "schedule": ScheduleConfig("karras"), "device": device}
        sizes = {
            resolved(kind(model, batch_size="auto", **run)).batch_size
            for kind in (GenerateConfig, EvaluateConfig, AnalyzeConfig)
        }
        (size,) = sizes
        return size

    assert sized("cpu", batch_size_cuda=100) == 25
    assert sized("cuda:1", batch_size_cuda=100) == 100
    assert sized("cuda") == 25
    stated = GenerateConfig(ModelConfig("m", "p"), SamplerConfig("euler"), ScheduleConfig("karras"), batch_size=3)
    assert resolved(stated) is stated
    with pytest.raises(ConfigError, match="batch_size"):
        typed(GenerateConfig, {"model": {"name": "m", "path": "p"}, "sampler": {"name": "euler"},
                               "schedule": {"name": "karras"}, "batch_size": "all"})  # fmt: skip


def test_keys_of_older_records_become_todays_at_any_depth():
    options = {"window": 3}
    term = {"kind": "perturbed", "window": [0, 1], "perturbation": {"kind": "custom", "options": options}}
    record = {"model": {"strengths": {"seg": 1.0}}, "compare": [{"terms": {"own": term}}], "draws": 5, "only": "all"}
    new = modern(record)
    assert new["model"] == {"scales": {"seg": 1.0}} and (new["n_bootstrap"], new["stage"]) == (5, "all")
    assert new["compare"][0]["terms"]["own"] == {
        "kind": "perturbed", "interval": [0, 1], "perturbation": {"kind": "custom", "options": options},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="model.strengths: now called scales"):
        typed(ModelConfig, {"name": "m", "path": "p", "strengths": {}}, "model")
