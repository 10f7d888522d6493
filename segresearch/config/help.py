"""The --help text of a run command: its groups with what each choice is, and every key with its comment in conf/.

Hydra prints a template of its own; this fills it with what that command takes, under the name it was called by.
"""

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segresearch.config.compose import conf_dir

WIDTH = 24  # letters of a key, then its meaning
COMMENTED = {"model": "sdxl", "sampler": "euler", "schedule": "karras"}  # groups, and the file that explains their keys


def fill(config: Any, name: str) -> None:
    """Replace the groups and settings in the help template of a composed config. name: of its file in conf/."""
    node = OmegaConf.select(config, "hydra.help")
    if node is None or "$APP_CONFIG_GROUPS" not in str(node.template):
        return
    text = str(node.template)
    if sys.argv[0].endswith(f"segresearch {name}"):
        text = re.sub(r"python experiments/(\w+)\.py", r"segresearch \1", text)
    text = text.replace("$APP_CONFIG_GROUPS", groups(name))
    text = text.replace("$CONFIG", f"{settings(name)}\nAs composed now:\n\n$CONFIG")
    OmegaConf.update(config, "hydra.help.template", text, force_add=True)


def groups(name: str) -> str:
    """Every group of a command with its choices; experiments each with its first line."""
    lines = []
    for entry in OmegaConf.load(conf_dir() / f"{name}.yaml").defaults:  # type: ignore[union-attr]
        group = str(next(iter(entry.keys()))) if isinstance(entry, DictConfig) else "_self_"
        folder = conf_dir() / group
        if not folder.is_dir():
            continue
        files = [file for file in sorted(folder.glob("*.yaml")) if fits(file, name)]
        if group == "experiment":
            lines.append("experiment:")
            lines += [f"  {file.stem:17} {about(file)}" for file in files]
        else:
            lines += _wrapped(f"{group}: ", [file.stem for file in files])
    return "\n".join(f"  {line}" for line in lines) + "\n"


def fits(experiment: Path, name: str) -> bool:
    """Whether a file of the group experiment suits a command: several panels are generate's alone."""
    return experiment.parent.name != "experiment" or name == "generate" or "panels" not in OmegaConf.load(experiment)


def about(file: Path) -> str:
    """The first sentence of the comment at the top of a config, or its first words."""
    text = " ".join(re.findall(r"^# (?!@)(.*)$", file.read_text(encoding="utf-8").partition("\n\n")[0], re.M))
    return textwrap.shorten(re.split(r"(?<=[a-z])\. (?=[A-Z])|\.$", text)[0], 105, placeholder=" ...")


def meanings(name: str) -> dict[str, str]:
    """Every key of conf/`name`.yaml that has a comment there, with the comment."""
    return comments_of((conf_dir() / f"{name}.yaml").read_text(encoding="utf-8").partition("\nhydra:")[0])


def comments_of(text: str) -> dict[str, str]:
    """Every key of a config that has a comment beside it, with the comment."""
    keys: list[str] = []
    comments: dict[str, str] = {}
    for line in text.splitlines():
        if not (parts := re.match(r"( *)(\w+):(?: +[^#]*| *)(?:# (.*))?$", line)):
            continue
        indent, key, meaning = len(parts[1]), parts[2], parts[3]
        keys = [*keys[: indent // 2], key]
        if meaning and keys[0] != "defaults":
            comments[".".join(keys)] = meaning
    return comments


def settings(name: str) -> str:
    """Every key of conf/`name`.yaml with its comment there, and those of the groups in COMMENTED."""
    comments = meanings(name)
    for group, choice in COMMENTED.items():
        text = (conf_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8")
        comments |= {f"{group}.{key}": meaning for key, meaning in comments_of(text).items() if "." not in key}
    return "\n".join(f"  {key:{WIDTH}} {meaning}" for key, meaning in comments.items()) + "\n"


def _wrapped(head: str, words: list[str], width: int = 110) -> list[str]:
    lines = [head]
    for i, word in enumerate(words):
        piece = word + (", " if i + 1 < len(words) else "")
        if len(lines[-1]) + len(piece) > width:
            lines[-1] = lines[-1].rstrip()
            lines.append(" " * 4)
        lines[-1] += piece
    return lines

