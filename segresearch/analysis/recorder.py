"""Recording what the softmax saw: q and k (v on request) per branch, site, head and sigma, under the perturbation.

    recorder = Recorder(sd.unet.site_heads, where="mid", steps=[0, 12, 24])
    sample(model, noise, conds=conds, attend=recorder.attend([{"prompt": "a red cube", "seed": 0}]))
    for entry in recorder.recording.select(branch="cond~seg"):
        entry.site, entry.sigma, entry.q, entry.k

`recorder.attend(...)` is an ordinary attention for the `attend` argument of a call: the innermost one, in which every
perturbation ends. No output bit changes.

Rows that branches share up to the first perturbed site are computed, and stored, once, under all their names. A
perturbation that computes no attention (PAG) leaves no entry of its branch at its sites. SAG's second forward is
recorded as branch "<base>~sag". In memory `limit` bounds what is kept; streamed to a folder, one call at a time is.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from segresearch.errors import InputError
from segresearch.guidance.sites import Where, check_heads, select_sites
from segresearch.models.attention import Attend, Heads, Site, sdpa
from segresearch.runs import plain, replacing

INDEX = "index.jsonl"
LARGEST = 1 << 28  # bytes of an index
KINDS = {  # of a line of the index, each value's type and that of what it holds
    "site": (str, str), "grid": (list, int), "branches": (list, str), "step": (int, int), "sigma": (list, int | float),
    "images": (list, dict), "heads": (list, int), "file": (str, str),
}  # fmt: skip
Image = Mapping[str, Any]  # its prompt and seed
Images = Sequence[Image]


@dataclass(frozen=True)
class Entry:
    """One attention call of one branch. Its tensors are read from disk at each access.

    site, grid: where. branches: whose rows these are; several names where the branches are still equal.
    step: which evaluation of the model in its run, from 0 (the sampling step, for samplers of one evaluation a step).
    sigma: noise level of each row. images: one label a row. heads: the head numbers that are kept.
    """

    site: str
    grid: tuple[int, int]
    branches: tuple[str, ...]
    step: int
    sigma: tuple[float, ...]
    images: tuple[Image, ...]
    heads: tuple[int, ...]
    load: Callable[[], Mapping[str, Tensor]] = field(repr=False, compare=False)

    @property
    def q(self) -> Heads:
        """The queries that the softmax saw, blurred where the branch blurs them."""
        return self.load()["q"]

    @property
    def k(self) -> Heads:
        """The keys that the softmax saw."""
        return self.load()["k"]

    @property
    def v(self) -> Heads:
        """The values. InputError where they were not recorded."""
        if "v" not in (tensors := self.load()):
            raise InputError("the values were not recorded; record with Recorder(..., values=True)")
        return tensors["v"]


class Recording(tuple[Entry, ...]):
    """Entries in the order they were made; `select` narrows them."""

    @classmethod
    def open(cls, folder: str | Path) -> "Recording":
        """What a recorder streamed into `folder`; no tensor is read yet. InputError where there is no recording, or its
        index is not one."""
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise InputError(f"{folder} holds no recording (no {INDEX})")
        return cls(_entry(facts, folder) for facts in _read_index(folder / INDEX))

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names, in the order of a forward pass."""
        return tuple(dict.fromkeys(entry.site for entry in self))

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of all branches, such as "cond", "uncond", "cond~seg"."""
        return tuple(dict.fromkeys(name for entry in self for name in entry.branches))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps recorded, rising."""
        return tuple(sorted({entry.step for entry in self}))

    def select(self, site: Where = "*", branch: str | None = None, step: int | None = None) -> "Recording":
        """The entries of these sites (a selector), this branch, this step. ValueError where there is none."""
        sites = select_sites(site, self.sites)
        for name, value, known in (("branch", branch, self.branches), ("step", step, self.steps)):
            if value is not None and value not in known:
                raise InputError(f"{name}={value!r} was not recorded; there are {', '.join(map(str, known))}")
        entries = (e for e in self if branch in (None, *e.branches) and step in (None, e.step))
        return Recording(entry for entry in entries if entry.site in sites)


