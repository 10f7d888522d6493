"""YAML files of unknown origin: refused where reading them could take for ever. Light: no torch."""

from pathlib import Path

import yaml
from yaml.reader import ReaderError

from segresearch.errors import ConfigError

BYTES, LEVELS, ALIASES = 1 << 20, 50, 100  # the most that a config may have


def check_yaml(path: Path) -> None:
    """ConfigError for a file that is too large, nested too deep, of too many aliases (each repeats a whole node), or
    not UTF-8 text. yaml's own error for what is no YAML."""
    try:
        size = path.stat().st_size
        if size > BYTES:
            raise ConfigError(f"{path}: {size:,} bytes; a config has at most {BYTES:,}")
        depth = aliases = 0
        with path.open(encoding="utf-8") as file:
            for event in yaml.parse(file, Loader=yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                aliases += isinstance(event, yaml.AliasEvent)
                if depth > LEVELS or aliases > ALIASES:
                    text = f"nested in more than {LEVELS} levels" if depth > LEVELS else f"more than {ALIASES} aliases"
                    raise ConfigError(f"{path}, line {event.start_mark.line + 1}: {text}")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, ReaderError) as error:
        raise ConfigError(f"{path}: not UTF-8 text, or a character that YAML does not allow") from error
