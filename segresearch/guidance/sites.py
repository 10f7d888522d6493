"""Which sites a perturbation acts on: self-attention, or the sites of its own kind.

A selector `where` is one of

    "down" | "mid" | "up"    a group of blocks
    "up.0"  "up.0.2.9"       the group, then the leading index numbers of the site's name: 0, 2, 9 for
                             up_blocks.0.attentions.2.transformer_blocks.9.attn1, and 0, 3 for
                             mid_block.attentions.0.transformer_blocks.3.attn1
    "*transformer_blocks.3*" a glob over full site names (case matters; a full name matches itself; "*" is every site)
    7                        the site's number among those of its kind in a forward pass (of self-attention
                             `unet.sites[7]`; negative counts from the end)
    ["mid", "up.0.0", -1]    a list or tuple: the union

Index numbers are compared as whole numbers, so "down.1" never takes in block 10.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from segresearch.errors import InputError
from segresearch.fields import Whole

Where = str | Whole | Sequence[str | Whole]
NOUNS = {"self": "self-attention site", "cross": "cross-attention site", "block": "transformer block",
         "ff": "feed-forward", "embedding": "embedding"}  # fmt: skip


def _matches(where: str | int, sites: Sequence[str]) -> list[str]:
    if isinstance(where, int):
        return [sites[where]] if -len(sites) <= where < len(sites) else []
    if re.fullmatch(r"(down|mid|up)(\.\d+)*", where):
        group, *numbers = where.split(".")
        wanted = [int(n) for n in numbers]
        inside = [site for site in sites if site.startswith((f"{group}_block.", f"{group}_blocks."))]
        return [site for site in inside if [int(n) for n in re.findall(r"\.(\d+)", site)][: len(wanted)] == wanted]
    return [site for site in sites if fnmatchcase(site, where)]


def select_sites(where: Where, sites: Sequence[str], kind: str = "self") -> tuple[str, ...]:
    """The sites that `where` (see the module) names, in the order of `sites`, all of one `kind` (`attention.KINDS`).

    Raises ValueError, listing real site names, if any part of `where` matches nothing.
    """
    parts = [where] if isinstance(where, str | int) else list(where)
    if not parts:
        raise InputError(f"where={where!r}: empty; name a group ({_groups(sites)}), or leave the method out")
    chosen: set[str] = set()
    for part in parts:
        matches = _matches(part, sites)
        if not matches:
            raise InputError(
                f"where={where!r}: {part!r} matches no {NOUNS[kind]} of this model; use a group ({_groups(sites)}), "
                f'a block ("up.0.2"), an index or a glob over: {_listing(sites)}'
            )
        chosen.update(matches)
    return tuple(site for site in sites if site in chosen)


def _groups(sites: Sequence[str]) -> str:
    """The groups of blocks that have such sites."""
    return ", ".join(g for g in ("down", "mid", "up") if any(site.startswith(f"{g}_block") for site in sites)) or "none"


def _listing(sites: Sequence[str]) -> str:
    """All names, or of a long list both ends of every group."""
    if len(sites) <= 12:
        return ", ".join(sites) or "(it has none)"
    groups = [[s for s in sites if s.startswith(g)] for g in ("down", "mid", "up")]
    return ", ".join(g[0] if len(g) == 1 else f"{g[0]} … {g[-1]} ({len(g)})" for g in groups if g)


def check_heads(heads: Sequence[int] | None, count: int, site: str) -> None:
    """ValueError unless every index in `heads` is one of the `count` heads of `site`."""
    wrong = [h for h in heads or () if not 0 <= h < count]
    if wrong:
        raise InputError(f"heads={list(heads or ())}: no head {wrong[0]} at {site}, which has heads 0 to {count - 1}")
