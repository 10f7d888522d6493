"""The gallery: every experiment of conf/experiment with its commands, what it shows, its time and its picture."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

from segresearch.config.help import fits

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HEAD = """# Gallery of experiments

Every file of `conf/experiment`, on `mini`. Each command works in an installed package as written. In the repository
`python experiments/generate.py experiment=demo` does the same as `segresearch generate experiment=demo`.
"""


def about(file: Path) -> str:
    """The comment at the top of a config, without the commands in it."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "#   ")):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def pictures(name: str) -> list[str]:
    """The pictures of docs/ that show an experiment, by their names."""
    found = [path for folder in (DOCS, DOCS / "effects") for path in sorted(folder.glob("*.png"))
             if path.stem == name or name == "control" and path.stem.startswith("control-")]  # fmt: skip
    return [path.relative_to(DOCS).as_posix() for path in found]


def size(config: dict[str, Any]) -> str:
    """How many methods, or tables of them, an experiment has, where its file says so."""
    if panels := config.get("panels"):
        return f"{len(panels)} tables"
    return f"{len(config['compare'])} methods" if config.get("compare") else ""


def commands(file: Path) -> list[str]:
    """The commands that an experiment fits. An image grid of several tables is generate's alone."""
    calls = [f"segresearch generate experiment={file.stem}"]
    if fits(file, "evaluate"):
        calls.append(f"segresearch evaluate experiment={file.stem} preset=quick images=500")
    return calls


def section(file: Path, times: dict[str, Any]) -> str:
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    title = re.sub(r"\$\{.*?\}", "…", str((config.get("grid") or {}).get("title") or file.stem))
    facts = [fact for fact in (size(config), times.get(file.stem)) if fact]
    parts = [f"## {file.stem}", f"**{title}.** {about(file)}", "```sh\n" + "\n".join(commands(file)) + "\n```"]
    if facts:
        parts.append("; ".join(facts) + ".")
    parts += [f"![{title}]({picture})" for picture in pictures(file.stem)[:2]]
    return "\n\n".join(parts)


def page() -> str:
    times = yaml.safe_load((DOCS / "times.yaml").read_text(encoding="utf-8"))
    files = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
    head = f"{HEAD}\n{times.pop('about')}\n"
    return "\n\n".join([head, *(section(file, times) for file in files)]) + "\n"


def pages() -> Iterator[tuple[str, str]]:
    yield "gallery.md", page()


def on_files(files: Files, config: Any) -> Files:
    for place, text in pages():
        files.append(File.generated(config, place, content=text))
    return files
