"""The numbers of arXiv 2408.00760, to compare a run of the same methods with. Light: no torch.

Both tables are of SDXL: 30,000 images, FID against the validation set of MS-COCO 2014, LPIPS to the vanilla image of
the same seed; SAG by DDIM, the others by Euler.
"""

import math
from collections.abc import Mapping, Sequence

from segresearch.config.method import GuidanceConfig, PerturbedTerm
from segresearch.errors import ConfigError

Key = str | float  # "vanilla", "SAG", "PAG", or SEG's sigma
HEADS = {"fid": "FID", "clip": "CLIP", "vgg": "LPIPS vgg", "alex": "LPIPS alex"}
TABLES: dict[str, dict[Key, dict[str, float]]] = {
    "table1": {
        "vanilla": {"fid": 129.496},
        "SAG": {"fid": 106.683, "vgg": 0.706, "alex": 0.644},
        "PAG": {"fid": 105.271, "vgg": 0.542, "alex": 0.472},
        10.0: {"fid": 95.316, "vgg": 0.522, "alex": 0.454},
        math.inf: {"fid": 88.215, "vgg": 0.536, "alex": 0.472},
    },
    "table2": {
        "vanilla": {"fid": 53.423, "clip": 0.271},
        1.0: {"fid": 48.284, "clip": 0.273, "vgg": 0.361, "alex": 0.295},
        2.0: {"fid": 41.784, "clip": 0.278, "vgg": 0.410, "alex": 0.347},
        5.0: {"fid": 33.819, "clip": 0.285, "vgg": 0.449, "alex": 0.390},
        10.0: {"fid": 29.325, "clip": 0.290, "vgg": 0.472, "alex": 0.416},
        math.inf: {"fid": 26.169, "clip": 0.292, "vgg": 0.493, "alex": 0.440},
    },
}


def key(guidance: GuidanceConfig) -> Key | None:
    """Which line of a table a method is; None for none: two methods at once, SEG or PAG with any other setting than the
    paper's, an interval in sigma, a post-processor."""
    from segresearch.guidance import PAG, SEG

    terms = list(guidance.terms.values())
    match terms, guidance.sag:
        case _ if guidance.every or guidance.conditionings or guidance.networks or guidance.post:
            return None
        case _ if GuidanceConfig(label=guidance.label, terms=guidance.terms, sag=guidance.sag) != guidance:
            return None
        case [], sag:
            return "vanilla" if sag is None else "SAG"
        case [PerturbedTerm(perturbation=PAG() as pag, interval=None, shape=None)], None if pag == PAG():
            return "PAG"
        case [PerturbedTerm(perturbation=SEG() as seg, interval=None, shape=None)], None if seg == SEG(seg.sigma):
            return seg.sigma or "vanilla"
    return None


def table_for(paper: str, name: str, methods: Mapping[str, GuidanceConfig], prompts: Sequence[str]) -> str | None:
    """Which table of the paper to compare with, if any: `paper`, or with "auto" the one that the run is named after.

    ConfigError if its methods or prompts do not match.
    """
    table = name if paper == "auto" and name in TABLES else paper
    if table not in TABLES:
        return None
    hint = "set paper=none" + (", or another name" if paper == "auto" else "")
    texts = sum(map(bool, prompts))
    if table == "table1" and texts:
        raise ConfigError(f"paper: table1 is of images without a prompt, and here are {texts}; {hint}")
    if table == "table2" and texts < len(prompts):
        raise ConfigError(f"paper: table2 is of images with prompts, and {len(prompts) - texts} here are empty; {hint}")
    if not any(key(guidance) in TABLES[table] for guidance in methods.values()):
        lines = ", ".join(k if isinstance(k, str) else f"SEG σ={k:g}" for k in TABLES[table])
        raise ConfigError(f"paper: {table} has none of these methods, but {lines}; {hint}")
    return table


def numbers(table: str | None, guidance: GuidanceConfig) -> dict[str, float | None]:
    """The paper's numbers of a method by column, in the order of HEADS; None where it has none."""
    lines = TABLES.get(table or "", {})
    line = lines.get(key(guidance) or "", {})
    return {column: line.get(column) for column in HEADS if any(column in other for other in lines.values())}
