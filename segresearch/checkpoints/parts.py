"""The stored tensors of one network, from a whole model or from a file or a folder of its own, in either layout: its
config and its weights. A given part takes the place of a model's own where the sizes fit.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from segresearch.checkpoints.file_sizes import Shapes, clip_config, span, unet_config, vae_config
from segresearch.checkpoints.key_maps import clip_map, open_clip_map, unet_map, unet_source, vae_map
from segresearch.checkpoints.tensors import Entry, Source, Weights, with_scales
from segresearch.errors import CheckpointError
from segresearch.models.text_config import text_config

Config = Mapping[str, Any]
Stored = TypeVar("Stored")  # an entry of a file, or a tensor in memory
DIFFUSERS_SCALING = 0.18215  # of latents, where a VAE's config.json does not say it
SCALINGS = {True: 0.13025, False: 0.18215}  # of latents: SDXL's; Stable Diffusion 1's and 2's
CLIP_WIDTH = 768  # of OpenAI's text encoder; wider ones are OpenCLIP's
LATENTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of a VAE's config, of the UNet's training
OF_THE_MODEL = (
    "addition_time_embed_dim",
    "sample_size",
    "size_ids",
    "upcast_attention",
)  # of a UNet's, not in its shapes
HEADS = ("attention_head_dim", "num_attention_heads")


@dataclass(frozen=True)
class Part:
    """kind: "unet", "vae" or "text_encoder". entries: below `prefix`, with it. original: the layout of their names.
    config: as in a config.json; {}: sizes are read from the shapes. scheduler: what is declared with a UNet."""

    kind: str
    path: Path
    entries: Mapping[str, Entry]
    prefix: str = ""
    original: bool = False
    config: Config = field(default_factory=dict)
    scheduler: Config = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By names without the prefix."""
        return {key.removeprefix(self.prefix): entry.shape for key, entry in self.entries.items()}

    @property
    def open_clip(self) -> bool:
        """Whether a text encoder has OpenCLIP's names."""
        return f"{self.prefix}positional_embedding" in self.entries

    @property
    def name(self) -> str:
        """For messages: the prefix in a whole checkpoint, or the part's own file or folder."""
        if self.prefix:
            return f"{self.prefix}*"
        return self.path.name if self.path.name.startswith(self.kind) else f"{self.kind} {self.path.name}"


@dataclass(frozen=True)
class Given:
    """Parts that take the place of a model's own."""

    unet: Part | None = None
    vae: Part | None = None
    texts: tuple[Part, ...] = ()

    def replaces(self, kind: str) -> bool:
        """Whether there is a part of a kind ("unet", "vae", "text_encoder")."""
        return bool({"unet": self.unet, "vae": self.vae, "text_encoder": self.texts}.get(kind))


NONE = Given()


def arranged(
    own: Sequence[Part | None], given: Given, path: Path, latents: Config | None = None
) -> tuple[list[Part], list[dict[str, Any]]]:
    """The parts of a model and their configs: UNet, VAE, then its text encoders, where given ones take the place of its
    own. own: None for a part that only `given` has. path: of the model. latents: how its latents are scaled, where its
    VAE's config does not say it; None: by the family. CheckpointError for a part that does not fit."""
    unet, vae, *texts = own
    sized = reads_sizes(given.unet or unet)
    text_own = [text_sizes(part, {}, sized) if part else {} for part in texts]
    text_given = assigned(given.texts, text_own, path)
    pairs = zip(text_given, text_own, strict=True)
    text_configs = [text_sizes(part, config, sized) if part else config for part, config in pairs]
    ids = {"size_ids": 5} if sized and len(texts) == 1 else {}  # the refiner's aesthetic score in place of a size
    pooled = text_configs[-1].get("projection_dim") if sized else None
    unet_own = unet_sizes(unet, ids, pooled) if unet else ids
    vae_own = {"scaling_factor": SCALINGS[sized]} | dict(latents or {}) | (vae_sizes(vae, {}) if vae else {})
    configs = [
        unet_sizes(given.unet, unet_own, pooled) if given.unet else unet_own,
        vae_sizes(given.vae, vae_own) if given.vae else vae_own,
        *text_configs,
    ]
    parts = [given.unet or unet, given.vae or vae, *(a or b for a, b in zip(text_given, texts, strict=True))]
    if None in parts:
        raise CheckpointError(f"{path}: a text encoder is missing: give all of them by text_encoder=")
    return [part for part in parts if part], configs


