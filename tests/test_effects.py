"""The page of measured effects: its parts compose, each is on the page with its own command and as many methods."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir

from experiments.mini.effects import PARTS, attention_table, begun, direction_table, replaced, table, unrestored
from segresearch.config import EvaluateConfig, conf_dir, settings
from segresearch.evaluation.spec import evaluation_spec

PAGE = (conf_dir().parent / "docs" / "effects.md").read_text()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_is_an_evaluation(part):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = settings(compose("evaluate", overrides=part.command(20)), kind=EvaluateConfig)
    spec = evaluation_spec(config)
    assert (config.images, config.steps, config.sampler.name) == (part.images or 20, 10, "dpmpp_2m")
    assert not spec.methods[spec.baseline].terms and len(spec.methods) > 1
    assert ("control" in part.name) == bool(spec.controls)
    assert (part.name in ("fig15", "methods_text")) == bool(spec.scenes)
    (section,) = re.findall(rf"<!-- {part.name}: begin -->\n(.*?)\n<!-- {part.name}: end -->", PAGE, re.S)
    assert shlex.split(section.splitlines()[0].strip("`"))[2:-1] == part.command(300)  # the numbers' own command
    rows = [row.split(" | ")[0][2:] for row in section.splitlines()[4:]]
    if part.rank:
        assert rows[0] == spec.baseline and len(rows) == len({one.of for one in spec.sweep.values()} or spec.methods)
        assert set(rows) <= set(spec.methods)
    else:
        assert rows == list(spec.methods)
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


def test_a_ranking_has_a_row_a_method_at_its_best_scale(tmp_path):
    distances = {"vanilla": 500, "PAG ×0.5": 480, "PAG": 470, "PAG ×2": 520, "SEG ×0.5": 510, "SEG": 530}
    (tmp_path / "metrics.csv").write_text(
        "method,metric,value,error\n" + "".join(f"{name},fd-mini,{value},1\n" for name, value in distances.items())
    )
    rows = table(tmp_path, rank=True, columns=["fd-mini"])[2:]
    assert rows == ["| vanilla | 500.0 ± 1.0 |", "| PAG | 470.0 ± 1.0 |", "| SEG ×0.5 | 510.0 ± 1.0 |"]


def test_diagnostics_are_means_over_the_sites(tmp_path):
    (tmp_path / "diagnostics.csv").write_text(
        "method,site,quantity,step,sigma,value,error,count\n"
        ",mid.0,keys,0,14.6,50,1,8\n,mid.1,keys,0,14.6,54,1,8\n,up.0,keys,0,14.6,9,1,8\n"
        + "".join(f",mid.0,{name},0,14.6,0.25,,8\n" for name in ("near", "own", "position", "varying"))
        + "SEG alone,mid.0,change,0,14.6,0.2,,8\nSEG alone,mid.1,change,0,14.6,0.4,,8\n"
        "SEG alone,,cosine,0,14.6,-0.125,0.01,8\nSEG alone,,size,0,14.6,,,8\n"
    )
    assert attention_table(tmp_path)[2] == "| effective keys, of 64 | 52.0 |"
    assert direction_table(tmp_path)[2] == (
        "| SEG | 0.30, 0.30, 0.30 | –, –, – | –, –, – | –, –, – | −0.12, −0.12, −0.12 |"
    )


def test_a_name_chooses_its_part_alone_and_a_beginning_all_that_begin_so():
    assert begun("methods") == ["methods"] and begun("control") == ["control-canny", "control-depth"]
    assert begun("method") == ["methods", "methods_again", "methods_text"] and begun("x") == []


def test_what_is_not_restored_is_measured_as_the_restored_images_are():
    head, _, enlarged, decoded = unrestored(4)
    assert head == "| images | PSNR | to truth |"
    assert 20 < float(enlarged.split("|")[2].split()[0]) < float(decoded.split("|")[2].split()[0]) < 40


def test_every_number_of_the_summary_is_in_a_table():
    """A number with its error in the text stands in a table of the page."""
    summary, tables = PAGE.split("## Method")[0], PAGE.split("## Method")[1]
    numbers = re.findall(r"−?\d[\d.]* ± \d+(?:\.\d+)?", summary)
    assert len(numbers) > 5 and [n for n in numbers if n not in tables] == []


def test_a_part_replaces_its_own_section_only():
    page = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\nkept\n<!-- y: end -->\n"
    once = replaced(page, "x", ["1", r"\2"])
    assert once == page.replace("old", "1\n\\2") and replaced(once, "x", ["old"]) == page
    with pytest.raises(ValueError, match="no <!-- z: begin -->"):
        replaced(page, "z", [])
