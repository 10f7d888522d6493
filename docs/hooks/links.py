"""Pages of the repository outside docs/ on the site, and links that lead to the same place on a code host and here."""

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
MOUNTED = {  # a page of the repository -> its place on the site
    "README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "measured.md", "experiments/mini/README.md": "training-mini.md",
    "segresearch/weights/mini/README.md": "model-card.md",
}  # fmt: skip
HOMES = {place: page for page, place in MOUNTED.items()}
LINK = re.compile(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.S | re.M)


def place_of(path: str) -> str:
    """Where on the site a file of the repository is: a page, a file of docs/, or a copy under files/."""
    return MOUNTED.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def rewritten(text: str, home: str, change: Callable[[str], str]) -> str:
    """The Markdown of `home` with `change` of each linked path of the repository; code and web addresses stay."""

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[2].partition("#")
        if re.match(r"\w+:", match[2]) or not path:
            return match[0]
        return match[1] + change(normpath(PurePosixPath(home).parent / path)) + mark + anchor + match[3]

    codes: list[str] = []
    hidden = CODE.sub(lambda code: f"\0{(codes.append(code[0]), len(codes) - 1)[1]}\0", text)
    return re.sub(r"\0(\d+)\0", lambda place: codes[int(place[1])], LINK.sub(link, hidden))


def targets(text: str, home: str) -> Iterator[str]:
    """The paths of the repository that the Markdown of `home` links to."""
    paths: list[str] = []
    rewritten(text, home, lambda path: paths.append(path) or path)  # type: ignore[func-returns-value]
    yield from paths


def on_files(files: Files, config: Any) -> Files:
    for page, place in MOUNTED.items():
        files.append(File.generated(config, place, content=(ROOT / page).read_text(encoding="utf-8")))
    for file in [file for file in files if file.src_uri.endswith(".md")]:
        home = HOMES.get(file.src_uri, f"docs/{file.src_uri}")
        for path in targets(file.content_string, home):
            if path.startswith("docs/") or path in MOUNTED or files.get_file_from_path(place_of(path)):
                continue  # those that are not there are MkDocs' to report
            if not (ROOT / path).is_file():
                raise PluginError(f"{home} links to {path}, which is no file of the repository")
            files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    if place == "index.md":
        page.meta["hide"] = ["navigation"]  # the front page has tabs above it
    home, folder = HOMES.get(place, f"docs/{place}"), str(PurePosixPath(place).parent)
    return rewritten(markdown, home, lambda path: relpath(place_of(path), folder))


def on_page_content(text: str, page: Any, **_: Any) -> str:
    """Pictures open at their own size; a pipe in the code of a table, which Markdown escapes, is one."""
    text = re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace(r"\|", "|"), text)
    return re.sub(r'(?<!">)<img [^>]*?src="([^"]+)"[^>]*>', lambda i: f'<a href="{html.escape(i[1])}">{i[0]}</a>', text)
