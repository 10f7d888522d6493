"""What a safetensors file is that is not the model asked for, told from its keys: quantised, an adapter, a part alone,
or another architecture. Light: no torch."""

import re
from collections.abc import Iterable
from pathlib import Path

from segresearch.checkpoints.resolve import UNQUANTISED
from segresearch.errors import CheckpointError

QUANTISED = {  # a pattern of keys -> how the weights are stored; the first that matches
    r"\.quant_state\.bitsandbytes__|\.weight\.(nested_)?(absmax|quant_map)$": "quantised to 4 bits (nf4 or fp4)",
    r"\.SCB$": "quantised to int8 by bitsandbytes",
    r"\.(wscales|smooth_factor(_orig)?)$": "quantised to 4 bits by SVDQuant",
    r"\.(qweight|qzeros|weight_packed)$": "quantised (GPTQ, AWQ or another packing)",
}
BASE = "give the checkpoint that it belongs to"
OTHERS = {  # a pattern of keys -> what the file is, and what to do; the first that matches
    r"^lllite_": f"a ControlNet-LLLite, which is not supported: {BASE}",
    r"^lora_controlnet$": f"a Control-LoRA, not a checkpoint: {BASE}",
    r"lora_(unet|te|up|down|A|B|mid)|\.lora\.|lycoris_|\.hada_w1|\.lokr_w|\.oft_": f"a LoRA, not a checkpoint: {BASE}, "
    "and this as one of loras= (model.loras)",
    r"^ip_adapter\.|^image_proj\.|\.to_k_ip\b": f"an IP-Adapter, not a checkpoint: {BASE}, and this as "
    "guidance.ip_adapter.path",
    r"^(control_model\.)?(task_embedding$|control_add_embedding\.)": "a union of ControlNets, not a checkpoint: "
    f"{BASE}, and this as controlnet=",
    r"^control_model\.|controlnet_(cond_embedding|down_blocks|mid_block)|^input_hint_block\.|^zero_convs\.": "a "
    f"ControlNet, not a checkpoint: {BASE}, and this as controlnet=",
    r"^(adapter\.)?body\.\d+\.(resnets\.\d+\.)?block1\.": f"a T2I-Adapter, which is not supported: {BASE}",
    r"\bmotion_modules\.": "an AnimateDiff motion module, which is not supported: only images are sampled here",
    r"\.time_stack\.|\.time_mixer\b": "a video model (Stable Video Diffusion), which is not supported",
    r"\A(?:(?:clip_[lgh]|emb_params|<[^\n]*>)(?:\n|\Z))+\Z": f"a textual inversion, not a checkpoint: {BASE}, and this "
    "as one of embeddings= (model.embeddings)",
    r"\bdistilled_guidance_layer\.": "Chroma",
    r"\bindividual_token_refiner\.": "Hunyuan Video",
    r"\b(single|early)_stream_modulations?\.": "Flux 2",
    r"\bdouble_stream_blocks\.": "HiDream",
    r"\bdouble_blocks\.": "Flux",
    r"\bjoint_blocks\.": "Stable Diffusion 3",
    r"\bclip_txt_(pooled_)?mapper\.|\.channelwise\.": "Stable Cascade",
    r"\bdouble_layers\.": "AuraFlow",
    r"\bcap_embedder\.": "Lumina or Z-Image",
    r"\blayers\.\d+\.adaLN_modulation\.": "Z-Image",
    r"\bmlp_t5\.|\btext_embedding_padding$": "Hunyuan-DiT",
    r"\.mlp\.(inverted_conv|depth_conv)\.": "Sana",
    r"\bpatchify_proj\.": "LTX-Video",
    r"\bhead\.modulation$": "Wan",
    r"\.attn\.qkv_x\.": "Mochi",
    r"^net\.(blocks|x_embedder)\.": "Cosmos",
    r"\btxt_norm\.|\btxt_in\.text_norm\.": "Qwen-Image",
    r"\badaln_single\.|\by_embedder\.|\.cross_attn\.(q|kv)_linear\.": "PixArt",
    r"^transformer_blocks\.\d+\.|\bsingle_transformer_blocks\.": "a diffusion transformer (Flux, Stable Diffusion 3 or "
    "another)",
    r"^noise_augmentor\.|^embedder\.model\.visual\.": "Stable unCLIP",
    r"\bencoder_hid_proj\b|\badd_embedding\.pool\.": "Kolors, DeepFloyd IF or another model with its own text encoder",
    r"\bencoder\.block\.\d+\.layer\.0\.SelfAttention\.": "a T5 text encoder, which no model here has",
    r"^(vision_model|visual)\.": "an image encoder (CLIP vision), not a checkpoint",
    r"^(taesd_)?(encoder|decoder)\.layers\.\d|^\d+\.conv\.\d+\.weight$": "a small VAE for previews (TAESD), which is "
    "not supported",
    r"^(encoder|decoder)\.(middle|stages)\.": "a VAE of another architecture (Wan, DC-AE or another)",
    r"^(conv_first\.|RRDB_trunk\.|body\.\d+\.rdb1\.|model\.\d+\.sub\.)": "an upscaler of images, not a diffusion model",
}
ALONE = {  # a pattern of keys -> the part that such a file holds, and the setting that takes it
    r"\binput_blocks\.\d+\.|^(unet\.)?(down_blocks|time_embedding|mid_block)\.": ("UNet", "unet"),
    r"\b(encoder|decoder)\.(conv_in|(up|down)(_blocks)?\.\d+)\.": ("VAE", "vae"),
    r"\btoken_embedding\.weight$|\btext_model\.": ("text encoder", "text_encoder"),
}
HINT = "give a base checkpoint (such as sd_xl_base_1.0.safetensors) or a folder in the diffusers layout"


def refuse_quantised(keys: Iterable[str], path: Path) -> None:
    """CheckpointError, with the kind, for keys that come with quantised weights. Scaled fp8 is read by `fill`."""
    if kind := _first(QUANTISED, "\n".join(sorted(keys))):
        raise CheckpointError(f"{path} is {kind}, which is not supported: {UNQUANTISED}")


def other_kind(keys: Iterable[str]) -> str | None:
    """What the keys belong to if not to a UNet, a VAE or a CLIP text encoder; None if no pattern knows them."""
    return _first(OTHERS, "\n".join(sorted(keys)))


def refuse_other_file(keys: Iterable[str], path: Path, wanted: str = "a model") -> None:
    """CheckpointError with what the file is, where it is not what is `wanted`."""
    keys = sorted(keys)
    if kind := other_kind(keys):
        where = "" if ":" in kind or "support" in kind else f", not {wanted}; {HINT}"
        raise CheckpointError(f"{path} is {kind}{where}")
    text = "\n".join(keys)
    for pattern, (part, setting) in ALONE.items():
        if re.search(pattern, text, re.MULTILINE):
            takes = f"a model's own can be replaced by it: {setting}= (model.{setting}) beside that model's path"
            raise CheckpointError(f"{path} is a {part} alone, not {wanted}: {takes}")
    raise CheckpointError(f"{path} is of an unknown layout (its first key is {keys[0]!r}); {HINT}")


def _first(table: dict[str, str], text: str) -> str | None:
    return next((kind for pattern, kind in table.items() if re.search(pattern, text, re.MULTILINE)), None)
