"""The settings pages: types from the schema, defaults and meanings from conf/ and its comments."""

import ast
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

from segresearch.config import help as comments
from segresearch.config import kinds, method, schema
from segresearch.config.figures import BlurConfig, GridConfig
from segresearch.config.inputs import InitConfig, IPAdapterConfig
from segresearch.fields import Boundary, Count, Flag, Fraction, NonNegative, Number, Whole
from segresearch.models.compute import Compute
from segresearch.models.text_settings import TextSettings

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
COMMANDS = {"generate": schema.GenerateConfig, "evaluate": schema.EvaluateConfig, "analyze": schema.AnalyzeConfig}
WORDS = {Number: "number", NonNegative: "number from 0", Fraction: "number from 0 to 1", Whole: "whole number",
         Flag: "`true`, `false`", Count: "whole number from 1", method.Where: "sites", schema.Seeds: "seeds",
         schema.Prompts: "text, list or file", str: "text", float: "number", int: "whole number",
         bool: "`true`, `false`", Boundary: "`reflect`, `symmetric`, `circular`, `exact`", type(None): "`null`",
         method.Interval: "[low, high] or `null`"}  # fmt: skip
RECORDS = (method.GuidanceConfig, method.CFGTerm, method.PerturbedTerm, method.DifferenceTerm, method.SAGConfig,
           method.ZSamplingConfig, method.EveryConfig, method.NetworkConfig, IPAdapterConfig, method.CustomConfig,
           schema.ControlConfig, schema.PanelConfig, schema.ModelConfig, schema.SamplerConfig, schema.ScheduleConfig,
           schema.DiagnosticsConfig, schema.SweepConfig, InitConfig, TextSettings, Compute, GridConfig, BlurConfig,
           schema.WandbConfig)  # fmt: skip
NESTED = ("text", "init", "compute", "grid", "blur", "wandb", "guidance")  # records that conf/ writes out
KINDS = {"perturbation": kinds.PERTURBATIONS, "shape": kinds.SHAPES, "post-processor": kinds.POSTS,
         "scale": kinds.SCALES, "conditioning": kinds.CONDITIONINGS}  # fmt: skip


def words(kind: Any) -> str:
    """A type as a reader of a config would say it."""
    with_words = next((text for known, text in WORDS.items() if known == kind), None)
    if with_words:
        return with_words
    if dataclasses.is_dataclass(kind):
        return f"[{kind.__name__}](guidance.md#{kind.__name__.lower()})" if kind in RECORDS else kind.__name__
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return limits(inner[1:]) or words(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(part) for part in inner))
    if origin is tuple:
        several = len(set(inner)) > 1 or len(inner) == 1
        if inner[-1] is ...:
            return f"list of {words(inner[0])}"
        return f"[{', '.join(map(words, inner))}]" if several else f"list of {len(inner)}: {words(inner[0])}"
    if origin is dict:
        return f"mapping of {words(inner[1])}"
    return "a method"


def limits(metadata: tuple[Any, ...]) -> str:
    """The words of `fields.within`, whose check holds them; "" for other metadata."""
    for entry in metadata:
        held = inspect.getclosurevars(inspect.unwrap(entry.func)).nonlocals if hasattr(entry, "func") else {}
        if "limits" in held:
            return f"{str(held['noun']).removeprefix('a ')} {str(held['limits']).replace('>=', 'from')}"
    return ""


def hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record, include_extras=True)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def value_of(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return "required" if value == "???" else f"`{text}`" if len(text) < 60 else "as in the file"


def type_of(record: Any, keys: list[str]) -> str:
    """The words for the type of a setting, by its path from a record."""
    *above, last = keys
    for key in above:
        kind = hints(record)[key]
        record = next(part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part))
    return words(hints(record)[last]) if last in hints(record) else ""