@dataclass
class Recorder:
    """Keeps q and k (v too with `values`) in memory or, with `folder`, in one safetensors file a call and an index.

    Raises ValueError for a selector without a match, a head that does not exist, a folder that holds a recording.
    """

    sites: Mapping[str, int]  # the model's, with their numbers of heads (`unet.site_heads`); then those kept
    where: Where = "*"  # the sites kept, see `segresearch.guidance.sites`
    heads: Sequence[int] | None = None  # those kept; None is all
    steps: Sequence[int] | None = None  # the evaluations kept, counted from 0 in each run; None is all
    branches: Sequence[str] | None = None  # those kept; None is all
    values: bool = False  # whether v is kept too
    folder: str | Path | None = None  # where to stream to; it must not hold a recording yet
    limit: int = 1 << 30  # bytes that may be held in memory; not read with `folder`
    bytes: int = field(default=0, init=False)
    entries: list[Entry] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.sites = {site: self.sites[site] for site in select_sites(self.where, tuple(self.sites))}
        for site, count in self.sites.items():
            check_heads(self.heads, count, site)
        if self.folder is not None:
            self.folder = Path(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / INDEX).exists():
                raise InputError(f"{self.folder} holds a recording already; name another folder, or remove it")
            (self.folder / INDEX).touch()

    @property
    def recording(self) -> Recording:
        """What was recorded so far."""
        return Recording(self.entries)

    def attend(self, images: Images, attend: Attend = sdpa) -> Attend:
        """The `attend` argument for one `sample()`, with a label for each image. Steps are counted from 0.

        attend: the attention that is computed. A new step begins where `Site.sigma` is another tensor object.
        """
        labels, step, last = tuple(plain(dict(image)) for image in images), -1, None

        def record(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
            nonlocal step, last
            if site.sigma is None:
                raise InputError(f"record: no branches at {site.name}; hand this attention to a GuidedDenoiser")
            if site.sigma is not last:
                step, last = step + 1, site.sigma
                if len(site.sigma) != len(labels):
                    raise InputError(f"record: {len(labels)} labels for {len(site.sigma)} images; give one for each")
            if site.name in self.sites and (self.steps is None or step in self.steps):
                shared = {"site": site.name, "grid": site.grid, "step": step, "sigma": tuple(site.sigma.tolist()),
                          "images": labels}  # fmt: skip
                tensors = (q, k, v) if self.values else (q, k)
                parts = (z.split(len(labels)) for z in tensors)  # (m·b, ...) -> m × (b, ...)
                for names, *part in zip(site.branches, *parts, strict=True):
                    if self.branches is None or set(names) & set(self.branches):
                        self._keep({**shared, "branches": names}, *part)
            return attend(q, k, v, site)

        return record

    def _keep(self, facts: dict[str, Any], *tensors: Tensor) -> None:
        heads = list(range(tensors[0].shape[1]) if self.heads is None else self.heads)
        kept = {name: z.detach()[:, heads].cpu().contiguous() for name, z in zip("qkv", tensors)}  # copies
        size = sum(z.nbytes for z in kept.values())
        if self.folder is None and self.bytes + size > self.limit:
            raise InputError(
                f"the recording passes its limit of {self.limit / 2**20:.0f} MiB at step {facts['step']}, "
                f"{facts['site']}; keep fewer sites, heads or steps, raise limit=, or give a folder to stream to"
            )
        self.bytes += size
        facts["heads"] = tuple(heads)
        if self.folder is None:
            self.entries.append(Entry(**facts, load=lambda: kept))
            return
        folder, facts["file"] = Path(self.folder), f"{len(self.entries):06d}.safetensors"
        with replacing(folder / facts["file"]) as temporary:
            save_file(kept, temporary)
        with (folder / INDEX).open("a", encoding="utf-8") as index:
            index.write(json.dumps(plain(facts), ensure_ascii=False) + "\n")
        self.entries.append(_entry(plain(facts), folder))


def _entry(facts: Mapping[str, Any], folder: Path) -> Entry:
    """An entry from its line of the index."""
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items() if key != "file"}
    shape = (len(facts["sigma"]), len(facts["heads"]), math.prod(facts["grid"]))

    def load() -> Mapping[str, Tensor]:
        """The tensors of the file. InputError where they are not those of the index."""
        path = folder / facts["file"]
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            reason = "not a file of a recording" if path.is_file() else "not there, though the index names it"
            raise InputError(f"{path}: {reason}") from error
        q, k = (tensors.get(name) for name in "qk")
        if q is None or k is None or q.shape[:3] != shape or k.ndim != 4 or k.shape[:2] != shape[:2]:
            shapes = {name: tuple(z.shape) for name, z in tensors.items()}
            raise InputError(f"{path}: holds {shapes}; the index has rows, heads and tokens {shape}")
        return tensors

    return Entry(**values, load=load)


def _read_index(path: Path) -> list[Mapping[str, Any]]:
    """The lines of an index, which may come from anywhere. InputError with the number of the line that is wrong."""
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: {path.stat().st_size} bytes; an index has {LARGEST} at most")
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last one was cut off
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    index = []
    for number, line in enumerate(lines, 1):
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON") from error
        if wrong := _wrong(facts):
            raise InputError(f"{path}, line {number}: {wrong}")
        index.append(facts)
    return index


def _wrong(facts: Any) -> str:
    """What keeps a line of an index from being an entry; "" for nothing."""
    if not isinstance(facts, dict) or facts.keys() != KINDS.keys():
        return f"not a mapping with {', '.join(KINDS)} and nothing else"
    for key, (kind, of) in KINDS.items():
        value = facts[key]
        items = value if isinstance(value, list) else [value]
        fits = all(isinstance(item, of) and not isinstance(item, bool) and item == item for item in items)  # no NaN
        if type(value) is not kind or not fits:
            noun = of.__name__ if isinstance(of, type) else "number"
            return f"{key}: {str(value)[:60]!r} is not {noun if kind is of else f'a list of {noun}'}"
    if len(facts["grid"]) != 2 or min(facts["grid"]) < 1 or facts["step"] < 0:
        return f"grid: {facts['grid']}, step: {facts['step']}: not two sides of at least 1 and a number from 0 on"
    if len(facts["images"]) != len(facts["sigma"]) or not facts["heads"] or not facts["branches"]:
        counts = f"{len(facts['images'])} images, {len(facts['sigma'])} sigmas"
        return f"{counts}: not one of each a row, or no head or branch"
    if not re.fullmatch(r"\d{6,}\.safetensors", facts["file"]):
        return f"file: {facts['file'][:60]!r} is not a file beside the index"
    return ""
