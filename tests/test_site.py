"""The site: its nav, its generated pages, links out of docs/; built as a whole in a slow test."""

import ast
import html
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml
from make_models import make_pipeline

from segresearch.config import help as comments
from segresearch.models import load_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import api  # noqa: E402
import gallery  # noqa: E402
import links  # noqa: E402
import settings  # noqa: E402

GENERATED = dict(page for hook in (api, gallery, settings) for page in hook.pages())
COMMENTS = re.compile(r"!!python/\S+ *(\{.*?\})?")  # tags that only MkDocs resolves


def nav(entries) -> list[str]:
    """The pages of a nav, in order."""
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in nav(part)]


def config() -> dict:
    return yaml.safe_load(COMMENTS.sub("null", (ROOT / "mkdocs.yml").read_text()))


def test_the_nav_has_every_page_once():
    found = [path for kind in ("*.md", "*.html") for path in (ROOT / "docs").rglob(kind)]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in found]
    assert sorted(nav(config()["nav"])) == sorted([*pages, *GENERATED, *links.MOUNTED.values()])


def test_the_site_fetches_nothing():
    theme = config()["theme"]
    assert theme["font"] is False and not config().get("extra_javascript")
    (script,) = config()["extra"]["polyfills"]  # without it the plugin "offline" loads one from elsewhere
    assert "iframe-worker" in script and (ROOT / "docs" / script).is_file()


def test_links_out_of_docs_lead_to_pages_of_the_site():
    text = "[`a`, a](../benchmarks/RESULTS.md#x) [b](gpu.md) [c](https://a.org) `[d](../README.md)` ![e](zoo.png)"
    assert set(links.targets(text, "docs/a.md")) == {"benchmarks/RESULTS.md", "docs/gpu.md", "docs/zoo.png"}
    moved = links.rewritten(text, "docs/a.md", links.place_of)
    assert moved == text.replace("../benchmarks/RESULTS.md", "measured.md")
    assert links.place_of("README.md") == "index.md" and links.place_of("LICENSE") == "files/LICENSE"


@pytest.mark.parametrize("name", settings.COMMANDS)
def test_a_settings_page_has_every_key_with_its_type_and_meaning(name):
    page = GENERATED[f"settings/{name}.md"]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| (.*?) \|$", page, re.M)
    keys = {row[0] for row in rows}
    values = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())
    assert keys >= {key for key in values if key not in ("defaults", "hydra", *settings.NESTED)}
    assert keys >= set(comments.meanings(name)) - set(settings.NESTED)
    assert [row[0] for row in rows if not row[2]] == []  # a type for each


def test_the_words_for_types():
    schema = settings.schema
    hints = settings.hints(schema.EvaluateConfig)
    assert settings.words(hints["threads"]) == "whole number from 1 to 1024"
    assert settings.words(hints["text_alignment"]) == "`none`, `mini`, `clip`"
    assert settings.words(hints["size"]) == "list of 2: whole number from 1 or `null`"
    assert settings.words(settings.hints(schema.ControlConfig)["start"]) == "number from 0 to 1"


def test_the_methods_page_has_every_kind_and_every_file():
    page = GENERATED["settings/guidance.md"]
    for kinds in settings.KINDS.values():
        for kind in kinds:
            assert f"| `{kind}` |" in page
    for file in (ROOT / "conf" / "guidance").glob("*.yaml"):
        assert f"### {file.stem}\n" in page


