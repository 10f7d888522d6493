"""Links, paths and commands of README and docs: links lead somewhere, commands compose, named files exist."""

import copy
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from segresearch.__main__ import COMMANDS as INSTALLED
from segresearch.__main__ import MEASURES
from segresearch.config import AnalyzeConfig, EvaluateConfig, conf_dir, settings
from segresearch.config.expand import panels
from segresearch.evaluation.spec import evaluation_spec

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / f"{page}.md" for page in ("README", "CHANGELOG", "CONTRIBUTING")),
         *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments" / "mini" / "README.md",
         ROOT / "segresearch" / "weights" / "mini" / "README.md"]  # fmt: skip
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))
CONFIGS = sorted((ROOT / "conf").glob("*.yaml"))  # their --help texts hold commands
FEWER = {"evaluate": ["images=20"]}  # captions of thousands of scenes take seconds
HYDRA = ("generate", "evaluate", "analyze")  # scripts whose arguments are overrides


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def fences(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(path), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {target}, whose heading does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_backticks_exist(page):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("runs", ".venv"))
    for span in spans(text_of(page)):
        if re.fullmatch(rf"(?:{folders})/[\w./*-]*", span):
            assert list(ROOT.glob(span.rstrip("/"))), f"{name(page)} names {span}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page):
    targets = re.search(r"^\.PHONY: (.*)$", text_of(ROOT / "Makefile"), re.M)[1].split()
    code = "\n".join([*fences(text_of(page)), *spans(text_of(page))])
    assert set(re.findall(r"^make ([\w-]+)", code, re.M)) <= set(targets)


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every call of a script in a page (code), a script's docstring or a config's help."""
    text = text_of(path)
    indented = re.findall(r"^    .*", text, re.M)
    parts = {".md": [*fences(text), *spans(text), *indented], ".py": text.split('"""')[1::2], ".yaml": [text]}
    code = "\n".join(parts[path.suffix])
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        script = r"(python|torchrun|srun) .*experiments[/.]|(python|/gpu.sh) ?.*benchmarks/|^benchmarks/\w"
        if re.search(rf"{script}|^\s*segresearch [a-z]", line) and "COMMAND" not in line:
            yield shlex.split(line.strip(), comments=True)


def called(words: list[str]) -> tuple[Path, list[str]]:
    """The file that a command runs, and its arguments."""
    if words[0] == "segresearch":
        assert words[1] in INSTALLED, f"segresearch has no command {words[1]}"
        script = ROOT / "experiments" / f"{words[1]}.py"
        module = ROOT / "segresearch" / ("measure.py" if words[1] in MEASURES else "commands.py")
        return script if script.is_file() else module, words[2:]
    for i, word in enumerate(words):
        if word.startswith(("experiments.", "experiments/", "benchmarks/")):
            path = word if "/" in word else word.replace(".", "/") + ".py"
            return ROOT / path, words[i + 1 :]
    raise AssertionError(f"no script in {words}")


COMMANDS = {(name(path), " ".join(words)): words for path in [*PAGES, *SCRIPTS, *CONFIGS] for words in commands(path)}


def overrides(script: str) -> dict[str, list[str]]:
    """The commands of a script with Hydra's command line: where it stands and its text -> its arguments."""
    return {f"{page}: {text}": called(words)[1] for (page, text), words in COMMANDS.items()
            if called(words)[0].stem == script}  # fmt: skip


def jobs(arguments: list[str]) -> Iterator[list[str]]:
    """The overrides of one call. Of a sweep, each value of each key in turn, with the first value of the others."""
    flags = {a for a in arguments if a.startswith("-")}
    assert flags <= {"-m", "--multirun", "--help"}
    parsed = OverridesParser.create().parse_overrides([a for a in arguments if a not in flags])
    kept = [o for o in parsed if not o.key_or_group.startswith("hydra")]
    values = [list(map(str, o.sweep_string_iterator())) if o.is_sweep_override() else None for o in kept]
    assert flags & {"-m", "--multirun"} or all(v is None for v in values)
    first = [o.input_line if v is None else f"{o.key_or_group}={v[0]}" for o, v in zip(kept, values, strict=True)]
    yield first
    for i, (override, several) in enumerate(zip(kept, values, strict=True)):
        for value in (several or [])[1:]:
            yield [*first[:i], f"{override.key_or_group}={value}", *first[i + 1 :]]


