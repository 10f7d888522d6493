"""How a method looks, on every page and in every figure: a colour for its family, a mark within it. Light: no torch.

It follows from what the method does, not from its label, its scale or the run. The colours are those of Okabe and Ito
without yellow and black, with a dark grey for no guidance and a violet; any two of them are told apart under each kind
of colour blindness, and no two methods of this package share colour and mark.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

FAMILIES = {  # colour; what it does, and its methods in the order of MARKS
    "#454a52": ("no guidance", "none"),
    "#0072b2": ("blurs attention", "seg seg_k seg_qk seg++ blurred_map emag"),
    "#d55e00": ("replaces attention maps", "pag soft_pag temperature erg asag dropped_map noisy_map"),
    "#009e73": ("changes the input", "sag swg m_swg"),
    "#cc79a7": ("changes tokens or blocks", "slg stg tpg ssg s2"),
    "#56b4e9": ("other network, time or conditioning",
                "weak tsg self_guidance sg_prev icg icg_text cdg erg_text image_size prompt cads"),
    "#e69f00": ("classifier-free guidance",
                "cfg apg cfg_zero tcfg fdg mambo adg mimic smc perp_neg adaptive_stop cfg++ schedule"),
    "#8c2fd8": ("acts on every branch or after the sum, or is your own",
                "nag pladis rescale projected threshold tag tsr momentum higs zigzag image"),
}  # fmt: skip
MARKS = {  # of matplotlib, and as a character
    "o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★", "p": "⬟", "h": "⬢", "<": "◀",
    ">": "▶", "8": "⬣", "d": "♦",
}  # fmt: skip


class Look(NamedTuple):
    """color: "#rrggbb". mark: of matplotlib. family: what methods of this colour do, in words."""

    color: str
    mark: str
    family: str

    @property
    def sign(self) -> str:
        """The mark as a character."""
        return MARKS[self.mark]


def _looks() -> Iterator[tuple[str, Look]]:
    for color, (family, methods) in FAMILIES.items():
        for method, mark in zip(methods.split(), MARKS, strict=False):
            yield method, Look(color, mark, family)


LOOKS = dict(_looks())
OWN = list(FAMILIES)[-1]


def look(guidance: Any) -> Look:
    """Of a GuidanceConfig, or of a method's key. A method of your own has a mark by its name."""
    key = guidance if isinstance(guidance, str) else key_of(guidance)
    if key in LOOKS:
        return LOOKS[key]
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return Look(OWN, list(MARKS)[number % len(MARKS)], FAMILIES[OWN][0])


def key_of(guidance: Any) -> str:
    """What acts, by its kind: the perturbed term before SAG, that before other differences, and CFG last."""
    terms = dict(guidance.terms)
    perturbed = [(name, term) for name, term in terms.items() if getattr(term, "perturbation", None) is not None]
    perturbed.sort(key=lambda item: _kind(item[1].perturbation) != "seg")
    if perturbed:
        return _perturbed(*perturbed[0])
    if guidance.sag is not None:
        return "sag"
    if guidance.zigzag is not None:
        return "zigzag"
    for name, term in terms.items():
        if term.kind == "difference":
            return _kind(term.shape) or _made(guidance, (term.neg, term.pos)) or name
        if (made := _made(guidance, (term.neg, term.pos))) and made != "prompt":
            return made
    others: Iterable[Any] = (
        *(_kind(term.shape) for term in terms.values()),
        *(_kind(entry.perturbation) for entry in guidance.every.values()),
        *map(_kind, guidance.post.values()),
        "rescale" * bool(guidance.rescale), "apg" * (guidance.apg is not None),
        *(_kind(getattr(term, "weight", None)) for term in terms.values()),
        "image" * (guidance.ip_adapter is not None), "cfg" * bool(terms),
    )  # fmt: skip
    return next(filter(None, others), "none")


def _perturbed(name: str, term: Any) -> str:
    perturbation, kind = term.perturbation, _kind(term.perturbation)
    if kind == "custom":
        return str(getattr(perturbation, "target", name))
    if kind == "seg":
        plain = "seg" if perturbation.on == "q" else f"seg_{perturbation.on}"
        return "seg++" if _kind(term.scale) == "cfg++" else plain
    if kind == "slg" and tuple(perturbation.layers) == ("attn1",):
        return "stg"
    return "m_swg" if kind == "swg" and term.shape is not None else kind or name


def _kind(value: Any) -> str:
    first = value[0] if isinstance(value, tuple) and value else value
    return str(getattr(first, "kind", ""))


def _made(guidance: Any, names: Iterable[str]) -> str:
    """The kind of the conditioning of one of these names that is made, or of one in the place of cond or uncond."""
    return next((_kind(guidance.conditionings[name]) for name in names if name in guidance.conditionings), "")


def line(guidance: Any) -> dict[str, Any]:
    """How a line of the method is drawn; a narrower blur of SEG is paler, so that lines of one figure differ."""
    color, mark, _ = look(guidance)
    perturbations: list[Any] = [getattr(term, "perturbation", None) for term in guidance.terms.values()]
    sigma = min((p.sigma for p in perturbations if _kind(p) == "seg" and not isinstance(p, tuple)), default=math.inf)
    return {"color": color, "marker": mark, "alpha": 1.0 if math.isinf(sigma) else 0.45 + 0.5 * sigma / (1 + sigma)}