def with_unet_scheduler(own: Config, given: Given) -> Config:
    """The scheduler facts of a model: its own, or those that come with a given UNet; a warning where the predictions
    differ."""
    facts = given.unet.scheduler if given.unet else {}
    if not facts or given.unet is None:
        return own
    its, models = facts.get("prediction_type"), own.get("prediction_type", "epsilon")
    if its is not None and its != models:
        text = f"the UNet's own prediction {its} is used, where the model's is {models}"
        warnings.warn(f"{given.unet.path}: {text}; prediction= (model.prediction) decides otherwise", stacklevel=2)
    whole = "_class_name" in facts or "sigma_data" in own
    return facts if whole else {**own, **facts}


def reads_sizes(unet: Part | None) -> bool:
    """Whether a UNet reads image sizes and a pooled text, as SDXL's does; those of Stable Diffusion 1 and 2 do not."""
    if unet is None or unet.config:
        return unet is not None and unet.config.get("addition_embed_type") == "text_time"
    return bool({"label_emb.0.0.weight", "add_embedding.linear_1.weight"} & unet.shapes.keys())


def unet_sizes(part: Part, own: Config, pooled: int | None) -> dict[str, Any]:
    """The config of a UNet. own: of the model that it joins; pooled: width of its pooled text, None if it has none."""
    ids = {key: own[key] for key in ("size_ids",) if key in own}
    if part.config:
        return {**part.config, **ids}
    shapes = part.shapes if part.original else _original_unet(part.shapes)
    config = _read(part, lambda: unet_config(shapes, pooled, own.get("size_ids", 6)))
    known = {key: own[key] for key in OF_THE_MODEL if key in own}
    same = list(own.get("block_out_channels", ())) == config["block_out_channels"]
    return config | known | ({key: own[key] for key in HEADS if key in own} if same else {}) | ids


def vae_sizes(part: Part, own: Config) -> dict[str, Any]:
    """The config of a VAE. own: of the model that it joins, {} for its own VAE, whose scaling of latents stays.
    CheckpointError for a VAE of another family, whose scaling is another."""
    shapes = part.shapes if part.original else _original_vae(part.shapes)
    config = dict(part.config) or _read(part, lambda: vae_config(shapes))
    its, scaling = config.get("scaling_factor", DIFFUSERS_SCALING), own.get("scaling_factor")
    if own and part.config and its != scaling and own.get("latents_mean") is None:
        fault = f"its scaling_factor is {its}, that of the model's VAE {scaling}"
        raise CheckpointError(f"{part.path}: {fault}: a VAE of another family, whose latents are others")
    return config | {key: own[key] for key in LATENTS if key in own}


def text_sizes(part: Part, own: Config, sized: bool) -> dict[str, Any]:
    """The config of a text encoder. own: of the encoder whose place it takes, which says what shapes cannot; {}: a rule
    of the families. sized: whether the model is SDXL's kind. Raises CheckpointError for a config that cannot be."""
    if part.config:
        place = part.path / "config.json" if part.path.is_dir() else f"{part.path}: text encoder config"
        return text_config(part.config, str(place))
    if own:
        return dict(own)
    config = _read(part, lambda: clip_config(part.shapes))
    if part.open_clip and not sized and config["num_hidden_layers"] == 24:
        config["num_hidden_layers"] = 23  # Stable Diffusion 2 does not use the last
    if not part.open_clip and config["hidden_size"] > CLIP_WIDTH:
        config["hidden_act"] = "gelu"
    return config


def assigned(given: Sequence[Part], own: Sequence[Config], path: Path) -> list[Part | None]:
    """For each text encoder of a model the given part that takes its place, the one of its width, or None. Of a model
    without text encoders the narrower one is the first. CheckpointError for a part that no encoder is as wide as."""
    widths = [int(text_sizes(part, {}, True).get("hidden_size", 0)) for part in given]
    if len(given) == len(own) and not any(own):
        order = sorted(range(len(given)), key=lambda i: widths[i])
        return [given[i] for i in order]
    slots: list[Part | None] = [None] * len(own)
    for part, width in zip(given, widths, strict=True):
        i = next((i for i, config in enumerate(own) if config.get("hidden_size") == width and slots[i] is None), None)
        if i is None:
            has = " and ".join(str(config.get("hidden_size", "missing")) for config in own)
            raise CheckpointError(f"{part.path}: a text encoder {width} wide; the widths of {path} are {has}")
        slots[i] = part
    return slots


