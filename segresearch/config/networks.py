"""The settings of what is added to networks, and of further networks. Light: no torch."""

from dataclasses import dataclass, field
from typing import Annotated

from segresearch.checkpoints.additions import Embedding, Lora
from segresearch.config.validate import Record, of_record
from segresearch.runs import LATER

Loras = tuple[Annotated[Lora, of_record(Lora, Lora.parse)], ...]  # each a mapping of its fields, or "path:scale"
Embeddings = tuple[Annotated[Embedding, of_record(Embedding, Embedding.parse)], ...]  # or "path.safetensors:token"


@dataclass(frozen=True)
class NetworkConfig(Record):
    """A further network: the folder of a UNet, by its path or by its name in the model's folder, or a model as in
    `model.path`; null is the model's own UNet as it is loaded, `model.loras` included. loras: added to it.
    fingerprint: of its weights, which a run fills in; other weights are then refused."""

    path: str | None
    fingerprint: str | None = None
    loras: Loras = field(default=(), metadata=LATER)
