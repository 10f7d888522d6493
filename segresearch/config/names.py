"""Names of settings: renamed ones, and what an unknown one may have meant. Light: imports the errors alone."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from segresearch.errors import ConfigError

RENAMED = {  # keys, groups and experiments by their old names
    "judges": "metrics", "pace": "preset", "window": "interval", "windows": "intervals", "strengths": "scales",
    "draws": "n_bootstrap", "subsets": "n_subsets", "shown": "n_examples", "only": "stage",
    "caption": "text_alignment", "at": "measured_steps",
}  # fmt: skip


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean X?", or "" if nothing in `choices` is like `word`."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def unknown(name: str, siblings: Sequence[str]) -> ConfigError:
    """The error for a setting called `name` (full, with dots) that is none of `siblings`."""
    *_, key = name.split(".")
    if key in RENAMED:
        return ConfigError(f"{name}: now called {RENAMED[key]}")
    here = f" (settings here: {', '.join(siblings)})" if siblings else ""
    return ConfigError(f"{name}: no such setting{nearest(key, siblings)}{here}")


def modern(settings: Any) -> Any:
    """Recorded settings with keys of today, at any depth; `options` are a function's own keywords and stay."""
    if isinstance(settings, Mapping):
        return {RENAMED.get(key, key): item if key == "options" else modern(item) for key, item in settings.items()}
    return [modern(item) for item in settings] if isinstance(settings, list) else settings