def test_the_gallery_has_every_experiment_and_its_times_are_of_experiments():
    names = {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert set(re.findall(r"^## (\w+)$", GENERATED["gallery.md"], re.M)) == names
    assert set(yaml.safe_load((ROOT / "docs" / "times.yaml").read_text())) - {"about"} <= names
    assert "segresearch evaluate experiment=table1" in GENERATED["gallery.md"]
    assert "segresearch evaluate experiment=demo" not in GENERATED["gallery.md"]  # of several tables
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", GENERATED["gallery.md"]):
        assert (ROOT / "docs" / picture).is_file()


def test_the_api_pages_name_modules_that_are_there():
    names = re.findall(r"^::: ([\w.]+)$", "\n".join(GENERATED.values()), re.M)
    assert len(names) > 80 and len(set(names)) == len(names)
    assert "segresearch.guidance.guided_denoiser" in names and "segresearch.checkpoints.load" in names
    for name in names:
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name


def strings() -> str:
    """All texts in the code of the package, with … for the values in them."""
    texts = []
    for file in sorted((ROOT / "segresearch").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_quoted_errors_are_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted, code = re.findall(r"^\*\*`(.+)`\*\*$", page, re.M), strings()
    assert len(quoted) > 15
    for message in quoted:
        parts = [part.strip(" :;()=") for part in message.split("…")]
        for part in (part for part in parts if len(part) > 3):
            assert part in code, f"{message!r}: no {part!r} in the code"


def test_the_readme_fetches_what_the_loader_needs_and_no_other_weights(tmp_path, monkeypatch):
    """The line of the README through hf's own parser, on the files of a repository like SDXL's."""
    from huggingface_hub import constants
    from huggingface_hub.cli import download, hf
    from huggingface_hub.utils import filter_repo_objects

    (line,) = re.findall(r"^hf download (.*)$", (ROOT / "README.md").read_text(), re.M)
    called: dict = {}
    monkeypatch.setattr(download, "snapshot_download", lambda **given: called.update(given) or "folder")
    hf.app.main(["download", *shlex.split(line)], prog_name="hf", standalone_mode=False)
    assert called["ignore_patterns"] is None

    pipeline, folder = make_pipeline(tmp_path / "whole").to(torch.float16), tmp_path / "whole"
    pipeline.save_pretrained(folder, variant="fp16")
    pipeline.to(torch.float32).save_pretrained(folder)
    for other in ("sd_xl_base_1.0.safetensors", "unet/model.onnx", "unet/diffusion_flax_model.msgpack"):
        (folder / other).write_bytes(b"other")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    kept = set(filter_repo_objects(files, allow_patterns=called["allow_patterns"]))
    assert {name for name in kept if not name.endswith((".json", ".txt"))} == {
        name for name in files if name.endswith(".fp16.safetensors")
    }
    cached = tmp_path / f"models--{called['repo_id'].replace('/', '--')}"
    for name in kept:
        (cached / "snapshots" / "abc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, cached / "snapshots" / "abc" / name)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_model("stabilityai/stable-diffusion-xl-base-1.0").encode(["a"])["cond"].context.isfinite().all()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return site


@pytest.mark.slow
def test_the_built_site_is_whole_and_fetches_nothing(built):
    """Every link of every page leads to a file and an anchor; nothing is loaded from elsewhere."""
    pages = {path: path.read_text(encoding="utf-8") for path in built.rglob("*.html")}
    assert len(pages) >= len(nav(config()["nav"]))
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        loaded = re.findall(r'<(?:script|img)[^>]*\bsrc="([^"]+)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"', text)
        assert not [address for pair in loaded for address in pair if address.startswith(("http", "//"))], path
        for target in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            file, _, anchor = unquote(html.unescape(target)).partition("#")
            if re.match(r"\w+:|/", file) or path.name == "404.html":
                continue
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), f"{path.name}: {target}"
            assert not anchor or there.suffix != ".html" or anchor in anchors[there] or anchor == "__codelineno", target


@pytest.mark.slow
def test_the_search_of_the_built_site_needs_no_server(built):
    """Opened as a file, a page takes the index from a script, since it may fetch nothing."""
    assert (built / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    assert 'src="iframe-worker.js"' in (built / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_built_api_pages_have_signatures(built):
    text = (built / "api" / "guidance.html").read_text(encoding="utf-8")
    assert 'id="segresearch.guidance.perturbations.SEG"' in text and "arXiv 2408.00760" in text
