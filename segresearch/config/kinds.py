"""The kinds of guidance methods that a config can name, and where their classes are. Light: no torch."""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from segresearch.config.validate import of_guidance

PERTURBATIONS = {  # of attention, blocks, feed-forwards, the embedding of t; views; other networks
    "seg": "perturbations.SEG", "pag": "perturbations.PAG",
    "soft_pag": "methods.soft_pag.SoftPAG", "temperature": "methods.temperature.AttentionTemperature",
    "erg": "methods.erg.ERG", "asag": "methods.asag.ASAG", "emag": "methods.emag.EMAG",
    "blurred_map": "methods.map_ablations.BlurredMap", "dropped_map": "methods.map_ablations.DroppedMap",
    "noisy_map": "methods.map_ablations.NoisyMap", "nag": "methods.nag.NAG", "pladis": "methods.pladis.PLADIS",
    "tpg": "methods.tpg.TPG", "ssg": "methods.ssg.SSG", "slg": "methods.slg.SLG",
    "s2": "methods.s2_guidance.S2", "tsg": "methods.tsg.TSG",
    "self_guidance": "methods.self_guidance.SelfGuidance", "swg": "methods.swg.SWG", "weak": "methods.weak.Weak",
}  # fmt: skip
SHAPES = {  # of terms
    "apg": "methods.apg.APG", "cfg_zero": "methods.cfg_zero.CFGZero", "tcfg": "methods.tcfg.TCFG",
    "fdg": "methods.fdg.FDG", "mambo": "methods.mambo.MamboG", "adg": "methods.adg.ADG", "mimic": "methods.mimic.Mimic",
    "smc": "methods.smc.SMC", "perp_neg": "methods.perp_neg.PerpNeg",
    "adaptive_stop": "methods.adaptive_stop.AdaptiveStop", "sg_prev": "methods.sg_prev.SGPrev",
    "swg_mask": "methods.swg.Overlap",
}  # fmt: skip
POSTS = {
    "projected": "postprocess.Projected", "rescale": "methods.rescaled.Rescale",
    "threshold": "methods.thresholding.Threshold", "tag": "methods.tag.TAG", "tsr": "methods.tsr.TSR",
    "momentum": "methods.momentum.Momentum", "higs": "methods.higs.HiGS",
}  # fmt: skip
SCALES = {"ramp": "terms.Ramp", "schedule": "methods.weight_schedules.Schedule", "cfg++": "methods.cfgpp.PlusPlus"}
CONDITIONINGS = {  # made from others, or from texts
    "cdg": "methods.cdg.CDG", "icg": "methods.icg.ICG", "icg_text": "methods.icg_text.ICGText",
    "cads": "methods.cads.CADS", "erg_text": "methods.erg_text.ERGText", "prompt": "methods.prompt.Prompt",
    "image_size": "methods.image_size.ImageSize",
}  # fmt: skip


def kind_of(value: Any, default: str = "") -> str:
    """The kind that a mapping or an object names."""
    kind = value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", default)
    return str(kind)


def one_of_kinds(kinds: Mapping[str, str], *others: Any, default: str = "") -> Any:
    """The type of a value of any of these kinds; others: further tagged types. default: the kind of a value without."""
    members = [*(Annotated[Any, of_guidance(path), Tag(kind)] for kind, path in kinds.items()), *others]
    return Annotated[reduce(or_, members), Discriminator(lambda value: kind_of(value, default))]
