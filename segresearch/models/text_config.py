"""The config.json of a CLIP text encoder: what the network reads of it, checked.

All else is left out (dropout, first values, the ids of other tokens, how transformers is to return its results): it
does not change what texts are encoded to.
"""

from collections.abc import Mapping
from typing import Any

from transformers.activations import ACT2FN

from segresearch.errors import CheckpointError, shown

TYPES = ("clip_text_model", "clip")  # model_type
SIZES = {  # whole numbers from 1 to these
    "vocab_size": 10**7, "hidden_size": 10**5, "intermediate_size": 10**6, "num_hidden_layers": 1000,
    "num_attention_heads": 10**5, "max_position_embeddings": 10**6, "projection_dim": 10**5,
}  # fmt: skip
MOST_TOKENS = 10**7


def text_config(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields that the network reads; those that are missing stay so. place: of the config, for messages.

    CheckpointError for a value of another type or range."""
    if (kind := config.get("model_type", TYPES[0])) not in TYPES:
        raise CheckpointError(f"{place}: model_type={shown(kind)}: a text encoder that is not CLIP's is not supported")
    fields = {key: config[key] for key in (*SIZES, "eos_token_id", "hidden_act", "layer_norm_eps") if key in config}
    if fields.get("projection_dim", 1) is None:  # of an encoder without a projection
        del fields["projection_dim"]
    for key, value in fields.items():
        if expected := fault(key, value):
            raise CheckpointError(f"{place}: {key}={shown(value)} must be {expected}")
    width, heads = (fields.get(key) for key in ("hidden_size", "num_attention_heads"))
    if width and heads and width % heads:
        raise CheckpointError(f"{place}: hidden_size={width} must be a multiple of num_attention_heads={heads}")
    if "layer_norm_eps" in fields:
        fields["layer_norm_eps"] = float(fields["layer_norm_eps"])
    return fields


def fault(key: str, value: Any) -> str:
    """What the value of a field must be, "" where it is that."""
    if key == "hidden_act":
        names = "an activation of transformers, as quick_gelu or gelu"
        return "" if isinstance(value, str) and value in ACT2FN else names
    if key == "layer_norm_eps":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if number and 0 <= value <= 1 else "a number from 0 to 1"
    least, most = (0, MOST_TOKENS) if key == "eos_token_id" else (1, SIZES[key])
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole and least <= value <= most else f"a whole number from {least} to {most}"