def command_page(name: str) -> str:
    """A table of the settings of a command, and its groups."""
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    values, meanings = yaml.safe_load(text), comments.meanings(name)
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for keys, value in leaves(values):
        path = ".".join(keys)
        cells = (value_of(value), type_of(COMMANDS[name], keys), meanings.get(path, ""))
        rows.append(f"| `{path}` | {' | '.join(map(cell, cells))} |")
    about = values["hydra"]["help"]["header"].strip()
    types_of = f"`{COMMANDS[name].__name__}` in `segresearch/config/schema.py`"
    lines = [f"# {name}", f"{about} `segresearch {name} --help` has the same on a terminal. Types: {types_of}.",
             "## Settings", '<div class="settings" markdown>', "\n".join(rows), "</div>",
             "## Groups", "Chosen by `group=name`.",
             f"```text\n{comments.groups(name)}```"]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def leaves(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    """Every setting with its path and its value; mappings of the schema setting by setting."""
    for key, value in values.items():
        here = (*above, str(key))
        if here[0] in ("defaults", "hydra"):
            continue
        if isinstance(value, dict) and value and here[0] in NESTED:
            yield from leaves(value, here)
        else:
            yield list(here), value


def record_section(record: type) -> str:
    """The fields of a record of the schema."""
    doc = " ".join(inspect.cleandoc(record.__doc__ or "").split())
    rows = ["| field | default | values |", "|---|---|---|"]
    types_of = hints(record)
    for field in dataclasses.fields(record):
        default = "required"
        if field.default is not dataclasses.MISSING:
            plain = field.default
            default = "a record" if dataclasses.is_dataclass(plain) else f"`{json.dumps(plain, default=str)}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{json.dumps(field.default_factory())}`"
        rows.append(f"| `{field.name}` | {cell(default)} | {cell(words(types_of[field.name]))} |")
    return f"### {record.__name__}\n\n{cell(doc)}\n\n" + "\n".join(rows)


def kind_rows(of: str) -> str:
    """The classes of one sort of methods, with their fields, read from their source."""
    rows = ["| `kind` | options and defaults | what |", "|---|---|---|"]
    for kind, path in KINDS[of].items():
        module, _, name = path.rpartition(".")
        source = (ROOT / "segresearch" / "guidance" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
        doc = re.split(r"(?<=[a-z)])\.\s", " ".join((ast.get_docstring(node) or "").split()))[0].rstrip(".")
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
        options = ", ".join(f"`{n.target.id}={ast.unparse(n.value) if n.value else '???'}`" for n in fields
                            if isinstance(n.target, ast.Name) and n.target.id != "kind")  # fmt: skip
        rows.append(f"| `{kind}` | {cell(options)} | {cell(doc)} |")
    return "\n".join(rows)


def guidance_page() -> str:
    """The records of a method, the kinds that they name, and the files of conf/guidance."""
    parts = ["# Methods and records", "What `guidance.*`, `controls.*` and the other nested settings hold.", "## Kinds"]
    for of in KINDS:
        parts += [f"### {of.capitalize()}s", kind_rows(of)]
    parts += ["## Records", *map(record_section, RECORDS), "## Files of conf/guidance"]
    parts += [file_section(file) for file in sorted((CONF / "guidance").glob("*.yaml"))]
    return "\n\n".join(parts) + "\n"


def file_section(file: Path, level: int = 3) -> str:
    return f"{'#' * level} {file.stem}\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```"


def groups_page() -> str:
    titles = {"model": "Models", "controlnet": "ControlNets", "sampler": "Samplers", "schedule": "Schedules",
              "metrics": "Metrics", "preset": "Presets"}  # fmt: skip
    parts = ["# Other groups", "Each file is a choice of its group: `model=sdxl`, `sampler=heun`. A setting after it\n"
             "changes one value of it: `model=sdxl model.dtype=float16`."]  # fmt: skip
    for group, title in titles.items():
        parts += [f"## {title}", *(file_section(file) for file in sorted((CONF / group).glob("*.yaml")))]
    return "\n\n".join(parts) + "\n"


INDEX = """# Settings

The commands `generate`, `evaluate` and `analyze` take settings as `key=value`, read by Hydra. The tables are made of
the schema and of the comments in `conf/`.

| on the command line | means |
|---|---|
| `steps=30` | a value |
| `guidance=seg` | a choice of a group: the file `conf/guidance/seg.yaml` |
| `guidance=[seg,cfg]` | several methods in one sum |
| `guidance.terms.seg.scale=2` | a value inside |
| `seeds=0-7`, `'seeds="1,4,7-9"'` | seeds; a comma needs two quotes |
| `'prompts=["a red cone", "two spheres"]'` | texts |
| `+guidance.terms.seg.shape.kind=apg` | a key that the file does not have |
| `size=[64,96]` | height and width |
| `-m guidance.terms.seg.scale=1,2,3` | a run for each value |

A key that does not exist, a value of another type and a number out of range end the command with one line, before
anything is loaded. A run is named by the content of its settings, so the same command resumes it.

| page | holds |
|---|---|
| [generate](generate.md) | images and grids |
| [evaluate](evaluate.md) | methods, measured |
| [analyze](analyze.md) | the attention, measured |
| [methods and records](guidance.md) | what `guidance.*` and `controls.*` hold; the files of `conf/guidance` |
| [other groups](groups.md) | models, samplers, schedules, ControlNets, metrics, presets |
"""


def pages() -> Iterator[tuple[str, str]]:
    yield "settings/index.md", INDEX
    for name in COMMANDS:
        yield f"settings/{name}.md", command_page(name)
    yield "settings/guidance.md", guidance_page()
    yield "settings/groups.md", groups_page()


def on_files(files: Files, config: Any) -> Files:
    for place, text in pages():
        files.append(File.generated(config, place, content=text))
    return files
