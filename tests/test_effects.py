"""The page of measured effects: its parts compose, each is on the page with its own command and as many methods."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir

from experiments.mini.effects import PARTS, replaced, table
from segresearch.config import EvaluateConfig, conf_dir, settings
from segresearch.evaluation.spec import evaluation_spec

PAGE = (conf_dir().parent / "docs" / "effects.md").read_text()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_is_an_evaluation(part):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = settings(compose("evaluate", overrides=part.command(20)), kind=EvaluateConfig)
    spec = evaluation_spec(config)
    assert (config.images, config.steps, config.sampler.name) == (10 if part.half else 20, 10, "dpmpp_2m")
    baseline = spec.methods[spec.baseline].terms
    assert set(baseline) == ({"cfg"} if part.name.startswith("cfg") else set()) and len(spec.methods) > 1
    assert ("control" in part.name) == bool(spec.controls)
    assert (part.name[:3] == "cfg" or "text" in part.name) <= bool(spec.scenes)
    (section,) = re.findall(rf"<!-- {part.name}: begin -->\n(.*?)\n<!-- {part.name}: end -->", PAGE, re.S)
    assert shlex.split(section.splitlines()[0].strip("`"))[2:-1] == part.command(2000)  # the numbers' own command
    assert [row.split(" | ")[0][2:] for row in section.splitlines()[4:]] == list(spec.methods)
    assert f"effects/{part.name}.png" in PAGE


def test_tables_keep_the_run_s_numbers(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "method,metric,value,error\n"
        "vanilla,n,9,\nvanilla,fd-mini,512.34,20.04\nvanilla,fd_to_baseline-mini,,\nvanilla,distance-mini,,\n"
        "vanilla,exact,0.4251,\nSEG σ=∞,n,9,\nSEG σ=∞,fd-mini,500,20.1\nSEG σ=∞,fd_to_baseline-mini,-12.34,3.21\n"
        "SEG σ=∞,distance-mini,0.0961,0.0031\nSEG σ=∞,exact,0.5,\n"
    )
    assert table(tmp_path) == [
        "| method | FD | − baseline | distance | exact |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| vanilla | 512.3 ± 20.0 | – | – | 0.425 |",
        "| SEG σ=∞ | 500.0 ± 20.1 | −12.3 ± 3.2 | 0.096 ± 0.003 | 0.500 |",
    ]


def test_a_part_replaces_its_own_section_only():
    page = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\nkept\n<!-- y: end -->\n"
    once = replaced(page, "x", ["1", r"\2"])
    assert once == page.replace("old", "1\n\\2") and replaced(once, "x", ["old"]) == page
    with pytest.raises(ValueError, match="no <!-- z: begin -->"):
        replaced(page, "z", [])
