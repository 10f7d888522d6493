"""The API pages: what each package exports, from its docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "segresearch"
EXPORTS = {  # packages that name their public objects, and further modules that the docs speak of
    "guidance": ("step",), "models": ("attention", "conditioning", "denoiser", "controlnet", "compute"),
    "sampling": ("memory", "draws"),
}  # fmt: skip
WHOLE = ("checkpoints", "analysis", "metrics", "evaluation", "control_images", "scenes", "config")  # every module
TITLES = {"control_images": "Control images", "config": "Config"}


def documented(module: Path) -> bool:
    """Whether the module has a public function or class with a docstring."""
    nodes = ast.parse(module.read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(n, kinds) and not n.name.startswith("_") and ast.get_docstring(n) for n in nodes)


def first_sentence(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def block(name: str, level: int = 2, **options: Any) -> str:
    lines = [f"::: segresearch.{name}", "    options:", f"      heading_level: {level}"]
    return "\n".join([*lines, *(f"      {key}: {value}" for key, value in options.items())])


def package_page(package: str) -> str:
    """The exports of a package by the modules that they are in, then further modules."""
    title = TITLES.get(package, package.capitalize())
    parts = [f"# {title}\n\n`segresearch.{package}`: {first_sentence(PACKAGE / package / '__init__.py')}"]
    if package in EXPORTS:
        parts.append(f"Everything up to `segresearch.{package}.{EXPORTS[package][0]}` is imported from the package.")
        parts += [block(home, members=f"[{', '.join(names)}]") for home, names in exports(package).items()]
        parts += [block(f"{package}.{module}") for module in EXPORTS[package]]
    for module in sorted((PACKAGE / package).glob("*.py")):
        elsewhere = any(f"{package}.{module.stem}" in exports(other) for other in EXPORTS)
        if package in WHOLE and documented(module) and not elsewhere:
            parts.append(block(f"{package}.{module.stem}"))
    return "\n\n".join(parts) + "\n"


def exports(package: str) -> dict[str, list[str]]:
    """The names of `__all__` of a package, by the modules that it imports them from."""
    nodes = list(ast.walk(ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))))
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    (names,) = (ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "__all__")
    homes: dict[str, list[str]] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("segresearch."):
            if own := [alias.name for alias in node.names if alias.name in names]:
                homes.setdefault(str(node.module).removeprefix("segresearch."), []).extend(own)
    return homes


def methods_page() -> str:
    head = "`segresearch.guidance.methods`: one module a method. Formulas, published defaults and deviations are in"
    parts = ["# Methods", f"{head} [methods](../methods.md)."]
    parts += [block(f"guidance.methods.{module.stem}") for module in sorted((PACKAGE / "guidance/methods").glob("*.py"))
              if documented(module)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def index_page() -> str:
    rows = [f"| [`segresearch.{name}`]({name}.md) | {first_sentence(PACKAGE / name / '__init__.py')} |"
            for name in ("guidance", "models", "sampling", *WHOLE)]  # fmt: skip
    methods = "| [`segresearch.guidance.methods`](methods.md) | One module a method |"
    head = ("Made from the docstrings. Shapes have named axes, as jaxtyping writes them, which the tests execute: "
            '`Float[Tensor, "b c h w"]`. The errors below are a user\'s; everything else is a defect.')  # fmt: skip
    table = "\n".join(["| package | holds |", "|---|---|", rows[0], methods, *rows[1:]])
    return f"# API\n\n{head}\n\n{table}\n\n{block('errors')}\n"


def pages() -> Iterator[tuple[str, str]]:
    yield "api/index.md", index_page()
    yield "api/methods.md", methods_page()
    for package in (*EXPORTS, *WHOLE):
        yield f"api/{package}.md", package_page(package)


def on_files(files: Files, config: Any) -> Files:
    for place, text in pages():
        files.append(File.generated(config, place, content=text))
    return files
