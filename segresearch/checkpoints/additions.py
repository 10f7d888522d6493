"""LoRAs and textual inversions as settings: a file, and how it is used. Light: no torch."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from segresearch import runs
from segresearch.checkpoints.resolve import cached_folder, refuse_pickle
from segresearch.errors import CheckpointError, ConfigError, InputError
from segresearch.fields import Number


@dataclass(frozen=True)
class Lora:
    """A LoRA and its scales; 0 leaves a network as it is, a negative scale subtracts.

    path: a .safetensors file, a folder with one, or a hub id in the local cache. scale: of its UNet part. text_scale:
    of its text encoder part; None is `scale`. fingerprint: of the file, which a run fills in; another is then refused.
    """

    path: str
    scale: Number = 1.0
    text_scale: Number | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        for key, scale in (("scale", self.scale), ("text_scale", 0 if self.text_scale is None else self.text_scale)):
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
                raise InputError(f"the {key} of LoRA {self.path} is {scale!r}: it must be a finite number")

    @staticmethod
    def parse(text: str) -> "Lora":
        """From "path", "path:scale" or "path:scale:text_scale"."""
        number = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
        path, *scales = re.fullmatch(rf"(.*?)(?::({number}))?(?::({number}))?", text, re.DOTALL).groups()  # type: ignore[union-attr]
        return Lora(path, *(float(scale) for scale in scales if scale is not None))  # type: ignore[arg-type]

    @property
    def scales(self) -> tuple[float, float]:
        """Of the UNet and of the text encoders."""
        return float(self.scale), float(self.scale if self.text_scale is None else self.text_scale)

    def resolve(self) -> Path:
        """The file, or the folder that was given. CheckpointError where there is none."""
        return _resolve(self.path, "LoRA", "pytorch_lora_weights.safetensors")

    def identity(self) -> dict[str, Any]:
        """What images depend on."""
        return {"fingerprint": self.fingerprint, "scales": list(self.scales)}


@dataclass(frozen=True)
class Embedding:
    """A textual inversion: the vectors that a word of the prompt stands for.

    path: a .safetensors file, a folder with one, or a hub id in the local cache. token: the word; None is the one in
    the file, else the file's name. fingerprint: as of a Lora.
    """

    path: str
    token: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and (not self.token or re.search(r"\s", self.token)):
            raise InputError(f"the token of embedding {self.path} is {self.token!r}: give one word without spaces")

    @staticmethod
    def parse(text: str) -> "Embedding":
        """From "path" or "path.safetensors:token"."""
        named = re.fullmatch(r"(.+\.safetensors):(.+)", text, re.DOTALL)
        return Embedding(*named.groups()) if named else Embedding(text)

    def resolve(self) -> Path:
        """The file, or the folder that was given. CheckpointError where there is none."""
        return _resolve(self.path, "embedding", "learned_embeds.safetensors")

    def identity(self) -> dict[str, Any]:
        """What images depend on; the file's name, should the token be taken from it."""
        return {"fingerprint": self.fingerprint, "token": self.token or self.resolve().stem}


Addition = TypeVar("Addition", Lora, Embedding)
Recorded = TypeVar("Recorded")  # a dataclass with a field `fingerprint`
Loras = Sequence["Lora | str | Path | tuple[Any, ...]"] | Lora | str | Path | None
Embeddings = Mapping[str, "str | Path | Sequence[str | Path]"] | Sequence["Embedding | str | Path"] | None


def as_loras(loras: Loras) -> tuple[Lora, ...]:
    """Of files, "file:scale", (file, scale), (file, scale, text_scale), one or several. InputError for others."""
    entries: list[Lora] = []
    for entry in [loras] if isinstance(loras, str | Path | Lora) else loras or ():
        if isinstance(entry, str):
            entries.append(Lora.parse(entry))
        elif isinstance(entry, Lora | Path):
            entries.append(entry if isinstance(entry, Lora) else Lora(str(entry)))
        elif _pair(entry):
            entries.append(Lora(str(entry[0]), *entry[1:]))
        else:
            raise InputError(f"loras: {entry!r} is not a file, (file, scale) or (file, scale, text_scale)")
    return tuple(entries)


def _pair(entry: Any) -> bool:
    sizes = isinstance(entry, tuple | list) and 2 <= len(entry) <= 3
    return sizes and isinstance(entry[0], str | Path) and all(isinstance(scale, int | float) for scale in entry[1:])


def as_embeddings(embeddings: Embeddings) -> tuple[Embedding, ...]:
    """Of {token: file or files}, or of files and "file:token". InputError for others."""
    entries: list[Embedding] = []
    if isinstance(embeddings, Mapping):
        for token, files in embeddings.items():
            entries += [Embedding(str(file), token) for file in ([files] if isinstance(files, str | Path) else files)]
        return tuple(entries)
    for entry in [embeddings] if isinstance(embeddings, str | Path | Embedding) else embeddings or ():
        if not isinstance(entry, str | Path | Embedding):
            raise InputError(f"embeddings: {entry!r} is not a file; give {{token: file}} or a list of files")
        entries.append(Embedding.parse(entry) if isinstance(entry, str) else entry)  # type: ignore[arg-type]
    return tuple(Embedding(str(entry)) if isinstance(entry, Path) else entry for entry in entries)


def identified(additions: Sequence[Addition], at: str) -> tuple[Addition, ...]:
    """With the fingerprints of the files. ConfigError, beginning with the key `at`, for a file that is missing or is
    not the one that a fingerprint names."""
    entries = []
    for i, entry in enumerate(additions):
        try:
            path = entry.resolve()
            fingerprint = runs.fingerprint(path)
        except (CheckpointError, FileNotFoundError) as error:
            raise ConfigError(f"{at}.{i}: {error}") from error
        entries.append(fingerprinted(entry, fingerprint, f"{at}.{i}", f"{path} has the content"))
    return tuple(entries)


def fingerprinted(entry: Recorded, fingerprint: str, at: str, subject: str) -> Recorded:
    """With this fingerprint. subject: what has it, and a verb. ConfigError, beginning with the key `at`, where the
    entry has another already, which it was sampled with."""
    own = entry.fingerprint  # type: ignore[attr-defined]
    if own not in (None, fingerprint):
        raise ConfigError(f"{at}: {subject} {fingerprint}, not {own}; leave `fingerprint` out to take what is there")
    return dataclasses.replace(entry, fingerprint=fingerprint)  # type: ignore[type-var]


def identified_additions(model: Any) -> dict[str, tuple[Any, ...]]:
    """The LoRAs and embeddings of a ModelConfig, `identified`, by their keys; without a key of which it has none."""
    entries = {"loras": model.loras, "embeddings": model.embeddings}
    return {key: identified(files, f"model.{key}") for key, files in entries.items() if files}


def _resolve(name: str, kind: str, file: str) -> Path:
    path = Path(name).expanduser()
    refuse_pickle(path)
    folder = path if path.is_dir() else None
    if path.is_file():
        return path
    if folder is None and path.suffix != ".safetensors":
        folder = cached_folder(name, file, f"a {kind} ")
    if folder is None:
        raise CheckpointError(f"{name}: no such file; give the {kind}'s .safetensors file, its folder or a hub id")
    if (folder / file).is_file():
        return folder / file
    weights = sorted(folder.glob("*.safetensors"))
    if len(weights) != 1:
        count = f"{len(weights)} .safetensors files" if weights else "no .safetensors file"
        raise CheckpointError(f"{folder}: {count} there: give the {kind}'s own file")
    return folder if (folder / "adapter_config.json").is_file() else weights[0]
