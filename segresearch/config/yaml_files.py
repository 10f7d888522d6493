"""YAML files of unknown origin: refused where reading them could take for ever. Light: no torch."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from segresearch.errors import ConfigError

BYTES, LEVELS, NODES, DIGITS = 1 << 20, 50, 20_000, 30  # the most that a config may have; digits: of a number


def check_yaml(path: Path) -> None:
    """ConfigError for a file that is too large, nested too deep or not UTF-8 text, for more than NODES nodes with what
    aliases stand for, and for a header or a list of defaults that is none. yaml's own error for what is no YAML."""
    try:
        size = path.stat().st_size
        if size > BYTES:
            raise ConfigError(f"{path}: {size:,} bytes; a config has at most {BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > LEVELS:
                line = event.start_mark.line + 1
                raise ConfigError(f"{path}, line {line}: nested in more than {LEVELS} levels")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, ReaderError) as error:
        raise ConfigError(f"{path}: not UTF-8 text, or a character that YAML does not allow") from error
    except yaml.MarkedYAMLError as error:
        if error.problem_mark is not None:
            error.problem_mark.name = str(path)
        raise
    if (count := _nodes(root, {}, path)) > NODES:
        raise ConfigError(f"{path}: its aliases stand for {count:,} nodes; a config has at most {NODES:,}")
    if re.search(r"^# *@package *$", text, re.M):
        raise ConfigError(f"{path}: `# @package` without a name; experiments need `# @package _global_`")
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if key.value == "defaults":
                _check_defaults(value, path)


def _nodes(node: Any, counts: dict[int, int], path: Path) -> int:
    """How many nodes a node is, with what its aliases stand for. counts: of nodes by identity, 0 while one is counted.
    """
    if id(node) in counts:
        if not counts[id(node)]:
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: an alias of a node within that node")
        return counts[id(node)]
    counts[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and len(node.value) > DIGITS:
        raise ConfigError(f"{path}, line {node.start_mark.line + 1}: a number of {len(node.value):,} digits")
    below = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
    counts[id(node)] = 1 + sum(_nodes(part, counts, path) for part in below)
    return counts[id(node)]


def _check_defaults(node: Any, path: Path) -> None:
    items = node.value if isinstance(node, yaml.SequenceNode) else [None]
    pairs = [item.value for item in items if isinstance(item, yaml.MappingNode)]
    texts = [item for item in items if isinstance(item, yaml.ScalarNode) and item.tag.endswith(":str")]
    if len(pairs) + len(texts) < len(items) or any(len(pair) != 1 for pair in pairs):
        raise ConfigError(f"{path}: defaults: not a list of names and of `group: name`")