@cache
def composed_groups(script: str, groups: tuple[str, ...]):
    return compose(script, overrides=list(groups))


def composed(script: str, job: list[str]):
    """What Hydra composes: the files of the groups, once for each choice, then the values as Hydra sets them."""
    parsed = OverridesParser.create().parse_overrides(job)
    groups = tuple(o.input_line for o in parsed if (conf_dir() / o.key_or_group).is_dir())
    config = copy.deepcopy(composed_groups(script, groups))  # a key that is not in it is an error
    for override in parsed:
        if override.input_line not in groups:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
    return config


def check_generate(config):
    assert panels(settings(config))


def check_evaluate(config):
    assert evaluation_spec(settings(config, kind=EvaluateConfig)).methods


def check_analyze(config):
    assert settings(config, AnalyzeConfig)


PROMPT_FILES = {
    "captions_val2014.json": '{"annotations": [{"image_id": 1, "id": 1, "caption": "a cube"}]}',
    "PartiPrompts.tsv": "Prompt\tCategory\na cube\tObjects\n", "drawbench.csv": "Prompts,Category\na cube,Colors\n",
    "evaluation_metadata.jsonl": '{"tag": "single_object", "prompt": "a cube"}\n',
}  # fmt: skip


@pytest.mark.parametrize("script", HYDRA)
def test_commands_compose_and_fit_their_types(script, tmp_path, monkeypatch):
    for name, text in PROMPT_FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    check = {"generate": check_generate, "evaluate": check_evaluate, "analyze": check_analyze}[script]
    everything = overrides(script)
    assert len(everything) >= 5
    seen = set()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for place, arguments in everything.items():
            for job in jobs(arguments):
                if tuple(job) not in seen:
                    seen.add(tuple(job))
                    try:
                        check(composed(script, [*job, *FEWER.get(script, ())]))
                    except Exception as error:
                        pytest.fail(f"{place}\n{error}")


def test_other_commands_name_files_and_flags_that_exist():
    checked = 0
    for (page, command), words in COMMANDS.items():
        file, arguments = called(words)
        assert file.is_file(), f"{page}: {command}"
        if file.stem in HYDRA:
            continue
        shared = [ROOT / "segresearch" / "commands.py", ROOT / "experiments" / "mini" / "common.py"]
        code = "".join(map(text_of, [file.with_suffix(".py"), *shared]))
        for flag in (a.partition("=")[0] for a in arguments if a.startswith("--")):
            assert flag == "--help" or f'"{flag}"' in code, f"{page}: {command}: no {flag}"
            checked += 1
    assert checked >= 10


def test_every_method_is_in_the_tables():
    files = {path.stem: OmegaConf.load(path) for path in (conf_dir() / "guidance").glob("*.yaml")}
    own = {stem for stem, file in files.items() if set(file) - {"defaults"}} - {"none", "custom"}
    lines = re.findall(r"^\|.*\|$", text_of(ROOT / "docs" / "methods.md"), re.M)
    assert own - {span for line in lines for span in re.findall(r"`(\w+)`", line)} == set()
    page = text_of(ROOT / "docs" / "guidance.md")
    (table,) = re.findall(r"<!-- cost: begin -->\n(.*?)<!-- cost: end -->", page, re.S)
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == set(files) - {"custom"}


def test_the_glossary_names_what_is_there():
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| `(\w+)` \| `([^`]+)` \|$", text_of(ROOT / "docs" / "glossary.md"), re.M)
    assert len(rows) > 40
    for symbol, module in rows:
        assert re.search(rf"\b{symbol}\b", text_of(ROOT / module)), f"{symbol} is not in {module}"