def part_weights(part: Part, net: Any) -> Weights:
    """What `fill` reads into the network of a part: strictly all of its entries, but for what `unused` names."""
    entries = {key: entry for key, entry in part.entries.items() if key not in unused(part, net)}
    if part.kind == "text_encoder" and part.original:
        return Weights(part.name, entries, text_source(part))
    if part.original:
        levels = len(net.config.block_out_channels)
        source = unet_map(net.config, part.prefix) if part.kind == "unet" else vae_map(levels, part.prefix)
        return Weights(part.name, entries, source)
    renamed = {key.removeprefix(part.prefix): entry for key, entry in entries.items()}
    if part.kind == "text_encoder":
        return Weights(part.name, text_entries(net, renamed))
    return Weights(part.name, {vae_key(k): e for k, e in renamed.items()} if part.kind == "vae" else renamed)


def used_keys(net: Any, weights: Weights) -> set[str]:
    """The stored tensors that a network reads, and the names of scales beside them."""
    return set().union(*(with_scales(weights.source(key).key) for key in net.state_dict()))


def missing_keys(net: Any, weights: Weights) -> set[str]:
    """The stored tensors that a network needs and that are not there."""
    return {weights.source(key).key for key in net.state_dict()} - weights.entries.keys()


def text_source(part: Part) -> Callable[[str], Source]:
    """Where the parameters of a text encoder lie, in transformers' names (old files leave out "text_model.") or in
    OpenCLIP's."""
    if part.open_clip:
        return partial(open_clip_map, prefix=part.prefix, keys=part.entries)
    bare = f"{part.prefix}embeddings.position_embedding.weight" in part.entries
    return partial(clip_map, prefix=part.prefix, model="" if bare else "text_model.")


def unused(part: Part, net: Any) -> set[str]:
    """Of a text encoder that is not pooled: its projection, and the last layer of a full OpenCLIP, which Stable
    Diffusion 2 does not use."""
    if part.kind != "text_encoder" or hasattr(net, "text_projection"):
        return set()
    last = rf"|transformer\.resblocks\.{net.config.num_hidden_layers}\..*" if part.open_clip else ""
    pattern = re.compile(rf"{re.escape(part.prefix)}(text_projection(\.weight)?{last})")
    return {key for key in part.entries if pattern.fullmatch(key)}


def text_entries(encoder: Any, entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """Under the encoder's own names: transformers 5.6 dropped `text_model.` from those of CLIPTextModel."""
    keys, prefix = encoder.state_dict().keys(), "text_model."
    names = {key: {key, prefix + key, key.removeprefix(prefix)} & keys for key in entries}
    return {min(names[key], default=key): entry for key, entry in entries.items()}


def vae_key(key: str) -> str:
    """VAE attention names of old diffusers folders as they are called today."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)\b", lambda old: names[old[0]], key)


def _original_unet(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes by diffusers' names under the names of the original layout, from which sizes are read."""
    levels = span(shapes, r"down_blocks\.(\d+)\.")
    layers = [span(shapes, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in range(levels)]
    crossed = [any(key.startswith(f"up_blocks.{level}.attentions.") for key in shapes) for level in range(levels)]
    ups = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in crossed]
    source = unet_source(layers, ups, "")
    return {source(key).key: shape for key, shape in shapes.items()}


def _original_vae(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    source = vae_map(span(shapes, r"encoder\.down_blocks\.(\d+)\."), "")
    return {source(vae_key(key)).key: shape for key, shape in shapes.items()}


def _read(part: Part, sizes: Callable[[], Any]) -> Any:
    """`sizes`. CheckpointError where keys are missing that every network of the kind has."""
    try:
        return sizes()
    except (KeyError, IndexError, ValueError, TypeError, StopIteration) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"cannot tell the sizes of {part.name} ({reason}): keys are missing, or it is another network"
        raise CheckpointError(f"{part.path}: {problem}") from error
